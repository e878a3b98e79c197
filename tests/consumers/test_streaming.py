"""MosaicML Streaming, and LLM Foundry's streams, which are Streaming's own class."""

import pytest

from doremi_mix.errors import ExportError

from .checking import RefusedError, write_problem

CONSUMER = "streaming"
pytestmark = pytest.mark.consumers


@pytest.fixture
def shards(consumer, problem, tmp_path):
    """The folders of the three domains, written by Streaming's own writer."""
    return write_shards(consumer, problem, tmp_path)


def write_shards(consumer, problem, tmp_path):
    paths = {name: str(tmp_path / "mds" / name) for name in problem.rows}
    consumer.ask("write", rows={paths[name]: [row["domain"] for row in rows] for name, rows in problem.kept.items()})
    return paths


@pytest.mark.proves("streaming", how="drawn")
def test_an_epoch_holds_exactly_the_counts(consumer, problem, shards):
    export, [file] = consumer.export("streaming", problem.weights, budget=3000, paths=shards)
    answer = consumer.ask("mixture", file=file)
    assert answer["drawn"] == {name: round(share * export.num_drawn) for name, share in export.expected.items()}
    assert answer["size"] == export.num_drawn
    # Whole passes first: gamma has 50 rows and gives about 45, beta 300 and about 150: no row twice.
    assert answer["most_often"] == {"alpha": 1, "beta": 1, "gamma": 1}


@pytest.mark.proves("streaming", how="drawn")
def test_domains_are_repeated_up_to_the_epoch_cap(consumer, problem, shards):
    export, [file] = consumer.export("streaming", problem.weights, budget=20_000, paths=shards)
    answer = consumer.ask("mixture", file=file)
    assert answer["drawn"] == {name: round(share * export.num_drawn) for name, share in export.expected.items()}
    assert answer["drawn"]["gamma"] == 200
    assert answer["most_often"]["gamma"] == 4


@pytest.mark.proves("llm-foundry", how="drawn")
def test_foundry_streams_hold_exactly_the_counts(consumer, problem, shards):
    export, [file] = consumer.export("llm-foundry", problem.weights, budget=3000, paths=shards)
    answer = consumer.ask("foundry", file=file)
    assert answer["drawn"] == {name: round(share * export.num_drawn) for name, share in export.expected.items()}


@pytest.mark.parametrize("name", ["streaming", "llm-foundry"])
def test_hostile_names_are_read_right(consumer, tmp_path, name):
    names = ["yes", "1e5", "-x", "a b", "it's", '"q"', "a,b:c#d@e", "中文", "\u2028 x", "null", "{%Y}", "a\\n"]
    problem = write_problem(
        tmp_path / "rows", dict.fromkeys(names, 1 / 12), dict.fromkeys(names, 40), dict.fromkeys(names, 6)
    )
    paths = write_shards(consumer, problem, tmp_path)
    export, [file] = consumer.export(name, problem.weights, budget=1200, paths=paths)
    answer = consumer.ask("mixture" if name == "streaming" else "foundry", file=file)
    assert answer["drawn"] == {name: round(share * export.num_drawn) for name, share in export.expected.items()}


def test_trap_mixing_kinds_raises(consumer, problem, shards):
    streams = [{"local": shards["alpha"], "proportion": 0.5}, {"local": shards["beta"], "choose": 10}]
    with pytest.raises(RefusedError, match="stream weights are incompatible with each other"):
        consumer.ask("naive", streams=streams, settings={})


def test_trap_choose_with_epoch_size_raises_and_so_ours_says(consumer, problem, shards):
    export, [file] = consumer.export("streaming", problem.weights, budget=3000, paths=shards)
    with pytest.raises(RefusedError, match="Only provide `choose` when weighting streams relatively"):
        consumer.ask("mixture", file=file, settings={"epoch_size": 1000})
    assert any(note.startswith("Do not give epoch_size") for note in export.notes)


def test_trap_proportion_without_epoch_size_ignores_the_budget(consumer, problem, shards):
    weights = {"alpha": 0.2, "beta": 0.5, "gamma": 0.3}
    streams = [{"local": shards[name], "proportion": share} for name, share in weights.items()]
    naive = consumer.ask("naive", streams=streams, settings={"shuffle": True})
    # 1350 rows, as many as there are in all: gamma's 50 rows are repeated 8 times without being asked for.
    assert naive["chosen"] == [270, 675, 405]
    assert naive["most_often"]["gamma"] == 9
    export, [file] = consumer.export("streaming", problem.weights, budget=3000, paths=shards)
    assert consumer.ask("mixture", file=file)["size"] == export.num_drawn < 400


def test_trap_without_shuffle_domains_come_one_after_another(consumer, problem, shards):
    streams = [{"local": path, "choose": 50} for path in shards.values()]
    assert consumer.ask("naive", streams=streams, settings={})["longest_run"] == 50
    _, [file] = consumer.export("streaming", problem.weights, budget=3000, paths=shards)
    assert consumer.ask("mixture", file=file)["longest_run"] < 50


def test_trap_one_folder_for_two_domains(consumer, problem, shards):
    streams = [{"local": shards["alpha"], "choose": 50}, {"local": shards["alpha"] + "/", "choose": 50}]
    with pytest.raises(RefusedError, match="Reused local directory"):
        consumer.ask("naive", streams=streams, settings={})
    paths = {**shards, "beta": shards["alpha"] + "/"}
    with pytest.raises(ExportError, match="have the same path"):
        consumer.export("streaming", problem.weights, budget=3000, paths=paths)
