"""Experiment trackers: wandb and tensorboard through accelerate, beside the stage's own log.

A tracker is a guest in the training loop.  Each one lives in a thread of its own that opens it, hands it the values and
closes it, because every one of these calls can block without end: wandb's ``log`` waits for a socket to its service
process, opening it and closing it wait for a server, and tensorboard waits for the disk after each step.  Training only
puts values into a bounded queue.  Whatever goes wrong in such a thread is told in one line, and that tracker alone is
given up; the stage's log on disk has every value in any case.

A resumed stage goes on with its own run.  The steps after the last checkpoint are trained, and logged, a second time:

- tensorboard writes into the same folder and hides the earlier values from the first repeated step on
  (``purge_step``).
- wandb online knows which steps the server has; those are not sent again.  An exact resume would only repeat them.
- wandb offline cannot know how much of a killed process's file is readable, so it logs them again.  ``wandb sync``
  sends the files of one run in order of their start and numbers repeated rows anew, so every chart is drawn over the
  stage's own ``<stage>/step`` and not over wandb's row number: a repeated step falls on the same place.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal, Protocol

TrackerName = Literal["wandb", "tensorboard"]

MOST_WAITING = 5_000
"""Steps that may wait for a tracker: a slow start loses nothing, and a stuck tracker does not fill the memory."""
OPEN_SECONDS = 30
"""How long wandb may wait for its server before it is given up."""
UPLOAD_SECONDS = 45
"""How long wandb may go on uploading when the stage is over."""
CLOSE_SECONDS = 60.0
"""How long the end of a stage waits for all trackers together."""
OLDEST_WANDB = "0.30"
"""The first whose ``wandb sync`` joins the files of a resumed offline run and whose login can be told not to ask."""


@dataclass(frozen=True, slots=True)
class TrackingSettings:
    """Which trackers a stage reports to.

    Attributes:
        trackers: their names; none by default.
        project: wandb's project.
        run_name: what the run is called; None takes the name of the run directory.  In wandb each stage is a run of its
            own, named ``<run_name>-<stage>``, of the job type ``<stage>`` in the group ``<run_name>``.
        wandb_mode: "online", or "offline" for files that ``wandb sync`` uploads later.
    """

    trackers: tuple[TrackerName, ...] = ()
    project: str = "doremi_mix"
    run_name: str | None = None
    wandb_mode: Literal["online", "offline"] = "online"


class Trackers:
    """The open trackers of one stage; without any, everything here does nothing."""

    def __init__(self, lanes: list[_Lane], say: Callable[[str], None]) -> None:
        self._lanes = lanes
        self._say = say

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Hands the values of one step to every tracker; returns at once and raises nothing of theirs.

        Args:
            values: by name without the stage; see ``flatten``.
            step: number of the step, from 1, as in the stage's own log.
        """
        for lane in self._lanes:
            lane.put(dict(values), step)
        self._tell()

    def close(self, exit_code: int = 0) -> None:
        """Lets every tracker write what is waiting, and ends it; waits for ``CLOSE_SECONDS`` at most.

        Args:
            exit_code: 0 when the stage finished, 255 when it was interrupted, 1 otherwise; wandb shows it.
        """
        deadline = time.monotonic() + CLOSE_SECONDS
        try:
            for lane in self._lanes:
                lane.end(exit_code)
            for lane in self._lanes:
                lane.join(deadline)
        finally:
            for lane in self._lanes:
                lane.abandon()
            self._tell()
            self._lanes = []

    def _tell(self) -> None:
        # Said from here and not from the threads: lines of training and of trackers come one after the other.
        for lane in self._lanes:
            for line in lane.pop_messages():
                self._say(f"tracker {lane.name}: {line}")


@contextmanager
def open_trackers(
    settings: TrackingSettings,
    folder: Path,
    stage: str,
    config: Mapping[str, Any],
    first_step: int,
    say: Callable[[str], None],
) -> Iterator[Trackers]:
    """Opens the trackers of a stage and closes them at the end, also when the stage fails or is interrupted.

    Opening happens in the background; values may be logged at once.  No trouble of a tracker gets out of here: it is
    told in one line, and the others and the stage go on.

    Args:
        settings: which trackers.
        folder: where their files go; made when needed.
        stage: the stage's name, the first part of every value's name.
        config: the stage's settings, as JSON can hold them, shown beside the values.
        first_step: index from 0 of the first step that this process trains, which is the number of steps in the
            checkpoint that it started from; 0 starts a new wandb run, anything else goes on with the stage's last one.
        say: prints one line; called from the caller's thread only.

    Yields:
        The trackers.
    """
    lanes = []
    if settings.trackers:
        import torch
        from accelerate import PartialState

        # accelerate's trackers ask it which process this is; in training it has long been made.
        PartialState(cpu=not torch.cuda.is_available())
        plan = _Plan(settings, folder, stage, config, first_step)
        lanes = [_Lane(name, _BACKENDS[name](plan)) for name in dict.fromkeys(settings.trackers)]
    trackers = Trackers(lanes, say)
    exit_code = 1
    try:
        yield trackers
        exit_code = 0
    except KeyboardInterrupt:
        exit_code = 255  # what wandb's own hooks report for Ctrl-C
        raise
    finally:
        trackers.close(exit_code)


