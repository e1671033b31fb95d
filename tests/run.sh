#!/usr/bin/env bash
# Lint and all tests, in their own environment:  bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source meme_llava/environment.sh
activate_environment requirements.txt data/requirements.txt tests/requirements.txt
export DS_ACCELERATOR=cpu GOMP_SPINCOUNT=1000

ruff check .
ruff format --check .
python -m pytest "$@"
