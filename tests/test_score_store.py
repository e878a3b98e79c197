"""Scores are computed once, for the rows that need them, and read back in the order of rows."""

import json

import numpy as np
import pytest

from doremi_mix import row_jobs, score_store
from doremi_mix.atomic import write_json
from doremi_mix.filters.scores import FAMILIES, Family
from doremi_mix.progress import Narrator
from doremi_mix.row_jobs import run_units
from doremi_mix.run import RunDirectory, fingerprint
from doremi_mix.score_store import ScoreRequest, ScoreStore

ROWS = {"fruit": 7, "水": 5}


class Counting:
    """A family that counts the rows it was asked about."""

    def __init__(self):
        self.rows = []

    def make(self, settings, columns):
        def score(batch):
            self.rows += batch.column(0).to_pylist()
            lengths = np.array([len(text) * settings["factor"] for text in batch.column(0).to_pylist()], np.float32)
            vectors = np.stack([lengths, -lengths], axis=1)
            words = np.array([f"w{int(length)}" for length in lengths], dtype=object)
            return {"length": lengths, "vector": vectors, "word": words, "flag": lengths > 12}

        return score


@pytest.fixture
def counting(monkeypatch):
    counting = Counting()
    family = Family(counting.make, reads=("output",), max_unit_rows=2)
    for module in (row_jobs, score_store):
        monkeypatch.setattr(module, "FAMILIES", {**FAMILIES, "counting": family})
    return counting