def flatten(record: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a log's record by name, those of one domain as ``<name>/<domain>``.

    Different numbers always get different names, whatever characters a domain's name holds.

    Args:
        record: numbers, and numbers by domain; ``step`` is left out.

    Example:
        >>> flatten({"step": 3, "loss": 2.5, "domain_weights": {"en/wiki": 0.75, "水": 0.25}})
        {'loss': 2.5, 'domain_weights/en/wiki': 0.75, 'domain_weights/水': 0.25}
    """
    values: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            values |= {f"{name}/{domain}": float(number) for domain, number in value.items()}
        elif name != "step":
            values[name] = float(value)
    return values


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a tracker is opened with."""

    settings: TrackingSettings
    folder: Path
    stage: str
    config: Mapping[str, Any]
    first_step: int

    def named(self, values: Mapping[str, float]) -> dict[str, float]:
        return {f"{self.stage}/{name}": value for name, value in values.items()}


class _TrackerError(Exception):
    """Why a tracker cannot be used, in words for the user."""


class _Backend(Protocol):
    """One kind of tracker.  Any method may raise anything or never return."""

    def open(self) -> str:
        """Starts it; returns where to look."""
        ...

    def log(self, values: dict[str, float], step: int) -> None:
        """Writes the values of one step."""
        ...

    def close(self, exit_code: int) -> None:
        """Writes everything and ends it, also when it did not open or no longer works."""
        ...

    def abandon(self) -> None:
        """Lets go of what would keep this process from ending."""
        ...


class _Lane:
    """A tracker in its own thread, and the queue that leads there."""

    def __init__(self, name: str, backend: _Backend) -> None:
        self.name = name
        self._backend = backend
        self._queue: SimpleQueue[tuple[dict[str, float], int] | None] = SimpleQueue()
        self._messages: SimpleQueue[str] = SimpleQueue()
        self._broken = self._told_of_jam = False
        self._exit_code = 0
        # A daemon, so that a call that never returns cannot keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, values: dict[str, float], step: int) -> None:
        """Queues the values of a step, or leaves them out when too many are waiting."""
        if self._broken:
            return
        if self._queue.qsize() < MOST_WAITING:
            self._queue.put((values, step))
        elif not self._told_of_jam:
            self._told_of_jam = True
            self._messages.put(
                f"is {MOST_WAITING:,} steps behind; training goes on, and steps are left out until it catches up"
            )

    def end(self, exit_code: int) -> None:
        """Asks the thread to close the tracker after what is queued."""
        self._exit_code = exit_code
        self._queue.put(None)

    def join(self, deadline: float) -> None:
        """Waits for the thread until a time of the monotonic clock."""
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def abandon(self) -> None:
        """Gives up a tracker that is still at work."""
        if not self._thread.is_alive():
            return
        self._give_up("did not finish in time")
        # This can block just as well; half a second is enough for what must happen before the process ends.
        rescue = threading.Thread(target=self._abandon_quietly, name=f"tracker-{self.name}-end", daemon=True)
        rescue.start()
        rescue.join(0.5)

    def pop_messages(self) -> list[str]:
        """Returns what is to be told since the last call."""
        messages = []
        with suppress(Empty):
            while True:
                messages.append(self._messages.get_nowait())
        return messages

    def _work(self) -> None:
        # wandb ends some failures with sys.exit.
        try:
            self._messages.put(self._backend.open())
            while (item := self._queue.get()) is not None:
                self._backend.log(*item)
            self._backend.close(self._exit_code)
        except (Exception, SystemExit) as error:
            self._give_up(_reason(error))
            with suppress(Exception, SystemExit):
                self._backend.close(1)

    def _abandon_quietly(self) -> None:
        with suppress(Exception, SystemExit):
            self._backend.abandon()

    def _give_up(self, reason: str) -> None:
        if not self._broken:
            self._broken = True
            self._messages.put(f"{reason}; training goes on without it")


def _reason(error: BaseException) -> str:
    """Returns the first line of an error."""
    lines = str(error).strip().splitlines()
    first = lines[0].strip().rstrip(".") if lines else ""
    if isinstance(error, _TrackerError):
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


class _TensorBoard:
    """Event files in ``<folder>/tensorboard/<stage>``."""

    def __init__(self, plan: _Plan) -> None:
        self._plan = plan
        self._tracker: Any = None

    def open(self) -> str:
        _require("tensorboard")
        from accelerate.tracking import TensorBoardTracker

        plan = self._plan
        logs = plan.folder / "tensorboard"
        logs.mkdir(parents=True, exist_ok=True)
        tracker = TensorBoardTracker(plan.stage, str(logs), purge_step=plan.first_step + 1)
        tracker.start()
        self._tracker = tracker
        # As text: accelerate's store_init_configuration refuses None, lists and nested settings, and adds one more run
        # to tensorboard's list at each resume.
        lines = json.dumps(plan.config, indent=2, ensure_ascii=False).splitlines()
        tracker.log({f"{plan.stage}/config": "\n".join(f"    {line}" for line in lines)}, step=plan.first_step + 1)
        return f"tensorboard --logdir {logs}"

    def log(self, values: dict[str, float], step: int) -> None:
        self._tracker.log(self._plan.named(values), step=step)

    def close(self, exit_code: int) -> None:  # noqa: ARG002
        if self._tracker is not None:
            self._tracker.finish()

    def abandon(self) -> None:
        """Its threads are daemons."""


class _WandB:
    """A wandb run whose files are in ``<folder>/wandb`` and whose id is kept in ``<folder>/<stage>.json``."""

    def __init__(self, plan: _Plan) -> None:
        self._plan = plan
        self._run: Any = None
        self._tracker: Any = None
        self._first_new_step = 0
        # With a service process that was there before us, the user has wandb runs of their own in this program.
        self._owns_service = "WANDB_SERVICE" not in os.environ
        self._hooks = (sys.exit, sys.excepthook)

    def open(self) -> str:
        wandb = _require("wandb", OLDEST_WANDB)
        from accelerate.tracking import WandBTracker

        plan, settings = self._plan, self._plan.settings
        plan.folder.mkdir(parents=True, exist_ok=True)
        if self._owns_service:
            wandb.setup(wandb.Settings(silent=True))
        if settings.wandb_mode == "online" and not wandb.login(prompt=False, verify=False):
            raise _TrackerError(
                "no API key; run wandb login, set WANDB_API_KEY, or use wandb_mode=offline and wandb sync later"
            )
        run_name = (settings.run_name or plan.folder.absolute().parent.name)[:100]  # wandb takes 128 characters in all
        tracker = WandBTracker(
            settings.project,
            id=_run_id(plan.folder / f"{plan.stage}.json", new=plan.first_step == 0),
            resume="allow",
            # Never the user's own run, which wandb would otherwise return.
            reinit="create_new",
            dir=str(plan.folder),
            mode=settings.wandb_mode,
            name=f"{run_name}-{plan.stage}",
            group=run_name,
            job_type=plan.stage,
            # Not by accelerate's store_init_configuration, which writes to the program's global run.
            config=dict(plan.config),
            allow_val_change=True,
            save_code=False,
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                stop_on_fatal_error=False,
                init_timeout=OPEN_SECONDS,
                finish_timeout=UPLOAD_SECONDS,
                finish_timeout_raises=True,
            ),
        )
        tracker.start()
        self._tracker, run = tracker, tracker.tracker
        run.define_metric(f"{plan.stage}/step", hidden=True)
        run.define_metric(f"{plan.stage}/*", step_metric=f"{plan.stage}/step")
        self._first_new_step = run.starting_step
        if settings.wandb_mode == "offline":
            return f"offline; upload with: wandb sync {plan.folder / 'wandb'}"
        return str(run.url)

    def log(self, values: dict[str, float], step: int) -> None:
        if step >= self._first_new_step:
            row = {**self._plan.named(values), f"{self._plan.stage}/step": step}
            # Without commit, a row would be held back until the next one comes, and lost with a crash.
            self._tracker.log(row, step=step, commit=True)

    def close(self, exit_code: int) -> None:
        try:
            if self._tracker is not None:
                # accelerate's finish cannot tell wandb that the stage failed.
                self._tracker.tracker.finish(exit_code=exit_code)
        except TimeoutError:
            raise _TrackerError(
                f"the upload did not finish in {UPLOAD_SECONDS} s; finish it with: "
                f"wandb sync --include-online {self._plan.folder / 'wandb'}"
            ) from None
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Ends wandb's service, so that the next stage starts a healthy one and nothing waits for it at exit."""
        wandb = sys.modules.get("wandb")
        if not self._owns_service or wandb is None:
            return
        # Each service hooks itself into these once more, and tracebacks would be printed as often.
        if getattr(sys.excepthook, "__module__", "").startswith("wandb"):
            sys.exit, sys.excepthook = self._hooks
        wandb.teardown()


_BACKENDS: dict[str, Callable[[_Plan], _Backend]] = {"wandb": _WandB, "tensorboard": _TensorBoard}


def _require(package: TrackerName, oldest: str | None = None) -> Any:
    """Imports an optional package.

    Raises:
        _TrackerError: it is missing or too old.
    """
    import importlib

    from packaging.version import Version

    install = f"install it with: pip install 'doremi-mix[{package}]'"
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise _TrackerError(f"the package {error.name or package} is missing; {install}") from None
    # A folder of this name in the current directory, such as wandb's own files, imports as an empty package.
    version = getattr(module, "__version__", None)
    if version is None:
        raise _TrackerError(f"the package {package} is missing; {install}")
    if oldest is not None and Version(version) < Version(oldest):
        raise _TrackerError(f"{package} {version} is older than {oldest}; {install}")
    return module


def _run_id(path: Path, *, new: bool) -> str:
    """Returns the wandb id of this attempt of the stage: a new one, or the one that the file keeps."""
    if not new:
        with suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads(path.read_text(encoding="utf-8"))["wandb_run_id"])
    run_id = secrets.token_hex(6)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"wandb_run_id": run_id}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return run_id
