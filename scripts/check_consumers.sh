#!/usr/bin/env bash
# Proves the exports by the released code of the programs they are for, and writes down what was proven.
#
#   bash scripts/check_consumers.sh [NAME...]     names are those of tests/consumers/environments.toml; all without one
#
# Each program gets an environment of its own under .consumers/ (DOREMI_MIX_CONSUMERS): built once, 0.1 to 2 GB and
# minutes each.  The results go into doremi_mix/exporters/verified.json and from there into the README's table.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh
pip install --quiet -e ".[dev]"

names=("$@")
if [ ${#names[@]} -eq 0 ]; then
  mapfile -t names < <(python tests/consumers/environments.py --names)
fi
unproven=()
for name in "${names[@]}"; do
  echo "== $name"
  if ! python tests/consumers/environments.py "$name"; then
    unproven+=("$name (no environment)")
    continue
  fi
  # The checks of the normal suite and those of it that are not.
  DOREMI_MIX_PROOFS=doremi_mix/exporters/verified.json HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
    python -m pytest "tests/consumers/test_${name//-/_}.py" -q -n0 -m "not slow" \
    || unproven+=("$name (a check failed)")
done
python scripts/consumers_table.py
if [ ${#unproven[@]} -gt 0 ]; then
  printf 'not proven: %s\n' "${unproven[@]}"
  exit 1
fi
echo "all proven: ${names[*]}"
