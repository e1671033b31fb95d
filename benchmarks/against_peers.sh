#!/usr/bin/env bash
# A training step beside LLaMA-Factory's and TRL's, each in an environment of its own, on a CPU:
#
#   bash benchmarks/against_peers.sh --work_dir DIR [flags of against_peers.py]
#
# The environments take about 12 GB of disk in DIR and are kept; a round takes about 17 minutes on 2 cores, and
# wants the machine to itself. It is run by the environment that is active.
set -euo pipefail
[[ ${1:-} == --work_dir && -n ${2:-} ]] ||
    { echo "error: give --work_dir DIR first, a folder for environments and runs" >&2 && exit 2; }
work_dir=$2
shift 2
here=$(dirname "$(readlink -f "$0")")

make_environment() { # folder, packages …
    [[ -e $1/ready ]] && return
    rm -rf "$1" # half of one, of a call that was ended
    if command -v uv > /dev/null; then # pip may look for LLaMA-Factory's versions for a quarter of an hour
        uv venv --quiet "$1"
        uv pip install --quiet --python "$1/bin/python" "${@:2}"
    else
        python -m venv "$1"
        "$1/bin/pip" install --quiet "${@:2}"
    fi
    touch "$1/ready"
}

mkdir -p "$work_dir"
make_environment "$work_dir/llamafactory" "llamafactory==0.9.5"
make_environment "$work_dir/trl" "torch==2.13.0" "trl==1.16.*" peft pillow
exec python "$here/against_peers.py" --work_dir "$work_dir/runs" \
    --llamafactory "$work_dir/llamafactory/bin/python" --trl "$work_dir/trl/bin/python" "$@"
