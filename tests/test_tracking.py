"""Trackers: what they keep, how a resumed stage goes on, and that none of them can stop training."""

import json
import os
import pty
import struct
import subprocess
import sys
import threading
import time
import types

import pytest

from doremi_mix import tracking
from doremi_mix.tracking import TrackingSettings, open_trackers

TENSORBOARD = TrackingSettings(("tensorboard",))
OFFLINE = TrackingSettings(("wandb",), wandb_mode="offline")
CONFIG = {"model": "tiny", "seed": None, "weights": {"dolly.en": 0.5}, "betas": [0.9, 0.99]}


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch, tmp_path):
    """wandb reads the environment, the home folder and the current one."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "NETRC", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "demo" / "tracking"


def track(settings, folder, steps, *, first_step=0, stage="proxy", names=("loss",)):
    """Logs 1 / step under each name and returns what was said."""
    lines = []
    with open_trackers(settings, folder, stage, CONFIG, first_step, lines.append) as trackers:
        for step in steps:
            trackers.log(dict.fromkeys(names, 1 / step), step)
    return lines


class Fake:
    """A tracker that keeps what it is told and does as a test wants at one point."""

    def __init__(self, at=None, error=None):
        self.at, self.error = at, error
        self.calls = []
        self.rows = {}

    def __call__(self, plan):
        return self

    def meet(self, point, *details):
        self.calls.append((point, *details))
        if self.at == point and self.error is not None:
            error, self.error = self.error, None
            raise error

    def open(self):
        self.meet("open")
        return "is open"

    def log(self, values, step):
        self.meet("log")
        self.rows[step] = values

    def close(self, exit_code):
        self.meet("close", exit_code)

    def abandon(self):
        self.meet("abandon")


@pytest.fixture
def fake(monkeypatch):
    """Puts a fake in wandb's place."""

    def make(**settings):
        backend = Fake(**settings)
        monkeypatch.setitem(tracking._BACKENDS, "wandb", backend)
        return backend

    return make


def test_without_trackers_nothing_is_loaded_or_written(tmp_path):
    code = (
        "import sys; from pathlib import Path; from doremi_mix.tracking import *\n"
        "with open_trackers(TrackingSettings(), Path('tracking'), 'proxy', {}, 0, print) as trackers:\n"
        "    trackers.log({'loss': 1.0}, 1)\n"
        "print(sorted({n.partition('.')[0] for n in sys.modules} & "
        "{'torch', 'accelerate', 'wandb', 'tensorboard', 'transformers'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path / "cwd"
    )
    assert done.stdout == "[]\n"
    assert not list((tmp_path / "cwd").iterdir())


# tensorboard


def read_events(folder, stage="proxy"):
    """What tensorboard shows: {tag: {step: value}}, and how many points there are in all."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard" / stage), size_guidance={"scalars": 0})
    events.Reload()
    points = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    return {tag: {p.step: p.value for p in of_tag} for tag, of_tag in points.items()}, sum(map(len, points.values()))


def test_tensorboard_shows_values_under_their_names(folder):
    names = [
        "loss",
        "domain_weights/en wiki",
        "domain_weights/en_wiki",
        "domain_weights/水/a:b (1)",
        "excess_loss/水/a:b (1)",
    ]
    lines = track(TENSORBOARD, folder, [1, 2, 4], names=names)
    assert lines == [f"tracker tensorboard: tensorboard --logdir {folder / 'tensorboard'}"]
    shown, num_points = read_events(folder)
    assert shown == {f"proxy/{name}": {1: 1.0, 2: 0.5, 4: 0.25} for name in names}
    assert num_points == 15


def test_tensorboard_shows_the_settings(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track(TENSORBOARD, folder, [1])
    events = EventAccumulator(str(folder / "tensorboard" / "proxy"))
    events.Reload()
    [text] = events.Tensors("proxy/config/text_summary")
    assert json.loads(text.tensor_proto.string_val[0]) == CONFIG


def test_tensorboard_replaces_what_a_resumed_stage_repeats(folder):
    track(TENSORBOARD, folder, range(1, 11), names=["loss", "lost"])
    time.sleep(1.1)  # the order of event files is that of their names, which hold the second
    track(TENSORBOARD, folder, range(7, 9), first_step=6)
    shown, num_points = read_events(folder)
    assert shown["proxy/loss"] == {step: pytest.approx(1 / step) for step in range(1, 9)}
    assert list(shown["proxy/lost"]) == [1, 2, 3, 4, 5, 6]
    assert num_points == 14


def test_tensorboard_hides_an_attempt_that_is_started_anew(folder):
    track(TENSORBOARD, folder, range(1, 6))
    time.sleep(1.1)
    track(TENSORBOARD, folder, range(1, 3))
    assert read_events(folder) == ({"proxy/loss": {1: 1.0, 2: 0.5}}, 2)


# wandb


def read_wandb(file):
    """The records of a .wandb file: blocks of 32 KiB, parts with a header of checksum, length and kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in {1, 4}:
            records.append(Record.FromString(parts))
            parts = b""
    return records


