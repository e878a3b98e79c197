"""Units of rows, and the processes that do them: nothing is lost, done twice, or left running."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from doremi_mix import row_workers
from doremi_mix.atomic import write_json
from doremi_mix.errors import ConfigError, ModelError, RunDirectoryError
from doremi_mix.filters.exact_duplicates import text_keys
from doremi_mix.filters.scores import FAMILIES, Family
from doremi_mix.filters.texts import example_texts
from doremi_mix.row_jobs import WANTED, Job, from_arrow, plan_units, run_units
from doremi_mix.row_workers import run_workers

TURN = pa.struct([("user", pa.string()), ("assistant", pa.string())])
TEXTS = ("instruction", "input", "output", "system", "row")
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("domain", pa.string()),
        *((name, pa.string()) for name in TEXTS),
        ("history", pa.list_(TURN)),
    ]
)
SIZES = {"fruit": 230, "水": 70}
GROUP = 100
"""Rows of a row group of the loaded files."""


def rows_of(domain, num_rows):
    return [
        {
            "id": f"{domain}:{i}",
            "domain": domain,
            "instruction": f"Number {i}",
            "input": "",
            "output": f"It is {i % 37}.",
        }
        | {"system": None, "row": "{}", "history": []}
        for i in range(num_rows)
    ]


def write_loaded(run_dir, sizes=SIZES, group=GROUP):
    """Writes what the stage load leaves, as far as jobs read it."""
    load = run_dir / "load"
    load.mkdir(parents=True)
    for domain, num_rows in sizes.items():
        rows = rows_of(domain, num_rows)
        with pq.ParquetWriter(load / f"{domain}.parquet", SCHEMA) as writer:
            for start in range(0, num_rows, group):
                writer.write_table(pa.Table.from_pylist(rows[start : start + group], schema=SCHEMA))
    domains = [{"domain": domain, "num_rows": number, "num_kept": number} for domain, number in sizes.items()]
    write_json(load / "summary.json", {"domains": domains})
    write_json(load / "manifest.json", {"fingerprint": "of the test"})
    return load


def write_job(run_dir, family, columns, settings=None, unit_rows=40, name="job-0", wanted=None):
    """Writes a job over all loaded rows, or those that are wanted."""
    folder = run_dir / "scores" / name
    folder.mkdir(parents=True, exist_ok=True)
    units = []
    for path in sorted((run_dir / "load").glob("*.parquet")):
        mask = None if wanted is None else wanted[path.stem]
        if mask is not None:
            (folder / WANTED).mkdir(exist_ok=True)
            np.save(folder / WANTED / f"{path.stem}.npy", mask)
        units += plan_units(path, path.stem, unit_rows, mask)
    Job(family, columns, settings or {}, "../../load", tuple(units)).save(folder)
    return folder


def read_parts(folder, column):
    """Reads back, by domain, the positions and the values of all parts, in the order of file names."""
    result = {}
    for place in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        tables = [pq.read_table(path) for path in sorted(place.glob("*.parquet"))]
        positions = np.concatenate([table.column("position").to_numpy() for table in tables])
        values = [from_arrow(table.schema.field(column), table.column(column)) for table in tables]
        result[place.name] = positions, np.concatenate(values)
    return result


def files_of(folder):
    """Names and times of all parts."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/*.parquet")}


