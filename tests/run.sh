#!/usr/bin/env bash
# Lint and tests, in their own environment:  bash tests/run.sh [--all] [pytest arguments]
# --all takes every engine, every fault and fifty random kills, too; that is an hour more.
[ -n "${BASH_VERSION:-}" ] || { echo "error: this is not bash. Run: bash tests/run.sh" >&2; exit 2; }
set -euo pipefail
unset PYTHONSAFEPATH # with it Python would not find our modules in this folder
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
activate_environment requirements.txt data/requirements.txt configs/requirements/*.txt tests/requirements.txt
export DS_ACCELERATOR=cpu GOMP_SPINCOUNT=1000

ruff check .
ruff format --check .
lint-imports
if [[ "${1:-}" == --all ]]; then
    shift
    set -- -m "long or not long" "$@"
fi
# Three tests at once, of different files; torch computes each on one core, and some tests wait for processes.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} python -m pytest --numprocesses 3 --dist loadfile "$@"
