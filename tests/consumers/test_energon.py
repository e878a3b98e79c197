"""Megatron-Energon draws samples in the exported shares of examples."""

from pathlib import Path

import pytest
import yaml

from doremi_mix.errors import ExportError
from doremi_mix.exporters.export import yaml_text

from .checking import RefusedError, assert_composition, write_problem

CONSUMER = "energon"
pytestmark = pytest.mark.consumers


@pytest.mark.proves("energon", how="drawn")
def test_draws_the_shares_of_examples(consumer, problem):
    export, files = consumer.export("energon", problem.weights, paths=problem.paths)
    drawn = consumer.ask("draw", path=files[0], prepare=list(problem.paths.values()), num_samples=5000)
    assert sum(drawn.values()) == 5000
    assert_composition(drawn, export.expected)
    # In tokens it is the domain weights: 20 tokens an example of gamma, 5 of alpha.
    tokens = {name: count * problem.weights.corpus[name].mean_tokens for name, count in drawn.items()}
    shares = {name: count / sum(tokens.values()) for name, count in tokens.items()}
    assert shares == pytest.approx(dict(problem.weights.domain_weights), abs=0.03)


def test_draws_from_hostile_names(consumer, tmp_path):
    names = [
        "a b",
        "1e5",
        "yes",
        "中文😀",
        "٣",
        "a: #c",
        "{x,y}",
        "-x",
        "q\"u'o",
        "${HOME}",
        "\\d",
        "~",
        "%41",
        "[1]",
        "*",
    ]
    shares = {name: 1 / len(names) for name in names}
    problem = write_problem(tmp_path / "rows", shares, dict.fromkeys(names, 20), dict.fromkeys(names, 5))
    export, files = consumer.export("energon", problem.weights, paths=problem.paths)
    drawn = consumer.ask("draw", path=files[0], prepare=list(problem.paths.values()), num_samples=3000)
    assert_composition(drawn, export.expected)


def test_reads_weights_and_relative_paths(consumer, tmp_path):
    names = ["1e5", "yes", "٣", "null", "a", "b", "2024-01-01", ".5"]
    shares = dict.fromkeys(names, 1e-12) | {"a": 0.4, "b": 0.6 - 6e-12}
    problem = write_problem(tmp_path / "rows", shares, dict.fromkeys(names, 10), dict.fromkeys(names, 5))
    export, files = consumer.export("energon", problem.weights, paths={name: name for name in names})
    folder = Path(files[0]).parent
    assert consumer.ask("parse", path=files[0]) == [
        [str(folder / name), pytest.approx(export.expected[name], rel=1e-15)] for name in names
    ]


def test_trap_unquoted_paths_and_weights_of_0(consumer, tmp_path):
    """Its YAML reader is not PyYAML: it takes 1e5 and other digits for numbers; a weight of 0 is an error."""
    naive = tmp_path / "naive.yaml"
    head = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}
    for path in ("1e5", "٣"):
        config = {**head, "splits": {"train": {"blend": [{"weight": 1.0, "path": path}]}}}
        naive.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
        with pytest.raises(RefusedError, match="JsonValueError"):
            consumer.ask("parse", path=str(naive))
    problem = write_problem(tmp_path / "rows", {"a": 1.0, "b": 0.0}, {"a": 20, "b": 20}, {"a": 5, "b": 5})
    blend = [{"weight": weight, "path": problem.paths[name]} for name, weight in (("a", 1.0), ("b", 0.0))]
    naive.write_text(yaml_text({**head, "splits": {"train": {"blend": blend}}}))
    with pytest.raises(RefusedError, match="All blending weights must be > 0"):
        consumer.ask("draw", path=str(naive), prepare=list(problem.paths.values()), num_samples=10)
    _, files = consumer.export("energon", problem.weights, paths=problem.paths)
    assert consumer.ask("draw", path=files[0], prepare=[], num_samples=10) == {"a": 10}


def test_trap_addresses_that_it_does_not_know(consumer, tmp_path, problem):
    paths = problem.paths | {"alpha": "s3://bucket/a"}
    with pytest.raises(
        ExportError, match=r"^energon: the path of domain 'alpha', 's3://bucket/a', has '://' but is no"
    ):
        consumer.export("energon", problem.weights, paths=paths)
    _, files = consumer.export("energon", problem.weights, paths=problem.paths)
    text = Path(files[0]).read_text(encoding="utf-8").replace(problem.paths["alpha"], "s3://bucket/a")
    naive = tmp_path / "naive.yaml"
    naive.write_text(text, encoding="utf-8")
    # No error: it looks for a local folder, below the folder where it was started.
    assert consumer.ask("parse", path=str(naive))[0][0] == str(consumer.folder / "s3:" / "bucket" / "a")


def test_trap_shares_below_its_precision(consumer):
    """Weights are summed in float32: 1e-12 after 0.5 adds nothing, so that it is never drawn; the file says so."""
    sums, drawn = consumer.ask("probabilities", weights=[0.5, 1e-12, 0.5 - 1e-12], num_samples=100)
    assert sums == [0.5, 0.5, 1.0]
    assert drawn[1] == 0
    shares = {"a": 0.5, "b": 1e-12, "c": 0.5 - 1e-12}
    problem = write_problem(consumer.folder / "rows", shares, dict.fromkeys(shares, 10), dict.fromkeys(shares, 5))
    export, _ = consumer.export("energon", problem.weights)
    assert export.notes[-1] == "Energon adds weights up in float32, so that it may never draw: b."
