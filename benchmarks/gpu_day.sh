#!/usr/bin/env bash
# Everything that only a GPU can show, measured in one command: which kernels are right, how fast a step of the 7B model
# is beside the published way, what it holds in memory beside the plan, and whether train, resume, merge and infer work.
#
#   bash benchmarks/gpu_day.sh [--minutes 10] [--output DIR] [--scale full|tiny] [--only ROW …]
#
# Needs torch, transformers and peft (those of VENV, else the active python3), no network and no deepspeed. One GPU, or
# none with --scale tiny: a rehearsal. Full scale also takes 50 GB of disk (--work_dir) for the time being.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python3
[[ -z ${VENV:-} || ${VENV} == active ]] || python=$VENV/bin/python
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
exec "$python" benchmarks/gpu_day.py "$@"
