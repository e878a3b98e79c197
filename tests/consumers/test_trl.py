"""TRL's own parser reads our config, and its own code draws the mixture."""

import pytest
import yaml

from doremi_mix.errors import ExportError
from doremi_mix.exporters.plan import make_plan

from .checking import write_problem

CONSUMER = "trl"


def planned(export):
    return {name: round(share * export.num_drawn) for name, share in export.expected.items()}


def problem_shares(problem):
    return make_plan(problem.weights).example_shares()


@pytest.mark.proves("trl", how="drawn")
def test_the_rows_are_drawn_exactly_with_and_without_a_budget(consumer, problem):
    (shares, [shares_file]), (counts, [counts_file]) = (
        consumer.export("trl", problem.weights, budget=budget) for budget in (None, 8000)
    )
    by_share, by_count = consumer.ask("mixtures", files=[shares_file, counts_file])
    assert by_share["fractions"] == list(problem_shares(problem).values())
    assert sum(by_share["fractions"]) == 1.0
    # gamma's 50 rows, which are to be a seventh, decide how much there is.
    assert by_share["drawn"] == planned(shares) == {"alpha": 133, "beta": 166, "gamma": 50}
    assert set(by_share["most_often"].values()) == {1}
    assert by_count["drawn"] == planned(counts) == {"alpha": 321, "beta": 401, "gamma": 121}
    assert by_count["most_often"] == {"alpha": 1, "beta": 2, "gamma": 3}


@pytest.mark.proves("trl", how="drawn")
def test_hostile_names_and_tiny_shares_are_read_right(consumer, tmp_path):
    names = ["yes", "1e5", "-x", "a b", "it's", '"q"', "a,b:c#d@e", "中文", "[1]*?", "null", "{a}%s", "a\\n", "b\nc"]
    names += ["~", "1zz", "\x85 \u2028\ufeff"]
    shares = {**dict.fromkeys(names, 1 / 16), "yes": 1 / 16 - 1e-12, "tiny": 1e-12}
    sizes = {name: 40 + number for number, name in enumerate(shares)}
    problem = write_problem(tmp_path / "rows", shares, sizes, dict.fromkeys(shares, 6))
    exports, files = zip(*(consumer.export("trl", problem.weights, budget=b) for b in (None, 1200, 9000)), strict=True)
    answers = consumer.ask("mixtures", files=[file for [file] in files])
    for export, answer in zip(exports, answers, strict=True):
        assert answer["drawn"] == planned(export)
        assert set(answer["drawn"]) == set(names)


def test_trap_counts_as_fractions_and_some_fractions_without_the_others(consumer, problem, tmp_path):
    """The mixture that somebody wants is 200, 500 and 300 rows; a fraction repeats nothing, and all shrinks."""
    entries = [{"path": "json", "data_files": problem.paths[name]} for name in ("alpha", "beta", "gamma")]
    wanted = {"alpha": 0.2, "beta": 0.5, "gamma": 0.3}
    naive = [{**entry, "fraction": f} for entry, f in zip(entries, wanted.values(), strict=True)]
    configs = {
        "shrinks": {"datasets": naive},
        "some": {"datasets": [naive[0], *entries[1:]]},
        "streams": {"datasets": naive, "streaming": True},
        "short": {"datasets": [{**entry, "split": "train[:500]"} for entry in entries]},
    }
    files = []
    for name, config in configs.items():
        files.append(str(tmp_path / f"{name}.yaml"))
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    answers = dict(zip(configs, consumer.ask("mixtures", files=files), strict=True))
    assert answers["shrinks"]["drawn"] == {"alpha": 33, "beta": 83, "gamma": 50}
    assert (
        answers["some"] == "ValueError: `fraction` must be set for either all datasets in the mixture or none of them."
    )
    assert answers["streams"] == "ValueError: Using a dataset `fraction` is not supported with streaming datasets."
    # A slice beyond the end is shorter without a word, so that ours names a domain once for each pass.
    assert answers["short"]["drawn"] == {"alpha": 500, "beta": 312, "gamma": 50}


def test_paths_that_the_library_reads_otherwise_are_refused(consumer, problem):
    paths = {**problem.paths, "beta": "/data/$HOME.jsonl"}
    with pytest.raises(ExportError) as refusal:
        consumer.export("trl", problem.weights, paths=paths)
    assert str(refusal.value) == (
        "trl: domain 'beta': its path '/data/$HOME.jsonl' holds \"$\", after which the datasets library puts in the "
        "value of an environment variable; give other paths: --paths"
    )