@pytest.fixture
def run_dir(tmp_path):
    write_loaded(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def stub(monkeypatch):
    """A family of two columns: the number in the instruction, and a vector of it and its double."""

    def make(settings, columns):
        def score(batch):
            numbers = np.array([int(text.split()[1]) for text in batch.column("instruction").to_pylist()])
            every = {"number": numbers, "vector": np.stack([numbers, 2 * numbers], axis=1).astype(np.float16)}
            return {name: every[name] for name in columns}

        return score

    monkeypatch.setitem(FAMILIES, "stub", Family(make, reads=("instruction",)))


def ignore(num_rows):
    pass


# --- Units.


@given(
    groups=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    unit_rows=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    share=st.sampled_from([None, 0.0, 0.3, 1.0]),
)
def test_units_hold_every_wanted_row_once(tmp_path_factory, groups, unit_rows, seed, share):
    path = tmp_path_factory.mktemp("units") / "a.parquet"
    schema = pa.schema([("id", pa.int64())])
    with pq.ParquetWriter(path, schema) as writer:
        for count in groups:
            writer.write_table(pa.table({"id": list(range(count))}, schema=schema))
    total = sum(groups)
    missing = None if share is None else np.random.default_rng(seed).random(total) < share
    seen = []
    starts = np.cumsum([0, *groups])
    for unit in plan_units(path, "a", unit_rows, missing):
        assert (
            unit.first
            == starts[unit.row_group]
            <= unit.start
            < unit.stop
            <= starts[unit.row_group + unit.num_row_groups]
        )
        positions = np.arange(unit.start, unit.stop)
        if unit.tag:
            positions = positions[missing[unit.start : unit.stop]]
        assert 0 < len(positions) <= unit_rows
        seen += positions.tolist()
    assert seen == list(range(total)) if missing is None else seen == np.flatnonzero(missing).tolist()


def test_other_rows_make_another_file(tmp_path):
    load = write_loaded(tmp_path, {"a": 50})
    masks = np.zeros((2, 50), dtype=bool)
    masks[:, [0, 9]] = True
    masks[1, 5] = True
    first, second = (next(plan_units(load / "a.parquet", "a", 100, mask)) for mask in masks)
    assert (first.start, first.stop) == (second.start, second.stop) == (0, 10)
    assert first.path(tmp_path).name != second.path(tmp_path).name


@pytest.mark.parametrize("world_size", [1, 2, 7, 50])
def test_shares_of_any_number_of_workers_are_the_whole(run_dir, stub, world_size):
    folder = write_job(run_dir, "stub", ("number", "vector"))
    told = []
    for rank in reversed(range(world_size)):
        run_units(folder, rank, world_size, told.append)
    assert sum(told) == sum(SIZES.values())
    for domain, (positions, numbers) in read_parts(folder, "number").items():
        assert positions.tolist() == numbers.tolist() == list(range(SIZES[domain]))
    vectors = read_parts(folder, "vector")["水"][1]
    assert vectors.dtype == np.float16
    assert vectors.tolist() == [[i, 2 * i] for i in range(SIZES["水"])]


def test_a_worker_takes_every_nth_unit(run_dir, stub):
    folder = write_job(run_dir, "stub", ("number",))
    units = Job.read(folder).units
    run_units(folder, 1, 3, ignore)
    assert set(files_of(folder)) == {unit.path(folder) for unit in units[1::3]}


def test_only_wanted_rows_are_scored(run_dir, stub):
    rng = np.random.default_rng(0)
    wanted = {domain: rng.random(number) < 0.2 for domain, number in SIZES.items()}
    folder = write_job(run_dir, "stub", ("number",), unit_rows=7, wanted=wanted)
    told = []
    run_units(folder, 0, 1, told.append)
    assert sum(told) == sum(int(mask.sum()) for mask in wanted.values())
    for domain, (positions, numbers) in read_parts(folder, "number").items():
        assert positions.tolist() == numbers.tolist() == np.flatnonzero(wanted[domain]).tolist()


def test_what_is_there_is_not_done_again(run_dir, stub):
    folder = write_job(run_dir, "stub", ("number",))
    run_units(folder, 0, 1, ignore)
    before = files_of(folder)
    lost = sorted(before)[2]
    lost.unlink()
    # A worker that was killed while it wrote leaves this.
    half = lost.with_name(f".{lost.name}.0123abcd.tmp")
    half.write_bytes(b"half a file")
    told = []
    run_units(folder, 0, 1, told.append)
    after = files_of(folder)
    assert told == [20]  # of the first 100 rows: 40, 40 and 20
    assert after.keys() == before.keys()
    assert {path for path in after if after[path] != before[path]} == {lost}


def test_a_part_that_cannot_be_written_is_said_in_one_line(run_dir, stub):
    folder = write_job(run_dir, "stub", ("number",))
    (folder / "fruit").write_text("in the way")
    with pytest.raises(RunDirectoryError) as caught:
        run_units(folder, 0, 1, ignore)
    assert str(caught.value) == (
        f"{folder / 'fruit'}: cannot be written (File exists); make room, or choose another --run-dir"
    )


# --- Processes.

SCRIPT = """
import os, signal, sys, time, warnings
from pathlib import Path
import numpy as np
from doremi_mix import row_workers
from doremi_mix.errors import ModelError
from doremi_mix.filters.scores import FAMILIES, Family

folder, rank = Path(sys.argv[1]), int(sys.argv[2])

def score(batch):
{body}
    return {{"number": np.arange(batch.num_rows)}}

FAMILIES["stub"] = Family(lambda settings, columns: score, reads=("instruction",))
row_workers.main(sys.argv[1:])
"""
SLEEP = "(folder / f'{os.getpid()}.pid').touch(); time.sleep(300)"


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Makes workers do something else with the rows of family stub."""

    def replace(body):
        script = tmp_path / "worker.py"
        script.write_text(SCRIPT.format(body=textwrap.indent(body, "    ")))
        monkeypatch.setattr(row_workers, "WORKER", (str(script),))
        return script

    return replace


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited for nothing"
        time.sleep(0.05)


def pids(folder):
    return [int(path.stem) for path in folder.glob("*.pid")]


def run_two(folder, on_rows=ignore):
    run_workers(folder, range(2), 2, 1, folder / ".logs", on_rows)


def test_processes_come_to_what_one_comes_to(run_dir):
    folder = write_job(run_dir, "text", ("text_key@text",), unit_rows=3)
    told = []
    run_workers(folder, range(3), 3, 1, folder / ".logs", told.append)
    assert sum(told) == sum(SIZES.values())
    assert len(files_of(folder)) == len(Job.read(folder).units) == len(told) > 100
    for domain, (positions, keys) in read_parts(folder, "text_key@text").items():
        batch = pa.RecordBatch.from_pylist(rows_of(domain, SIZES[domain]), schema=SCHEMA)
        assert positions.tolist() == list(range(SIZES[domain]))
        assert keys.tobytes() == text_keys(example_texts(batch), "text").tobytes()


def test_what_libraries_print_is_no_message(run_dir, worker):
    worker('print(\'{"rows": 1000}\', flush=True); os.write(1, b"{not json}\\n"); warnings.warn("take care")')
    folder = write_job(run_dir, "stub", ("number",))
    told = []
    run_two(folder, told.append)
    assert sum(told) == sum(SIZES.values())
    log = row_workers.log_of(folder / ".logs", 1).read_text()
    assert '{"rows": 1000}' in log
    assert "{not json}" in log
    assert "take care" in log


def test_an_error_of_a_worker_comes_back_and_ends_the_others(run_dir, worker):
    wait = "while not list(folder.glob('*.pid')): time.sleep(0.05)"
    worker(f"if rank: {SLEEP}\n{wait}\nraise ModelError('gpt-5: is not here; choose another')")
    folder = write_job(run_dir, "stub", ("number",))
    with pytest.raises(ModelError) as caught:
        run_two(folder)
    assert str(caught.value) == "gpt-5: is not here; choose another"
    assert not any(map(is_running, pids(folder)))
    assert len(pids(folder)) == 1


MEMORY = (
    "{}; lower filter.workers or use a machine with more memory, and run the same command again: it goes on from here"
)


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            ConfigError,
            MEMORY.format("a worker was killed (SIGKILL), which happens when memory runs out"),
        ),
        ("raise MemoryError", ConfigError, MEMORY.format("a worker ran out of memory")),
        ("{}['x']", RuntimeError, "worker 1 ended with 1: KeyError: 'x'; its log: {log}"),
        (
            "os.kill(os.getpid(), signal.SIGABRT)",
            RuntimeError,
            "worker 1 ended by SIGABRT: it printed nothing; its log: {log}",
        ),
    ],
)
def test_other_ends_of_a_worker(run_dir, worker, body, kind, message):
    worker(f"if rank == 1: {body}")
    folder = write_job(run_dir, "stub", ("number",))
    with pytest.raises(kind) as caught:
        run_two(folder)
    assert type(caught.value) is kind
    assert str(caught.value) == message.format(log=folder / ".logs" / "worker-00001.log")
    # The same again, without what went wrong.
    worker("pass")
    run_two(folder)
    assert len(files_of(folder)) == len(Job.read(folder).units)


PARENT = """
import sys
from pathlib import Path
from doremi_mix import row_workers

if __name__ == "__main__":
    row_workers.WORKER = (sys.argv[1],)
    folder = Path(sys.argv[2])
    try:
        row_workers.run_workers(folder, range(2), 2, 1, folder / ".logs", print)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9), (signal.SIGTERM, -15)])
