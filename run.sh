#!/usr/bin/env bash
# Meme-LLaVA, from two towers to an answer about a meme.
#
#   bash run.sh                          every stage; what is finished is skipped, training resumes
#   bash run.sh train merge              only these stages
#   bash run.sh train --save_steps 100   flags after the stages go to train.py (train --help)
#   bash run.sh train --plan --accelerator a800-80gb    memory and time of the run; needs no GPU
#   LOW_LR=1e-5 OUTPUT_DIR=output_b bash run.sh      other settings for one run
#   PRESET=v2 bash run.sh                a published recipe of configs/presets
#   DRY_RUN=1 bash run.sh                print the commands, run nothing
#   bash run.sh --help                   all settings: also nodes, two stages, evaluation memes
#
# The defaults train two small towers on sample memes, on the CPU of a laptop, in a few minutes.
# "published" is the value of the published run on 8 x A800.
[ -n "${BASH_VERSION:-}" ] || { echo "error: this is not bash. Run: bash run.sh" >&2; exit 2; }
set -euo pipefail
caller=$PWD # relative paths of the user start there
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
source scripts/stages.sh # reads PRESET; has `stage` and `run_stages`

# --- models and data ---
# Folder, hub id or modelscope:ORG/MODEL; published: Qwen/Qwen2-7B-Instruct
LANGUAGE_MODEL=${LANGUAGE_MODEL:-data/tiny/language_model}
# Likewise; published: OFA-Sys/chinese-clip-vit-large-patch14-336px
VISION_MODEL=${VISION_MODEL:-data/tiny/vision_tower}
IMAGE_POLICY=${IMAGE_POLICY:-squash}       # squash, pad or crop to a square; published: squash
ANNOTATIONS=${ANNOTATIONS:-data/annotations.json}  # .json or .jsonl, format in data/README.md
IMAGE_FOLDER=${IMAGE_FOLDER:-data}         # the image paths of the records start here
OUTPUT_DIR=${OUTPUT_DIR:-output}           # one for every recipe that you compare

# --- recipe ---
TRAIN_TYPE=${TRAIN_TYPE:-lora}             # a file of configs/train; published: lora
EPOCHS=${EPOCHS:-3}                        # passes over the records; published: 5
HIGH_LR=${HIGH_LR:-2e-3}                   # peak rate of the projector; published: 1e-3
LOW_LR=${LOW_LR:-5e-4}                     # peak rate of all else that trains; published: 2e-5
WARMUP_RATIO=${WARMUP_RATIO:-0.1}          # share of steps with rising rates; published: 0.1
LORA_R=${LORA_R:-32}                       # rank; published: 32
LORA_ALPHA=${LORA_ALPHA:-64}               # LoRA is scaled by LORA_ALPHA / LORA_R; published: 64
MODEL_MAX_LENGTH=${MODEL_MAX_LENGTH:-512}  # positions a record, image tokens too; published: 2048
GLOBAL_BATCH=${GLOBAL_BATCH:-8}            # records per step, over all GPUs; published: 64

# --- accelerators ---
GPUS=${GPUS:-auto}                         # auto, 8, 0,3 (these two), cpu or cpu:2; published: 8
DEVICE_BATCH=${DEVICE_BATCH:-8}            # records a GPU computes at once, at most; published: 8
ENGINE=${ENGINE:-auto}                     # auto, single, ddp, zero2, fsdp2, …; published: zero2
source scripts/more_settings.sh            # BASE_DIR, EVAL_ANNOTATIONS, NNODES, VENV, …

# --- stages: all are checked before the first one runs ---
stage build python build_base_model.py \
    --language_model "$LANGUAGE_MODEL" --vision_model "$VISION_MODEL" \
    --image_policy "$IMAGE_POLICY" --output_dir "$BASE_DIR"

# Starts one process for each GPU, by meme_llava/distributed/launch.py.
stage train python train.py \
    --model "$BASE_DIR" --annotations "$ANNOTATIONS" --image_folder "$IMAGE_FOLDER" \
    --output_dir "$OUTPUT_DIR/train" --train_type "$TRAIN_TYPE" --num_train_epochs "$EPOCHS" \
    --high_lr "$HIGH_LR" --low_lr "$LOW_LR" --warmup_ratio "$WARMUP_RATIO" \
    --lora_r "$LORA_R" --lora_alpha "$LORA_ALPHA" --model_max_length "$MODEL_MAX_LENGTH" \
    --global_batch_size "$GLOBAL_BATCH" --device_batch_size "$DEVICE_BATCH" --engine "$ENGINE"

stage merge python merge_lora.py --adapter "$OUTPUT_DIR/train" --output_dir "$OUTPUT_DIR/merged"

# Without memes for the evaluation, it answers about those of ANNOTATIONS.
stage infer python infer.py --model "$OUTPUT_DIR/merged" \
    --annotations "$EVAL_ANNOTATIONS" --image_folder "$EVAL_IMAGE_FOLDER" --limit 20

stage evaluate python evaluate.py --model "$BASE_DIR" --output_dir "$OUTPUT_DIR/scores_before" \
    --annotations "$EVAL_ANNOTATIONS" --image_folder "$EVAL_IMAGE_FOLDER"
stage evaluate python evaluate.py --model "$OUTPUT_DIR/merged" --output_dir "$OUTPUT_DIR/scores" \
    --annotations "$EVAL_ANNOTATIONS" --image_folder "$EVAL_IMAGE_FOLDER" \
    --compare_with "$OUTPUT_DIR/scores_before"

stage report python report.py before="$OUTPUT_DIR/scores_before" after="$OUTPUT_DIR" \
    --output "$OUTPUT_DIR/report.html" --title "$OUTPUT_DIR"

run_stages "$@"