def read_offline_run(file):
    """The run, its rows and the exit code of a .wandb file."""
    records = read_wandb(file)
    runs = [r.run for r in records if r.HasField("run")]
    rows = [
        {item.nested_key[0]: json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.HasField("history")
    ]
    rows = [{name: value for name, value in row.items() if name not in {"_runtime", "_timestamp"}} for row in rows]
    return runs[0], rows, [r.exit.exit_code for r in records if r.HasField("exit")]


def offline_files(folder):
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.parent.name)


def test_wandb_offline_keeps_one_run_over_a_resume(folder, tmp_path, capfd):
    hooks = (sys.exit, sys.excepthook)
    first = track(OFFLINE, folder, range(1, 5), names=["loss", "domain_weights/水 a.b/c"])
    assert first == [f"tracker wandb: offline; upload with: wandb sync {folder / 'wandb'}"]
    kept = json.loads((folder / "proxy.json").read_text())
    track(OFFLINE, folder, range(3, 6), first_step=2)
    assert json.loads((folder / "proxy.json").read_text()) == kept

    files = offline_files(folder)
    assert len(files) == 2
    (run, rows, exits), (resumed, more_rows, _) = map(read_offline_run, files)
    assert (run.run_id, run.project, run.display_name) == (kept["wandb_run_id"], "doremi_mix", "demo-proxy")
    assert (run.run_group, run.job_type, resumed.run_id, exits) == ("demo", "proxy", run.run_id, [0])
    config = {item.key: json.loads(item.value_json) for item in run.config.update if item.key != "_wandb"}
    assert config == CONFIG
    names = ("proxy/loss", "proxy/domain_weights/水 a.b/c")
    assert rows == [{**dict.fromkeys(names, 1 / n), "proxy/step": n, "_step": n} for n in range(1, 5)]
    assert more_rows == [{"proxy/loss": 1 / n, "proxy/step": n, "_step": n} for n in range(3, 6)]
    metrics = [r.metric for r in read_wandb(files[1]) if r.HasField("metric")]
    assert {m.glob_name: m.step_metric for m in metrics if m.glob_name} == {"proxy/*": "proxy/step"}
    assert not any(r.HasField("output") or r.HasField("output_raw") for r in read_wandb(files[0]))

    # It leaves nothing behind: no files elsewhere, no output, no hooks, no service.
    assert not list((tmp_path / "cwd").iterdir())
    assert {path.name for path in folder.iterdir()} == {"proxy.json", "wandb"}
    assert capfd.readouterr() == ("", "")
    assert (sys.exit, sys.excepthook) == hooks
    assert "WANDB_SERVICE" not in os.environ