def test_workers_end_with_the_process_that_started_them(run_dir, worker, tmp_path, number, code):
    folder = write_job(run_dir, "stub", ("number",))
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py"), str(worker(SLEEP)), str(folder)]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_until(lambda: len(pids(folder)) == 2)
        # As a terminal does: Ctrl-C goes to all of its processes, a kill to one.
        (os.killpg if number == signal.SIGINT else os.kill)(parent.pid, number)
        errors = parent.communicate(timeout=60)[1]
        assert (parent.returncode, errors) == (code, "")
        wait_until(lambda: not any(map(is_running, pids(folder))))
    finally:
        parent.kill()
    assert not files_of(folder)
    assert [path.read_text() for path in (folder / ".logs").iterdir()] == ["", ""]


def test_workers_share_the_cores_unless_told_otherwise(run_dir, worker, monkeypatch):
    worker("(folder / f'{rank}.txt').write_text(os.environ['OMP_NUM_THREADS'] + os.environ['RAYON_NUM_THREADS'])")
    folder = write_job(run_dir, "stub", ("number",))
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    run_workers(folder, range(2), 2, 3, folder / ".logs", ignore)
    assert [(folder / f"{rank}.txt").read_text() for rank in range(2)] == ["53", "53"]


@pytest.mark.parametrize(("num_gpus", "expected"), [(0, []), (1, []), (4, [2])])
def test_each_worker_of_a_model_has_its_own_gpu(monkeypatch, num_gpus, expected):
    import torch

    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    row_workers._take_gpu(6)
    assert taken == expected


def test_errors_pass_from_machine_to_machine(tmp_path):
    assert row_workers.read_error(tmp_path) is None
    row_workers.write_error(tmp_path, "00003", ModelError("m: is not here"))
    error = row_workers.read_error(tmp_path)
    assert (type(error), str(error)) == (ModelError, "m: is not here")
    (path,) = tmp_path.glob("error-*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "machine": "node7"}))
    assert str(row_workers.read_error(tmp_path)) == "m: is not here (on node7)"
    path.unlink()
    row_workers.write_error(tmp_path, "00001", KeyError("x"))
    error = row_workers.read_error(tmp_path)
    assert (type(error), str(error)) == (RuntimeError, "KeyError: 'x'")
