"""Fixtures of the checks by the real consumers (see checking.py), and the record of what they prove."""

import json
import os
from collections import defaultdict
from datetime import date
from pathlib import Path

import pytest

from .checking import Consumer, write_problem
from .environments import read_environments

# Drivers are run by the programs' own Python.
collect_ignore_glob = ["drivers/*"]

ENVIRONMENTS = read_environments()
STRENGTH = ("parsed", "drawn")


@pytest.fixture
def problem(tmp_path):
    """Three domains of 1000, 300 and 50 rows whose examples differ in length by a factor of four.

    The file of beta has 12 rows more, which are not trained on: what programs take for its size is 312.
    """
    return write_problem(
        tmp_path / "rows",
        {"alpha": 0.2, "beta": 0.5, "gamma": 0.3},
        {"alpha": 1000, "beta": 300, "gamma": 50},
        {"alpha": 5, "beta": 10, "gamma": 20},
        rejected={"beta": 12},
    )


@pytest.fixture
def consumer(request, tmp_path):
    """The program of this test module: its global ``CONSUMER`` names the environment."""
    name = request.module.CONSUMER
    if not ENVIRONMENTS[name].is_built():
        pytest.skip(f"{name} has no environment of its own yet; run: bash scripts/check_consumers.sh {name}")
    folder = tmp_path / "consumer"
    folder.mkdir()
    return Consumer(ENVIRONMENTS[name], folder)


_found = defaultdict(lambda: defaultdict(list))
"""Of each format and kind of proof, whether each of its checks passed, with the consumer's name."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Notes the outcome of every check that proves a format."""
    report = yield
    for marker in item.iter_markers("proves"):
        if report.when == "call" or report.failed:
            for name in marker.args:
                _found[name][marker.kwargs["how"]].append((report.passed, item.module.CONSUMER))
    return report


def pytest_sessionfinish(session):
    """Adds what was proven to the file that ``DOREMI_MIX_PROOFS`` names, and takes out what failed."""
    target = os.environ.get("DOREMI_MIX_PROOFS")
    if not target:
        return
    path = Path(target)
    proofs = json.loads(path.read_text(encoding="utf-8"))
    for name, by_kind in _found.items():
        outcomes = [outcome for kind in by_kind.values() for outcome in kind]
        if not all(passed for passed, _ in outcomes):
            proofs.pop(name, None)
            continue
        strongest = max(by_kind, key=STRENGTH.index)
        environment = ENVIRONMENTS[by_kind[strongest][0][1]]
        proofs[name] = {
            "consumer": environment.distribution,
            "version": environment.version,
            "proof": strongest,
            "date": date.today().isoformat(),
        }
    text = json.dumps(dict(sorted(proofs.items())), indent=2) + "\n"
    path.write_text(text, encoding="utf-8")
