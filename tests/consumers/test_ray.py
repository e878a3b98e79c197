"""Ray Data's Dataset.mix."""

import json

import pytest

from doremi_mix.errors import ExportError

from .checking import RefusedError, write_problem

CONSUMER = "ray"
pytestmark = pytest.mark.consumers


def counts(export):
    return {name: round(share * export.num_drawn) for name, share in export.expected.items()}


@pytest.mark.proves("ray", how="drawn")
def test_it_draws_exactly_the_counts(consumer, problem):
    once, [first] = consumer.export("ray", problem.weights, budget=3000)
    often, [second] = consumer.export("ray", problem.weights, budget=18_000)
    answers = consumer.ask("mixture", files=[first, second])
    assert [answer["drawn"] for answer in answers] == [counts(once), counts(often)]
    assert answers[0]["most_often"] == {"alpha": 1, "beta": 1, "gamma": 1}
    assert counts(often)["gamma"] == 200
    assert answers[1]["most_often"]["gamma"] == 4


def test_hostile_names_json_arrays_and_folders_that_look_like_partitions(consumer, tmp_path):
    names = ["yes", "1e5", "a b", 'it\'s "q"', "a,b:c#d@e", "中文", "[x]*", "s;t%41", "key=value", "back\\s"]
    problem = write_problem(
        tmp_path / "domain=x", dict.fromkeys(names, 0.1), dict.fromkeys(names, 40), dict.fromkeys(names, 6)
    )
    array = tmp_path / "domain=x" / "yes.json"
    array.write_text(json.dumps(problem.rows["yes"], indent=1), encoding="utf-8")
    paths = {**problem.paths, "yes": str(array)}
    export, [file] = consumer.export("ray", problem.weights, budget=500, paths=paths)
    [answer] = consumer.ask("mixture", files=[file], settings={"block_rows": 4})
    assert answer["drawn"] == counts(export)
    assert sorted(answer["columns"]) == sorted(problem.rows["yes"][0])

    with pytest.raises(ExportError, match="takes for the start of a query"):
        consumer.export("ray", problem.weights, budget=500, paths={**paths, "yes": "rows?.jsonl"})


def test_trap_the_default_stopping_condition_ignores_weights(consumer, problem):
    naive = consumer.ask("naive", paths=list(problem.paths.values()), weights=[0.2, 0.5, 0.3])
    assert naive["STOP_ON_LONGEST_DROP"] == problem.sizes
    # The other one goes by blocks: a file is one, so that far more or less than 0.2 : 0.5 : 0.3 comes out.
    shares = {
        name: count / sum(naive["STOP_ON_SHORTEST"].values()) for name, count in naive["STOP_ON_SHORTEST"].items()
    }
    assert abs(shares.get("alpha", 0.0) - 0.2) > 0.1


def test_trap_a_weight_of_zero_raises(consumer, problem):
    with pytest.raises(RefusedError, match="Weights must be positive"):
        consumer.ask("naive", paths=list(problem.paths.values()), weights=[0.5, 0.5, 0.0])


def test_trap_a_folder_named_like_a_partition_makes_a_column(consumer, tmp_path):
    folder = tmp_path / "lang=en"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    assert consumer.ask("read", path=str(folder / "rows.jsonl")) == ["text", "lang"]
