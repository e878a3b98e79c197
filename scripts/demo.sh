#!/usr/bin/env bash
# Makes a virtual environment, installs doremi-mix and runs the demo: 20 made-up domains, a known answer, a few minutes.
set -euo pipefail
echo "1/3 virtual environment and torch"
. "$(dirname "$0")/venv.sh"
echo "2/3 install doremi-mix"
pip install --quiet -e .
echo "3/3 doremi-mix demo"
doremi-mix demo --run-dir "${1:-runs/demo}"
