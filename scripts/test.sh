#!/usr/bin/env bash
# Makes a virtual environment, installs doremi-mix with its development tools, and runs lint, types and tests.
set -euo pipefail
echo "1/5 virtual environment and torch"
. "$(dirname "$0")/venv.sh"
echo "2/5 install doremi-mix and its development tools"
pip install --quiet -e '.[dev]'
echo "3/5 lint"
ruff check .
ruff format --check .
echo "4/5 types"
mypy
echo "5/5 tests"
python -m pytest -n 2 "$@"