SCRIPT = """
import os, signal, subprocess, sys, time
from pathlib import Path
from doremi_mix.tracking import TrackingSettings, open_trackers

mode, num_lines, lines = sys.argv[1], int(sys.argv[2]), []

def say(line):
    print(line, flush=True)
    lines.append(line)
    if line.startswith("tracker wandb: offline"):
        pids = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb-core"], capture_output=True, check=True).stdout
        os.kill(int(pids), signal.SIGKILL)

settings = TrackingSettings(("wandb",), wandb_mode=mode)
with open_trackers(settings, Path("demo/tracking"), "proxy", {}, 0, say) as trackers:
    for step in range(1, 1000):
        trackers.log({"loss": 1.0}, step)
        time.sleep(0.02)
        if len(lines) == num_lines:
            break
print("trained", flush=True)
"""


def test_training_survives_the_death_of_wandbs_service(tmp_path):
    command = [sys.executable, "-c", SCRIPT, "offline", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path)
    opened, died, *rest = done.stdout.splitlines()
    assert opened == "tracker wandb: offline; upload with: wandb sync demo/tracking/wandb"
    assert died in {
        "tracker wandb: ConnectionResetError: Connection lost; training goes on without it",
        "tracker wandb: BrokenPipeError: [Errno 32] Broken pipe; training goes on without it",
    }
    assert (rest, done.stderr, done.returncode) == (["trained"], "", 0)


def test_wandb_online_without_a_key_does_not_ask_on_a_terminal(tmp_path):
    terminal, other_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "online", "1"], stdin=other_end, stdout=other_end, stderr=other_end, cwd=tmp_path
    )
    os.close(other_end)
    try:
        assert process.wait(timeout=60) == 0
        assert os.read(terminal, 10_000).decode().splitlines() == [
            "tracker wandb: no API key; run wandb login, set WANDB_API_KEY, or use wandb_mode=offline and wandb sync "
            "later; training goes on without it",
            "trained",
        ]
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


@pytest.fixture
def fake_wandb(monkeypatch):
    """A wandb whose server has the steps up to 3; returns what it was started with and what it received."""
    seen = types.SimpleNamespace(rows={}, settings=None, finish=lambda exit_code: None, torn_down=0, logged_in=True)

    class WandBTracker:
        def __init__(self, project, **settings):
            seen.settings = {"project": project, **settings}
            self.tracker = types.SimpleNamespace(
                starting_step=4,
                url="https://host/run",
                define_metric=lambda *a, **k: None,
                finish=seen.finish,
            )

        def start(self):
            pass

        def log(self, values, step, commit):
            assert commit
            seen.rows[step] = values

    def teardown():
        seen.torn_down += 1

    wandb = types.SimpleNamespace(
        __version__="0.30.0",
        Settings=dict,
        setup=lambda settings: vars(seen).update(setup=settings),
        login=lambda prompt, verify: not prompt and not verify,
        teardown=teardown,
    )
    monkeypatch.setattr("accelerate.tracking.WandBTracker", WandBTracker)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return seen


def test_wandb_online_gets_no_step_twice(folder, fake_wandb):
    assert track(TrackingSettings(("wandb",)), folder, range(2, 6), first_step=1) == ["tracker wandb: https://host/run"]
    assert fake_wandb.rows == {n: {"proxy/loss": 1 / n, "proxy/step": n} for n in (4, 5)}
    assert fake_wandb.torn_down == 1


def test_wandb_is_asked_to_keep_to_itself(folder, fake_wandb):
    settings = TrackingSettings(("wandb",), project="mine", run_name="x" * 200)
    track(settings, folder, [4])
    assert fake_wandb.setup == {"silent": True}
    given = fake_wandb.settings
    assert given.pop("id") == json.loads((folder / "proxy.json").read_text())["wandb_run_id"]
    assert given.pop("settings") == {
        "silent": True,
        "console": "off",
        "disable_code": True,
        "disable_git": True,
        "stop_on_fatal_error": False,
        "init_timeout": 30,
        "finish_timeout": 45,
        "finish_timeout_raises": True,
    }
    assert given == {
        "project": "mine",
        "resume": "allow",
        "reinit": "create_new",
        "dir": str(folder),
        "mode": "online",
        "name": "x" * 100 + "-proxy",
        "group": "x" * 100,
        "job_type": "proxy",
        "config": CONFIG,
        "allow_val_change": True,
        "save_code": False,
    }


