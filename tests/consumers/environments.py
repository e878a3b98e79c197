"""The environments of the consumers: built on demand, one folder each, never inside the project's own.

    python tests/consumers/environments.py NAME...      builds what is missing, and says what it does
    python tests/consumers/environments.py --names      lists them

They lie under ``.consumers/`` of the checkout, or under ``DOREMI_MIX_CONSUMERS``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TABLE = HERE / "environments.toml"
ROOT = Path(os.environ.get("DOREMI_MIX_CONSUMERS", HERE.parents[1] / ".consumers"))
DONE = "built.toml"


@dataclass(frozen=True)
class Environment:
    """One row of ``environments.toml``."""

    name: str
    tier: int
    distribution: str
    packages: tuple[str, ...] = ()
    no_deps: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    ignore_python: bool = False

    @property
    def folder(self) -> Path:
        return ROOT / self.name

    @property
    def python(self) -> Path:
        """The interpreter that has the consumer's code."""
        return Path(sys.executable) if self.tier == 1 else self.folder / "bin" / "python"

    @property
    def recipe(self) -> str:
        """What it was built from; another text means that it must be built again."""
        return repr((self.packages, self.no_deps, self.remove, self.ignore_python))

    @property
    def version(self) -> str:
        """The version of the consumer that is installed."""
        code = f"import importlib.metadata as m; print(m.version({self.distribution!r}))"
        return subprocess.run([str(self.python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()

    def is_built(self) -> bool:
        if self.tier == 1:
            return True
        done = self.folder / DONE
        return done.exists() and done.read_text(encoding="utf-8") == self.recipe


def read_environments() -> dict[str, Environment]:
    """Returns the table, by the consumer's name."""
    rows: dict[str, dict[str, Any]] = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return {
        name: Environment(name, **{key: tuple(v) if isinstance(v, list) else v for key, v in row.items()})
        for name, row in rows.items()
    }


def build(environment: Environment) -> None:
    """Builds an environment that is not there yet; a half-built one is built again.

    Raises:
        subprocess.CalledProcessError: pip could not install something; its own output says what.
    """
    if environment.is_built():
        return
    if environment.folder.exists():
        shutil.rmtree(environment.folder)
    venv.create(environment.folder, with_pip=True)
    pip = [str(environment.python), "-m", "pip"]
    install = [*pip, "install", "--quiet", "--no-warn-conflicts"]
    if environment.packages:
        subprocess.run([*install, *environment.packages], check=True)
    if environment.no_deps:
        anywhere = ["--ignore-requires-python"] if environment.ignore_python else []
        subprocess.run([*install, "--no-deps", *anywhere, *environment.no_deps], check=True)
    if environment.remove:
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *environment.remove], check=True)
    (environment.folder / DONE).write_text(environment.recipe, encoding="utf-8")


def main(names: list[str]) -> int:
    """Builds the named environments (all of tier 2 without a name); returns how many could not be built."""
    known = read_environments()
    if names == ["--names"]:
        print("\n".join(known))
        return 0
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"error: no consumer {unknown[0]!r}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    failed = 0
    for environment in [known[name] for name in names] or [e for e in known.values() if e.tier == 2]:
        state = "is there" if environment.is_built() else f"is built in {environment.folder} (minutes)"
        print(f"environment {environment.name}: {state}", flush=True)
        try:
            build(environment)
        except subprocess.CalledProcessError as error:
            failed += 1
            print(f"environment {environment.name}: cannot be built ({error})", file=sys.stderr, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