def load_rows(run, rows=ROWS):
    """Writes what the stage load would have written: row groups of three rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = run.begin("load", "made", resumable=False)
    for name, count in rows.items():
        texts = [f"{name} " + "x" * i for i in range(count)]
        columns = dict.fromkeys(("id", "domain", "instruction", "input", "output", "system", "row"), texts)
        pq.write_table(pa.table(columns), folder / f"{name}.parquet", row_group_size=3)
    write_json(folder / "summary.json", {"domains": [{"domain": n, "num_kept": c} for n, c in rows.items()]})
    run.finish("load", fingerprint({"rows": rows}), {}, resumable=False)


@pytest.fixture
def run(tmp_path):
    directory = RunDirectory(tmp_path)
    load_rows(directory)
    return directory


def make_store(run, executor=None):
    return ScoreStore(run, executor or (lambda folder, _n, tracker: run_units(folder, 0, 1, tracker.advance)), QUIET)


QUIET = Narrator(quiet=True)
REQUEST = ScoreRequest("counting", ("length",), {"factor": 1})
LENGTHS = [[len(f"{name} ") + i for i in range(count)] for name, count in ROWS.items()]


def test_every_row_is_scored_once(run, counting):
    store = make_store(run)
    store.ensure(REQUEST)
    assert [values.tolist() for values in store.read(REQUEST, "length")] == LENGTHS
    assert len(counting.rows) == sum(ROWS.values()) == len(set(counting.rows))
    make_store(run).ensure(REQUEST)
    assert len(counting.rows) == sum(ROWS.values())


def test_the_kinds_of_columns_come_back_as_they_were(run, counting):
    store = make_store(run)
    request = ScoreRequest("counting", ("length", "vector", "word", "flag"), {"factor": 2})
    store.ensure(request)
    vector = store.read(request, "vector")
    assert vector[1].dtype == np.float32
    assert vector[1].shape == (5, 2)
    assert vector[1][:, 1].tolist() == [-2 * length for length in LENGTHS[1]]
    assert store.read(request, "word")[0][0] == "w12"
    assert store.read(request, "flag")[0].tolist() == [False] + [True] * 6


def test_another_setting_or_another_load_is_another_score(run, counting):
    store = make_store(run)
    store.ensure(REQUEST)
    store.ensure(ScoreRequest("counting", ("length",), {"factor": 3}))
    assert len(counting.rows) == 2 * sum(ROWS.values())
    load_rows(run, {"fruit": 2, "水": 1})
    store = make_store(run)
    store.ensure(REQUEST)
    assert len(counting.rows) == 2 * sum(ROWS.values()) + 3
    assert [len(values) for values in store.read(REQUEST, "length")] == [2, 1]


def test_only_missing_columns_are_computed(run, counting):
    store = make_store(run)
    store.ensure(REQUEST)
    both = ScoreRequest("counting", ("length", "flag"), {"factor": 1})
    store.ensure(both)
    store.ensure(both)
    assert len(counting.rows) == 2 * sum(ROWS.values())
    groups = [json.loads(p.read_text())["columns"] for p in sorted((run.path / "scores").glob("*/group.json"))]
    assert sorted(groups) == [["flag"], ["length"]]
    assert store.read(both, "length")[0].tolist() == LENGTHS[0]


def test_only_wanted_rows_are_scored_and_more_are_added(run, counting):
    store = make_store(run)
    some = [np.arange(7) % 2 == 0, np.zeros(5, dtype=bool)]
    store.ensure(REQUEST, some)
    assert len(counting.rows) == 4
    fruit, water = store.read(REQUEST, "length")
    assert np.isnan(fruit).tolist() == (~some[0]).tolist()
    assert len(water) == 5
    assert np.isnan(water).all()
    assert fruit[some[0]].tolist() == LENGTHS[0][::2]
    more = [np.arange(7) < 4, np.arange(5) == 4]
    store.ensure(REQUEST, more)
    assert len(counting.rows) == 4 + 2 + 1
    fruit, water = store.read(REQUEST, "length")
    assert fruit[:5].tolist() == LENGTHS[0][:5]
    assert water[4] == LENGTHS[1][4]
    store.ensure(REQUEST)
    assert sorted(counting.rows) == sorted(set(counting.rows))
    assert len(counting.rows) == sum(ROWS.values())


def test_a_killed_pass_goes_on_where_it_was(run, counting):
    def dies(folder, _num_rows, _tracker):
        done = []

        def stop(num_rows):
            done.append(num_rows)
            if len(done) == 3:
                raise KeyboardInterrupt

        run_units(folder, 0, 1, stop)

    with pytest.raises(KeyboardInterrupt):
        make_store(run, dies).ensure(REQUEST)
    before = len(counting.rows)
    assert 0 < before < sum(ROWS.values())
    store = make_store(run)
    store.ensure(REQUEST)
    assert len(counting.rows) == sum(ROWS.values()) == len(set(counting.rows))
    assert [values.tolist() for values in store.read(REQUEST, "length")] == LENGTHS


def test_a_killed_pass_that_nobody_asks_for_again_is_not_read(run, counting):
    def dies(folder, _num_rows, _tracker):
        def stop(_num_rows):
            raise KeyboardInterrupt

        run_units(folder, 0, 1, stop)

    for columns in (("length", "flag"), ("length", "vector"), ("length", "word"), ("flag", "length", "word")):
        with pytest.raises(KeyboardInterrupt):
            make_store(run, dies).ensure(ScoreRequest("counting", columns, {"factor": 1}))
    store = make_store(run)
    store.ensure(REQUEST)
    assert [values.tolist() for values in store.read(REQUEST, "length")] == LENGTHS


def test_workers_share_the_rows_and_any_number_comes_to_the_same(run, counting):
    def three(folder, _num_rows, tracker):
        for rank in (2, 0, 1):
            run_units(folder, rank, 3, tracker.advance)

    store = make_store(run, three)
    store.ensure(REQUEST)
    assert [values.tolist() for values in store.read(REQUEST, "length")] == LENGTHS
    assert len(counting.rows) == sum(ROWS.values())


def test_a_worker_that_wrote_nothing_is_noticed(run, counting):
    store = make_store(run, lambda folder, num_rows, tracker: None)
    with pytest.raises(OSError, match=r"0000000000-0000000002\.parquet: was not written by any worker"):
        store.ensure(REQUEST)
