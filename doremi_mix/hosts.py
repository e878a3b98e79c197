"""How machines that share a folder, and nothing else, come to work on one job.

Host 0, which runs the filter, writes down which job there is, and writes it again every few seconds with a higher
number, the beat, for as long as it waits.  The others watch that file.  A host 0 that was killed leaves a file whose
beat stands still, and nobody works for it.  Nobody compares clocks.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from doremi_mix import __version__
from doremi_mix.atomic import write_json
from doremi_mix.errors import ConfigError
from doremi_mix.row_jobs import JOB_FILE

CALL_FILE = ".hosts.json"
BEAT_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Call:
    """What host 0 wants done.

    Attributes:
        id: of this call; a job that is called for again has another.
        folder: the job's, beside the file of the call.
        digest: of the job, so that nobody works from an earlier one of the same folder that a network file system
            remembers.
        num_hosts: how many machines share the job.
        workers: on each of them.
        version: of this package on host 0.
    """

    id: str
    folder: str
    digest: str
    num_hosts: int
    workers: int
    version: str = __version__

    def check(self, host: int) -> None:
        """Raises ConfigError when this machine cannot be ``host`` of the call."""
        if host >= self.num_hosts:
            raise ConfigError(
                f"--host {host}: the filter shares its work among {self.num_hosts} machines (filter.num_hosts), which "
                f"are 0 to {self.num_hosts - 1}; raise it there, or take a smaller number here"
            )
        if self.version != __version__:
            raise ConfigError(
                f"doremi-mix is {__version__} here and {self.version} on host 0; install the same version on both"
            )


@contextlib.contextmanager
def announce(path: Path, call: Call) -> Iterator[None]:
    """Calls for work on a job until the block ends.

    Args:
        path: the file of the call.
        call: what is to be done.
    """
    over = threading.Event()
    write_json(path, {**asdict(call), "beat": 0})

    def beat() -> None:
        for number in itertools.count(1):
            if over.wait(BEAT_SECONDS):
                return
            with contextlib.suppress(OSError):  # a disk that is full now may not be at the next beat
                write_json(path, {**asdict(call), "beat": number})

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield
    finally:
        over.set()
        heart.join()
        path.unlink(missing_ok=True)


class Watch:
    """Looks at the file of calls again and again, and believes what changes under its eyes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._looked = False
        self._heard: tuple[str, int] | None = None
        self._heard_at = time.monotonic()
        self._living = ""

    def look(self) -> Call | None:
        """Returns the call of a host 0 that lives, or was heard to live during this call."""
        heard: tuple[str, int] | None = None
        call: Call | None = None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none, or of another version
            data = json.loads(self.path.read_text(encoding="utf-8"))
            beat = data.pop("beat")
            call = Call(**data)
            heard = (call.id, beat)
        if heard != self._heard:
            self._heard_at = time.monotonic()
            if self._looked and heard is not None:
                self._living = heard[0]
        self._looked, self._heard = True, heard
        return call if call is not None and call.id == self._living else None

    @property
    def silent_seconds(self) -> float:
        """For how long nothing has changed."""
        return time.monotonic() - self._heard_at


def digest_of(folder: Path) -> str | None:
    """Returns what tells a job from another in the same folder; None where there is none."""
    try:
        return hashlib.sha256((folder / JOB_FILE).read_bytes()).hexdigest()
    except OSError:
        return None
