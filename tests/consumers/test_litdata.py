"""LitData, which LitGPT reads its mixtures with."""

import pytest

from .checking import RefusedError, write_problem

CONSUMER = "litdata"
pytestmark = pytest.mark.consumers


def write_chunks(consumer, problem, tmp_path):
    paths = {name: str(tmp_path / "chunks" / name) for name in problem.rows}
    consumer.ask("write", rows={paths[name]: [row["domain"] for row in rows] for name, rows in problem.rows.items()})
    return paths


@pytest.fixture
def chunks(consumer, problem, tmp_path):
    """The folders of the three domains, written by LitData's own writer."""
    return write_chunks(consumer, problem, tmp_path)


def counts(export):
    return {name: round(share * export.num_drawn) for name, share in export.expected.items()}


@pytest.mark.proves("litdata", how="drawn")
def test_an_epoch_holds_exactly_the_counts(consumer, problem, chunks):
    export, [file] = consumer.export("litdata", problem.weights, budget=3000, paths=chunks)
    answer = consumer.ask("mixture", file=file)
    assert answer == {"drawn": counts(export), "most_often": {"alpha": 1, "beta": 1, "gamma": 1}}


@pytest.mark.proves("litdata", how="drawn")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_domains_are_repeated_up_to_the_epoch_cap(consumer, problem, chunks, num_workers):
    export, [file] = consumer.export("litdata", problem.weights, budget=18_000, paths=chunks)
    assert counts(export)["gamma"] == 200
    assert counts(export)["beta"] % 300
    assert consumer.ask("mixture", file=file)["most_often"]["gamma"] == 4
    assert consumer.ask("mixture", file=file, num_workers=num_workers)["drawn"] == counts(export)


def test_hostile_names_are_read_right(consumer, tmp_path):
    names = ["yes", "1e5", "-x", "a b", "it's", '"q"', "a,b:c#d@e", "中文", "\u2028 x", "null", "{x}", "a\\n"]
    problem = write_problem(
        tmp_path / "rows", dict.fromkeys(names, 1 / 12), dict.fromkeys(names, 40), dict.fromkeys(names, 6)
    )
    paths = write_chunks(consumer, problem, tmp_path)
    export, [file] = consumer.export("litdata", problem.weights, budget=1200, paths=paths)
    assert consumer.ask("mixture", file=file)["drawn"] == counts(export)


def test_trap_weights_with_the_default_of_iterate_over_all_raise(consumer, problem, chunks):
    with pytest.raises(RefusedError, match="the weights argument shouldn't be provided"):
        consumer.ask("naive", paths=list(chunks.values()), weights=[0.2, 0.5, 0.3], settings={})


def test_trap_weights_alone_end_with_the_first_domain_that_runs_out(consumer, problem, chunks):
    naive = consumer.ask(
        "naive", paths=list(chunks.values()), weights=[0.2, 0.5, 0.3], settings={"iterate_over_all": False}
    )
    # gamma's 50 rows end it, far from any budget.
    assert naive["drawn"]["gamma"] == 50
    assert sum(naive["drawn"].values()) < 250
    export, [file] = consumer.export("litdata", problem.weights, budget=18_000, paths=chunks)
    assert sum(consumer.ask("mixture", file=file)["drawn"].values()) == export.num_drawn > 1500


def test_trap_no_weights_is_the_natural_mixture(consumer, problem, chunks):
    naive = consumer.ask("naive", paths=list(chunks.values()), weights=None, settings={})
    assert naive["drawn"] == problem.sizes
