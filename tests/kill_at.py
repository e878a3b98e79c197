"""Runs doremi-mix and sends its own process a signal at the nth call of a function.

Usage: kill_at.py SIGNAL MODULE:FUNCTION N [MODULE:NAME=VALUE ...] -- DOREMI_MIX_ARGUMENTS
"""

import importlib
import os
import signal
import sys

from doremi_mix.cli import app


def main():
    split = sys.argv.index("--")
    signal_name, target, count, *patches = sys.argv[1:split]
    for patch in patches:
        place, _, value = patch.partition("=")
        module_name, _, name = place.partition(":")
        setattr(importlib.import_module(module_name), name, int(value))
    module_name, _, name = target.partition(":")
    module = importlib.import_module(module_name)
    original = getattr(module, name)
    calls = 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == int(count):
            os.kill(os.getpid(), signal.Signals[signal_name])
        return original(*args, **kwargs)

    setattr(module, name, counted)
    app(sys.argv[split + 1 :])


if __name__ == "__main__":
    main()
