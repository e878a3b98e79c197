"""Run directories: atomic files, fingerprints, locks."""

import json
import multiprocessing

import pytest

from doremi_mix.atomic import write_atomic, write_json
from doremi_mix.errors import ConfigError, RunDirectoryError
from doremi_mix.run import MANIFEST, STARTED, RunDirectory, fingerprint


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_atomic(path, "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"


def test_fingerprint_ignores_the_order_of_keys_and_sees_every_value():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.5})
    assert fingerprint({"a": [1, 2]}) != fingerprint({"a": [2, 1]})


def test_begin_keeps_partial_work_of_the_same_fingerprint_only(tmp_path):
    run = RunDirectory(tmp_path)
    folder = run.begin("proxy", "f1", resumable=True)
    (folder / "checkpoint.pt").write_text("partial")
    assert (run.begin("proxy", "f1", resumable=True) / "checkpoint.pt").exists()
    assert not (run.begin("proxy", "f2", resumable=True) / "checkpoint.pt").exists()
    assert sorted(path.name for path in folder.iterdir()) == [STARTED]
    aside = run.begin("load", "f1", resumable=False)
    (aside / "half.json").write_text("partial")
    assert not (run.begin("load", "f1", resumable=False) / "half.json").exists()


def test_a_stage_that_starts_over_leaves_the_earlier_result_alone_until_it_has_finished(tmp_path):
    run = RunDirectory(tmp_path)
    for number in ("1", "2"):
        (run.begin("load", f"f{number}", resumable=False) / "rows").write_text(number)
        if number == "2":
            assert (run.stage_path("load") / "rows").read_text() == "1"
            assert run.manifest("load")["fingerprint"] == "f1"
        run.finish("load", f"f{number}", {}, resumable=False)
        assert (run.stage_path("load") / "rows").read_text() == number
    assert sorted(path.name for path in tmp_path.iterdir()) == ["load"]


def test_a_finished_stage_stands_until_it_is_made_again(tmp_path):
    run = RunDirectory(tmp_path)
    run.begin("proxy", "f1", resumable=True)
    (run.work_path("proxy", resumable=True) / "result").write_text("1")
    run.finish("proxy", "f1", {"seconds": 1}, resumable=True)
    manifest = run.manifest("proxy")
    assert manifest == {"stage": "proxy", "fingerprint": "f1", "seconds": 1}
    folder = run.begin("proxy", "f2", resumable=True)
    assert [path.name for path in folder.iterdir()] == ["started.json"]
    (folder / "half").write_text("2")
    assert run.manifest("proxy") == manifest
    assert (run.stage_path("proxy") / "result").read_text() == "1"
    # Killed here, it goes on; with another fingerprint it starts again.
    assert (run.begin("proxy", "f2", resumable=True) / "half").exists()
    assert not (run.begin("proxy", "f3", resumable=True) / "half").exists()
    assert (run.stage_path("proxy") / "result").read_text() == "1"
    run.finish("proxy", "f3", {"seconds": 3}, resumable=True)
    assert run.manifest("proxy")["fingerprint"] == "f3"
    assert sorted(path.name for path in run.stage_path("proxy").iterdir()) == ["manifest.json", "started.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["proxy"]
    assert run.finished == ["proxy", "proxy"]


def test_parts_of_a_run_are_made_beside_their_own_places(tmp_path):
    run = RunDirectory(tmp_path).with_places({"proxy": "round-1-seed-1"})
    run.begin("proxy", "f1", resumable=True)
    run.finish("proxy", "f1", {}, resumable=True)
    assert run.begin("proxy", "f2", resumable=True) == tmp_path / "round-1-seed-1" / ".proxy.partial"
    run.finish("proxy", "f2", {}, resumable=True)
    assert run.manifest("proxy")["fingerprint"] == "f2"
    assert [path.name for path in (tmp_path / "round-1-seed-1").iterdir()] == ["proxy"]


def stop(run, value, error, stage=None):
    """Stores a setting, finishes a stage perhaps, and fails."""
    with run.settings_kept():
        run.path.mkdir(exist_ok=True)
        run.save({"a": value}, "cpu", f"a: {value}\n")
        if stage is not None:
            run.begin(stage, "f1", resumable=False)
            run.finish(stage, "f1", {}, resumable=False)
        raise error


def test_settings_are_put_back_when_nothing_came_of_them(tmp_path):
    run = RunDirectory(tmp_path / "run")
    for value, error, stage, kept in (
        (1, ConfigError("there were none before"), None, 1),
        (2, ConfigError("wrong"), None, 1),
        (3, KeyboardInterrupt(), None, 3),
        (4, ConfigError("wrong, later"), "load", 4),
    ):
        with pytest.raises(type(error)):
            stop(run, value, error, stage)
        assert run.describe()["given"] == {"a": kept}
        assert (tmp_path / "run" / "config.yaml").read_text() == f"a: {kept}\n"


def _hold(path, locked, release):
    with RunDirectory(path).lock():
        locked.set()
        release.wait(30)


def test_a_second_process_is_refused(tmp_path):
    context = multiprocessing.get_context("spawn")
    locked, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "run", locked, release))
    process.start()
    assert locked.wait(60)
    with pytest.raises(RunDirectoryError) as caught, RunDirectory(tmp_path / "run").lock():
        pass
    assert str(caught.value) == (
        f"{tmp_path / 'run'}: another doremi-mix process is working here; wait for it or choose another --run-dir"
    )
    release.set()
    process.join()
    with RunDirectory(tmp_path / "run").lock():
        pass


def test_other_folders_are_not_taken_over(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunDirectoryError) as caught:
        RunDirectory(tmp_path).exists()
    assert str(caught.value) == f"{tmp_path}: is not empty and not a run directory; choose another --run-dir"
    with pytest.raises(RunDirectoryError, match=r"thesis.tex: is a file; choose another --run-dir"):
        RunDirectory(tmp_path / "thesis.tex").exists()
    with pytest.raises(RunDirectoryError, match=r"nothing: no run was started here; start one with: doremi-mix learn"):
        RunDirectory(tmp_path / "nothing").describe()


def test_a_damaged_manifest_is_named(tmp_path):
    run = RunDirectory(tmp_path)
    run.begin("load", "f", resumable=True)
    (tmp_path / "load" / MANIFEST).write_text("{half")
    with pytest.raises(
        RunDirectoryError, match=r"load/manifest.json: is not JSON .*; delete the stage's folder and run"
    ):
        run.manifest("load")


def test_json_is_for_people(tmp_path):
    write_json(tmp_path / "a.json", {"水": 1})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "水": 1\n}\n'
    assert json.loads((tmp_path / "a.json").read_text()) == {"水": 1}