def test_a_service_of_the_user_is_left_alone(folder, fake_wandb, monkeypatch):
    monkeypatch.setenv("WANDB_SERVICE", "theirs")
    track(TrackingSettings(("wandb",)), folder, [4])
    assert (fake_wandb.rows, fake_wandb.torn_down) == ({4: {"proxy/loss": 0.25, "proxy/step": 4}}, 0)


def test_an_unfinished_upload_says_how_to_finish_it(folder, fake_wandb):
    def finish(exit_code):
        raise TimeoutError

    fake_wandb.finish = finish
    _, line = track(TrackingSettings(("wandb",)), folder, [4])
    assert line == (
        "tracker wandb: the upload did not finish in 45 s; finish it with: wandb sync --include-online "
        f"{folder / 'wandb'}; training goes on without it"
    )
    assert fake_wandb.torn_down >= 1


def test_each_attempt_of_each_stage_has_its_own_id(folder, fake_wandb):
    def run_id(stage, first_step):
        track(OFFLINE, folder, [first_step + 1], stage=stage, first_step=first_step)
        return fake_wandb.settings["id"]

    first = run_id("proxy", 0)
    assert run_id("proxy", 5) == first
    assert run_id("reference", 0) != first
    again = run_id("proxy", 0)
    assert again != first
    assert run_id("proxy", 5) == again
    (folder / "proxy.json").write_text("[not json")
    assert run_id("proxy", 5) not in {first, again}
    assert run_id("proxy", 6) == run_id("proxy", 7)


# What goes wrong


@pytest.mark.parametrize(
    ("at", "rows", "calls"),
    [
        ("open", [], ["open", "close"]),
        ("log", [], ["open", "log", "close"]),
        ("close", [1, 2, 3], ["open", "log", "log", "log", "close", "close"]),
    ],
)
def test_a_failing_tracker_is_given_up_and_the_others_go_on(folder, fake, at, rows, calls):
    backend = fake(at=at, error=OSError("the wall\nfell down"))
    lines = track(TrackingSettings(("wandb", "tensorboard")), folder, [1, 2, 3])
    expected = ["tracker wandb: OSError: the wall; training goes on without it"]
    if at != "open":
        expected.insert(0, "tracker wandb: is open")
    assert [line for line in lines if "wandb" in line] == expected
    assert len(lines) == len(expected) + 1
    assert (list(backend.rows), [call[0] for call in backend.calls]) == (rows, calls)
    assert read_events(folder)[1] == 3


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(), "RuntimeError"),
        (SystemExit(3), "SystemExit: 3"),
        (ValueError(" two words. \n"), "ValueError: two words"),
    ],
)
def test_the_reason_is_one_line(folder, fake, error, reason):
    fake(at="open", error=error)
    assert track(OFFLINE, folder, [1]) == [f"tracker wandb: {reason}; training goes on without it"]


def test_a_failure_is_told_while_training_goes_on(folder, fake):
    fake(at="open", error=OSError("no"))
    lines = []
    with open_trackers(OFFLINE, folder, "proxy", CONFIG, 0, lines.append) as trackers:
        deadline = time.monotonic() + 10
        while not lines and time.monotonic() < deadline:
            trackers.log({"loss": 1.0}, 1)
            time.sleep(0.01)
        assert lines == ["tracker wandb: OSError: no; training goes on without it"]
    assert len(lines) == 1


def test_a_tracker_that_blocks_holds_nothing_up(folder, fake, monkeypatch):
    backend = fake()
    never, entered = threading.Event(), threading.Event()

    def log(values, step):
        entered.set()
        never.wait()

    backend.log = log
    monkeypatch.setattr(tracking, "MOST_WAITING", 3)
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.2)
    lines = []
    start = time.monotonic()
    with open_trackers(OFFLINE, folder, "proxy", CONFIG, 0, lines.append) as trackers:
        trackers.log({"loss": 1.0}, 1)
        assert entered.wait(10)
        for step in range(2, 1000):
            trackers.log({"loss": 1.0}, step)
    assert time.monotonic() - start < 5
    # Threads that are no daemons would keep the process from ending.
    assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("tracker-"))
    assert lines == [
        "tracker wandb: is open",
        "tracker wandb: is 3 steps behind; training goes on, and steps are left out until it catches up",
        "tracker wandb: did not finish in time; training goes on without it",
    ]
    assert backend.calls == [("open",), ("abandon",)]
    never.set()


