#!/usr/bin/env bash
# Teaches two small towers to read, from random weights, with the lessons of data/draw_lessons.py:
#
#   bash data/tiny/pretrain.sh
#
# makes output/pretrain/towers/language_model and .../vision_tower. Run it again after an interruption: finished stages
# are skipped, a broken one goes on from its newest checkpoint. WORK_DIR=… puts everything elsewhere; VENV as in run.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
WORK_DIR=${WORK_DIR:-output/pretrain}
export VENV=${VENV:-.venv}

source meme_llava/environment.sh
activate_environment requirements.txt data/requirements.txt
# Two processes of one thread each are faster on two cores than one process of two threads.
export OMP_NUM_THREADS=1
processes=2

# draw_lessons NAME SEED FLAGS…: into $WORK_DIR/NAME/lessons, whole or not at all.
draw_lessons() {
    local folder=$WORK_DIR/$1/lessons seed=$2
    shift 2
    [[ ! -d $folder ]] || return 0
    rm -rf "$folder.partial"
    python data/draw_lessons.py --output_dir "$folder.partial" --seed "$seed" --processes "$processes" "$@"
    mv "$folder.partial" "$folder"
}

# teach NAME BASE SEED FLAGS…: train the model in BASE once on those lessons; the outcome is $WORK_DIR/NAME/merged.
teach() {
    local name=$1 base=$2 seed=$3
    shift 3
    draw_lessons "$name" "$seed" "$@"
    BASE_DIR=$base OUTPUT_DIR=$WORK_DIR/$name ANNOTATIONS=$WORK_DIR/$name/lessons/annotations.json \
        IMAGE_FOLDER=$WORK_DIR/$name/lessons TRAIN_TYPE=full EPOCHS=1 HIGH_LR=7e-4 LOW_LR=7e-4 WARMUP_RATIO=0.05 \
        GLOBAL_BATCH=16 DEVICE_BATCH=8 GPUS=cpu:$processes bash run.sh train merge --precision bf16 \
        --save_steps 250 --allow loop duplicate_caption
}

# Copying comes first, by itself: a language model that can say again what stands at a place has only seeing left to
# learn. It learns that in minutes from short texts, but not from a mixture.
copies=(--copies 16000)
draw_lessons copies 1 "${copies[@]}"
[[ -d $WORK_DIR/start ]] ||
    python -m meme_llava.tiny_towers --alphabet "$WORK_DIR/copies/lessons/alphabet.txt" --output_dir "$WORK_DIR/start"
[[ -d $WORK_DIR/base ]] ||
    python build_base_model.py --language_model "$WORK_DIR/start/language_model" \
        --vision_model "$WORK_DIR/start/vision_tower" --output_dir "$WORK_DIR/base"
teach copies "$WORK_DIR/base" 1 "${copies[@]}"
# Then places: with so few different characters only the place tells which one to say. Without this stage twenty
# thousand pages of letters taught nothing; behind it their loss falls from the first thousand on.
teach places "$WORK_DIR/copies/merged" 2 --spelled_fields 5000
# Then letters, as many a picture as it holds, and here and there as in memes: letters known from full pages alone are
# not known elsewhere.
teach letters "$WORK_DIR/places/merged" 3 --spelled_texts 4000 --crowded_fields 20000 --scene_fields 22000 \
    --smallest 16 --largest 34 --plain 0.15
# Twice, because the rate falls to nothing before the first time has shown enough: a third of the letters were right
# then, seven in ten after the second.
teach more_letters "$WORK_DIR/letters/merged" 6 --spelled_texts 2000 --crowded_fields 18000 --scene_fields 22000 \
    --smallest 16 --largest 34 --plain 0.1
# Then reading in order, short texts first, and moods.
teach words "$WORK_DIR/more_letters/merged" 4 --scene_fields 4000 --scene_texts 7000 --most_letters 4 --groups 5000 \
    --smallest 16 --largest 34 --plain 0.1
teach memes "$WORK_DIR/words/merged" 5 --scene_fields 3000 --scene_texts 7000 --groups 4000 --memes 20000 \
    --smallest 16 --largest 34 --plain 0.1

[[ -d $WORK_DIR/towers ]] ||
    python -m meme_llava.split_towers --model "$WORK_DIR/memes/merged" --towers "$WORK_DIR/start" --output_dir "$WORK_DIR/towers"
