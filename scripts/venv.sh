# Sourced by demo.sh and test.sh: makes .venv when it is not there, installs the project into it, and activates it.
# torch is named with its version, so that pip takes the CPU build and not gigabytes of CUDA packages.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python3}"
[ -d .venv ] || "$PYTHON" -m venv .venv
. .venv/bin/activate
python -c 'import torch' 2>/dev/null || pip install --quiet torch==2.13.0
