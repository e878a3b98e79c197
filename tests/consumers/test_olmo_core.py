"""OLMo-core reads and draws what we export for it; see checking.py."""

from pathlib import Path

import pytest
import yaml

from doremi_mix.domain_weights import DomainWeights
from doremi_mix.errors import ExportError

from .checking import RefusedError, write_problem

CONSUMER = "olmo-core"
pytestmark = pytest.mark.consumers

TOKENS, BATCH, LENGTH = 200_704, 1024, 64


@pytest.fixture
def tokenized(consumer, problem, tmp_path):
    """Token arrays of the three domains, of which beta is in two files, and the paths to export."""
    sizes = {"alpha": [1_000_000], "beta": [60_000, 60_000], "gamma": [20_000]}
    arrays = {
        str(tmp_path / "tok" / name / f"{number}.npy"): (token, size)
        for token, name in enumerate(sizes, start=1)
        for number, size in enumerate(sizes[name])
    }
    consumer.ask("write_tokens", arrays=arrays)
    return {name: str(tmp_path / "tok" / name / "*.npy") for name in sizes}


@pytest.mark.proves("olmo-core", how="drawn")
def test_olmo_core_draws_the_exported_shares_of_tokens(consumer, problem, tokenized):
    export, (file,) = consumer.export("olmo-core", problem.weights, paths=tokenized)
    read = consumer.ask("read", file=file, resolve=True)
    assert read["ratios"] == export.expected
    assert sum(read["ratios"].values()) == 1.0
    assert [len(paths) for paths in read["paths"].values()] == [1, 2, 1]
    drawn = consumer.ask("draw", file=file, tokens=TOKENS, batch=BATCH, length=LENGTH)
    assert sum(drawn.values()) == TOKENS
    # Whole sequences of each file: a file may be one sequence off.
    for token, (name, share) in enumerate(export.expected.items(), start=1):
        assert abs(drawn[str(token)] - share * TOKENS) <= 2 * LENGTH, name


@pytest.mark.proves("olmo-core-composable", how="drawn")
def test_olmo_core_composable_draws_the_exported_shares_of_sequences(consumer, problem, tokenized):
    export, (file,) = consumer.export("olmo-core-composable", problem.weights, budget=9_000, paths=tokenized)
    drawn = consumer.ask("draw_composable", file=file, length=LENGTH)
    for token, (name, share) in enumerate(export.expected.items(), start=1):
        assert abs(drawn[str(token)] - share * 9_000) <= 2 * LENGTH, name


@pytest.mark.proves("olmo-core", how="parsed")
def test_hostile_names_are_read_as_they_are(consumer, tmp_path):
    names = [
        "two words",
        "a:b",
        "中文",
        "yes",
        "1e5",
        "-dash",
        "null",
        "a,b",
        "it's",
        "2024-01-01",
        "${HOME}",
        "123",
        "~",
    ]
    problem = write_problem(
        tmp_path / "hostile", dict.fromkeys(names, 1 / 13), dict.fromkeys(names, 3), dict.fromkeys(names, 4)
    )
    paths = {name: f"tokenized/{name}/*.npy" for name in names}
    export, (file,) = consumer.export("olmo-core", problem.weights, paths=paths)
    read = consumer.ask("read", file=file, resolve=False)
    assert read["ratios"] == export.expected
    assert read["paths"] == {name: [path] for name, path in paths.items()}


def test_trap_rounded_ratios_do_not_sum_to_1(consumer, problem, tokenized):
    _, (file,) = consumer.export("olmo-core", problem.weights, paths=tokenized)
    naive = consumer.folder / "naive.yaml"
    sources = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    sources["sources"][0]["target_ratio"] = 0.21
    naive.write_text(yaml.safe_dump(sources), encoding="utf-8")
    with pytest.raises(RefusedError, match=r"target_ratios must sum to 1.0, got 1.01"):
        consumer.ask("read", file=str(naive), resolve=True)


def test_trap_a_small_source_needs_a_repetition_ratio(consumer, problem, tokenized):
    _, (file,) = consumer.export("olmo-core", problem.weights, paths=tokenized)
    naive = consumer.folder / "naive.yaml"
    sources = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    for source in sources["sources"]:
        del source["max_repetition_ratio"]
    naive.write_text(yaml.safe_dump(sources), encoding="utf-8")
    with pytest.raises(RefusedError, match=r"Insufficient tokens for source: gamma @ target global ratio: 0\.3"):
        consumer.ask("draw", file=str(naive), tokens=TOKENS, batch=BATCH, length=LENGTH)
    # Ours lets a source be repeated as often as the plan does, and no oftener.
    assert consumer.ask("draw", file=file, tokens=TOKENS, batch=BATCH, length=LENGTH)["3"] > 20_000
    with pytest.raises(RefusedError, match=r"Insufficient tokens for source: gamma .* :: 80000 < 120000"):
        consumer.ask("draw", file=file, tokens=400_000, batch=4000, length=LENGTH)


def test_trap_a_pattern_with_a_dot_folder_finds_nothing(consumer, problem, tokenized):
    _, (file,) = consumer.export("olmo-core", problem.weights, paths=tokenized)
    dotted = {name: path.replace("/tok/", "/tok/./") for name, path in tokenized.items()}
    naive = consumer.folder / "naive.yaml"
    naive.write_text(Path(file).read_text(encoding="utf-8").replace("/tok/", "/tok/./"), encoding="utf-8")
    with pytest.raises(RefusedError, match="did not match any files"):
        consumer.ask("read", file=str(naive), resolve=True)
    with pytest.raises(ExportError, match="is a pattern that OLMo-core never matches"):
        consumer.export("olmo-core", problem.weights, paths=dotted)


def test_trap_a_star_in_a_name_would_find_the_files_of_others(consumer):
    weights = DomainWeights({"a*": 0.5, "ab": 0.5}, {"a*": 0.5, "ab": 0.5})
    with pytest.raises(ExportError, match="which OLMo-core expands as a pattern"):
        consumer.export("olmo-core", weights, paths={"a*": "tokenized/a*/*.npy", "ab": "tokenized/ab/*.npy"})
