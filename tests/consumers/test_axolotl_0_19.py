"""Axolotl 0.19, the newest for Python 3.11, ignores weights: our file says so."""

from pathlib import Path

import pytest
import yaml

CONSUMER = "axolotl-0-19"

pytestmark = pytest.mark.consumers


def test_trap_old_versions_ignore_weights_without_a_word(consumer, problem):
    export, [file] = consumer.export("axolotl", problem.weights, budget=3000)
    parsed = consumer.ask("parse", file=file)
    written = yaml.safe_load(Path(file).read_text("utf-8"))["datasets"]
    assert all("weight" in entry for entry in written)
    assert [entry["path"] for entry in parsed] == [entry["path"] for entry in written]
    assert not any("weight" in entry for entry in parsed)
    warning = "Needs axolotl 0.20 or newer: older ones ignore weight without a word, and draw every entry whole."
    assert warning in export.notes
    assert f"# {warning}\n" in Path(file).read_text("utf-8")