def test_a_tracker_that_failed_is_told_of_once(folder, fake, monkeypatch):
    backend = fake(at="log", error=OSError("no"))
    never = threading.Event()
    backend.close = lambda exit_code: never.wait()
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.2)
    assert track(OFFLINE, folder, [1, 2]) == [
        "tracker wandb: is open",
        "tracker wandb: OSError: no; training goes on without it",
    ]
    assert backend.calls[-1] == ("abandon",)
    never.set()


def test_values_are_those_of_the_call(folder, fake):
    backend = fake()
    with open_trackers(OFFLINE, folder, "proxy", CONFIG, 0, lambda line: None) as trackers:
        values = {"loss": 1.0}
        for step in range(1, 200):
            values["loss"] = float(step)
            trackers.log(values, step)
        trackers.log(values, step)
        values["loss"] = 0.0
    assert backend.rows == {step: {"loss": float(step)} for step in range(1, 200)}


@pytest.mark.parametrize(("error", "exit_code"), [(None, 0), (KeyboardInterrupt, 255), (ValueError, 1)])
def test_the_end_of_the_stage_closes_trackers_and_passes_on(folder, fake, error, exit_code):
    backend = fake()

    def stage():
        with open_trackers(OFFLINE, folder, "proxy", CONFIG, 0, lambda line: None) as trackers:
            trackers.log({"loss": 1.0}, 1)
            if error is not None:
                raise error

    if error is None:
        stage()
    else:
        with pytest.raises(error):
            stage()
    assert backend.rows == {1: {"loss": 1.0}}
    assert backend.calls[-1] == ("close", exit_code)


def test_a_second_interrupt_does_not_wait(folder, fake, monkeypatch):
    backend = fake()
    opened, never = threading.Event(), threading.Event()
    backend.log = lambda values, step: opened.set()
    backend.close = lambda exit_code: never.wait()

    def interrupted(lane, deadline):
        raise KeyboardInterrupt

    lines = []

    def stage():
        with open_trackers(OFFLINE, folder, "proxy", CONFIG, 0, lines.append) as trackers:
            trackers.log({"loss": 1.0}, 1)
            assert opened.wait(10)
            monkeypatch.setattr(tracking._Lane, "join", interrupted)

    with pytest.raises(KeyboardInterrupt):
        stage()
    assert lines == ["tracker wandb: is open", "tracker wandb: did not finish in time; training goes on without it"]
    assert backend.calls == [("open",), ("abandon",)]
    never.set()


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_says_what_to_install(folder, monkeypatch, name):
    settings = TrackingSettings((name,), wandb_mode="offline")
    expected = [
        f"tracker {name}: the package {name} is missing; install it with: pip install 'doremi-mix[{name}]'; "
        "training goes on without it"
    ]
    monkeypatch.setitem(sys.modules, name, None)
    assert track(settings, folder, [1]) == expected
    # A folder of that name, which Python imports as an empty package.
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    assert track(settings, folder, [1]) == expected


def test_an_old_wandb_is_refused(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(__version__="0.28.2"))
    assert track(OFFLINE, folder, [1]) == [
        "tracker wandb: wandb 0.28.2 is older than 0.30; install it with: pip install 'doremi-mix[wandb]'; "
        "training goes on without it"
    ]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "demo").write_text("a file")
    lines = track(TENSORBOARD, tmp_path / "demo" / "tracking", [1])
    where = tmp_path / "demo" / "tracking" / "tensorboard"
    assert lines == [
        f"tracker tensorboard: NotADirectoryError: [Errno 20] Not a directory: '{where}'; training goes on without it"
    ]
