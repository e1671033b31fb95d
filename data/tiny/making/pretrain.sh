#!/usr/bin/env bash
# Teaches two small towers to read, from random weights, with the lessons of data/tiny/making/draw_lessons.py:
#
#   bash data/tiny/making/pretrain.sh
#
# makes language_model and vision_tower in output/pretrain/fluent/towers. Run it again after an interruption: finished
# stages are skipped, a broken one goes on from its newest checkpoint. WORK_DIR=… puts everything elsewhere; VENV as in
# run.sh.
set -euo pipefail
caller=$PWD # relative paths of the user start there
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../.."
for name in WORK_DIR VENV; do
    [[ ${!name:-} == @(|/*|active) ]] || printf -v "$name" %s "${caller%/}/${!name}"
done
WORK_DIR=${WORK_DIR:-output/pretrain}
export VENV=${VENV:-.venv}
unset PYTHONSAFEPATH # with it Python would not find our modules

source scripts/environment.sh
activate_environment requirements.txt data/requirements.txt
# Two processes of one thread each are faster on two cores than one process of two threads.
export OMP_NUM_THREADS=1
processes=2
precision=bf16  # on a CPU without AVX512_BF16 or AMX fp32 is many times faster

# draw_lessons NAME FLAGS…: into $WORK_DIR/NAME/lessons, whole or not at all.
draw_lessons() {
    local folder=$WORK_DIR/$1/lessons
    shift
    [[ ! -d $folder ]] || return 0
    rm -rf "$folder.partial"
    python data/tiny/making/draw_lessons.py --output_dir "$folder.partial" --processes "$processes" "$@"
    mv "$folder.partial" "$folder"
}

# teach NAME BASE HIGH_LR LOW_LR FLAGS…: train the model in BASE on the lessons of NAME, with these flags of train.py
# behind ours; the outcome is $WORK_DIR/NAME/merged. Before it may stand train_type=…, else full, batch=…, else 16,
# device_batch=…, else 8, and lessons=…, the stage whose lessons are taken instead.
teach() {
    local name=$1 base=$2 high_lr=$3 low_lr=$4
    local lessons=$WORK_DIR/${lessons:-$name}/lessons
    shift 4
    BASE_DIR=$base OUTPUT_DIR=$WORK_DIR/$name ANNOTATIONS=$lessons/annotations.json IMAGE_FOLDER=$lessons \
        EVAL_ANNOTATIONS=none TRAIN_TYPE=${train_type:-full} EPOCHS=1 HIGH_LR=$high_lr LOW_LR=$low_lr WARMUP_RATIO=0.05 \
        GLOBAL_BATCH=${batch:-16} DEVICE_BATCH=${device_batch:-8} GPUS=cpu:$processes \
        bash run.sh train merge --precision "$precision" --save_steps 250 --allow loop duplicate_caption "$@"
}

# make_towers NAME FLAGS…: random towers that know the characters of the lessons of NAME.
make_towers() {
    local name=$1
    shift
    [[ -d $WORK_DIR/$name/random ]] || python data/tiny/making/make_towers.py \
        --alphabet "$WORK_DIR/$name/lessons/alphabet.txt" --output_dir "$WORK_DIR/$name/random" "$@"
}

# build BASE LANGUAGE_MODEL VISION_TOWER SEED: a model of both with a fresh projector.
build() {
    [[ -d $1 ]] || python build_base_model.py --output_dir "$1" --language_model "$2" --vision_model "$3" --seed "$4"
}

# split_towers NAME RANDOM FLAGS…: the outcome of a stage as two folders in $WORK_DIR/NAME/towers.
split_towers() {
    local name=$1 random=$2
    shift 2
    [[ -d $WORK_DIR/$name/towers ]] || python data/tiny/making/split_towers.py \
        --model "$WORK_DIR/$name/merged" --towers "$random" --output_dir "$WORK_DIR/$name/towers" "$@"
}

# renew_projector NAME TOWERS PROJECTOR SEED: the towers of stage TOWERS, built in stage PROJECTOR with another projector
# that learns alone, then learn with it on the lessons of NAME.
renew_projector() {
    local name=$1 towers=$WORK_DIR/$2/towers projector=$3 seed=$4
    build "$WORK_DIR/$projector/base" "$towers/language_model" "$towers/vision_tower" "$seed"
    batch=32 train_type=projector lessons=again teach "$projector" "$WORK_DIR/$projector/base" 3e-3 3e-3
    batch=32 teach "$name" "$WORK_DIR/$projector/merged" 5e-4 2.5e-4 --muon_lr 3e-3 --weight_decay 0.1
    split_towers "$name" "$WORK_DIR/copies/random"
}

# ---- The language model, without images ----
# Copying comes first, by itself: it is learned in minutes from short texts, but not from a mixture. Then the order of
# reading and the skipping of blanks, from spelled pages; behind places it is not learned at all. Then places, where with
# so few different letters only the place tells which one to say. More than a few marks of moods here, and no projector
# can be taught by it any more.
draw_lessons copies --seed 1 --copies 16000
draw_lessons order --seed 2 --spelled_texts 20000 --most_letters 100
draw_lessons places --seed 3 --spelled_fields 3500 --spelled_texts 4000 --spelled_moods 1500
make_towers copies
build "$WORK_DIR/copies/base" "$WORK_DIR/copies/random/language_model" "$WORK_DIR/copies/random/vision_tower" 0
teach copies "$WORK_DIR/copies/base" 7e-4 7e-4
teach order "$WORK_DIR/copies/merged" 7e-4 7e-4
teach places "$WORK_DIR/order/merged" 7e-4 7e-4
split_towers places "$WORK_DIR/copies/random"

# ---- The vision tower, under a language model that is thrown away ----
# It can only copy what stands at one place, so the tower has to recognise, and to gather a letter that lies in several
# patches. All letters are drawn by chance, so that nothing can be guessed. The projector stays as it was drawn (a rate
# of 1e-7): what a fresh one has to learn later, the tower does itself. What is easy comes first: letters that fill a
# patch each are learned from 2,000 pages; letters anywhere, by themselves, from none in 20,000.
draw_lessons copying --seed 5 --spelled_fields 4000
draw_lessons aligned --seed 6 --full_fields 4000 --plain 0.5
draw_lessons dense --seed 7 --words 0 --full_fields 500 --crowded_fields 9500 --smallest 15 --largest 18 --plain 0.3
draw_lessons letters --seed 8 --words 0 --full_fields 500 --crowded_fields 14500 --scene_fields 12000 \
    --group_fields 8000 --smallest 16 --largest 34 --plain 0.3
make_towers copying --copier
build "$WORK_DIR/copying/base" "$WORK_DIR/copying/random/language_model" "$WORK_DIR/copying/random/vision_tower" 0
teach copying "$WORK_DIR/copying/base" 2e-3 2e-3
muon=(--muon_lr 2e-2 --weight_decay 0.1)
teach aligned "$WORK_DIR/copying/merged" 1e-7 7e-4 "${muon[@]}"
teach dense "$WORK_DIR/aligned/merged" 1e-7 7e-4 "${muon[@]}"
batch=32 teach letters "$WORK_DIR/dense/merged" 1e-7 7e-4 "${muon[@]}"
# Muon leaves features many times larger than the language model's embeddings, behind which a fresh projector does not
# learn at all.
split_towers letters "$WORK_DIR/copying/random" --feature_scale 0.1

# ---- Both together ----
# First the projector alone, or its first steps would undo what the towers know. It is drawn by another seed than that
# of run.sh, which has to do with one that the towers have not met.
draw_lessons joining --seed 10 --full_fields 2400 --plain 0.5
draw_lessons joined --seed 12 --words 0 --smallest 15 --largest 34 --plain 0.2 --memes 3500 --scene_texts 9000 \
    --crowded_texts 3000 --groups 2000 --crowded_fields 14000 --scene_fields 9000 --group_fields 5000 \
    --spelled_texts 2000 --spelled_moods 700
build "$WORK_DIR/joining/base" "$WORK_DIR/places/towers/language_model" "$WORK_DIR/letters/towers/vision_tower" 100
train_type=projector teach joining "$WORK_DIR/joining/base" 3e-3 3e-3
batch=32 teach joined "$WORK_DIR/joining/merged" 1e-3 5e-4 --muon_lr 5e-3 --weight_decay 0.1

# The same with more figures. It ends with a tower that knows letters and the moods of figures where fields ask for them.
draw_lessons marked --seed 15 --words 0 --smallest 15 --largest 36 --plain 0.1 --memes 5000 --scene_texts 9000 \
    --crowded_texts 2000 --groups 7000 --crowded_fields 12000 --scene_fields 12000 --full_fields 1000 \
    --group_fields 8000 --spelled_texts 1500 --spelled_moods 4000
batch=32 teach marked "$WORK_DIR/joined/merged" 1e-3 5e-4 --muon_lr 5e-3 --weight_decay 0.1

# ---- Moods ----
# That the mood is asked for, the language model does not learn in a mixture: 16,000 shown moods in `marked` left it
# at chance. By itself, with a tower that knows them, and in small batches, it does in 500 steps.
draw_lessons noticed --seed 14 --words 0 --smallest 16 --largest 36 --plain 0.1 --tasks mood --memes 3000 \
    --scene_texts 1000 --groups 4000 --scene_fields 500 --group_fields 1500 --spelled_moods 500
train_type=freeze_vision batch=8 device_batch=4 teach noticed "$WORK_DIR/marked/merged" 1e-6 1e-3
split_towers noticed "$WORK_DIR/copies/random"

# ---- Everything, behind another projector ----
# Whoever uses the towers has a projector that has learned for minutes, not hours, so they end with such a one.
draw_lessons again --seed 20 --words 0 --smallest 15 --largest 36 --plain 0.2 --tasks text mood --memes 800 \
    --groups 1200 --full_fields 1000 --crowded_fields 600 --group_fields 600
draw_lessons whole --seed 19 --words 0 --smallest 15 --largest 36 --plain 0.1 --memes 2500 --scene_texts 3500 \
    --crowded_texts 600 --groups 2500 --crowded_fields 4000 --scene_fields 3500 --full_fields 200 \
    --group_fields 1500 --spelled_texts 500 --spelled_moods 200
build "$WORK_DIR/again/base" "$WORK_DIR/noticed/towers/language_model" "$WORK_DIR/noticed/towers/vision_tower" 200
batch=32 train_type=projector teach again "$WORK_DIR/again/base" 3e-3 3e-3
batch=32 teach whole "$WORK_DIR/again/merged" 1e-3 5e-4 --muon_lr 5e-3 --weight_decay 0.1
draw_lessons polished --seed 21 --words 0 --smallest 15 --largest 36 --plain 0.1 --memes 2000 --scene_texts 2800 \
    --crowded_texts 500 --groups 1300 --crowded_fields 2000 --scene_fields 2000 --full_fields 200 --group_fields 700 \
    --spelled_texts 400 --spelled_moods 100
batch=32 teach polished "$WORK_DIR/whole/merged" 5e-4 2.5e-4 --muon_lr 2e-3 --weight_decay 0.1

# ---- Words ----
# Of letters by chance hardly any stands twice in a row, and without these lessons 抱抱 never ends.
draw_lessons reading --seed 22 --words 0.6 --smallest 13 --largest 36 --plain 0.1 --memes 4000 --scene_texts 7000 \
    --crowded_texts 1000 --groups 1500 --crowded_fields 3000 --scene_fields 3500 --full_fields 200 --group_fields 800 \
    --spelled_texts 800 --spelled_moods 100
draw_lessons settled --seed 23 --words 0.5 --smallest 13 --largest 36 --plain 0.1 --tasks text mood --memes 7000 \
    --scene_texts 4000 --crowded_texts 600 --groups 2000 --crowded_fields 1500 --scene_fields 2000 --full_fields 200 \
    --group_fields 1000 --spelled_texts 500 --spelled_moods 100
batch=32 teach reading "$WORK_DIR/polished/merged" 5e-4 2.5e-4 --muon_lr 3e-3 --weight_decay 0.1
batch=32 teach settled "$WORK_DIR/reading/merged" 5e-4 2.5e-4 --muon_lr 2.5e-3 --weight_decay 0.1
split_towers settled "$WORK_DIR/copies/random"

# ---- Four times more behind another projector ----
# Each time, towers that have learned behind a young projector are read better through a fresh one.
draw_lessons repeated --seed 24 --words 0.3 --few 0.4 --share_patches --smallest 13 --largest 36 --plain 0.1 \
    --tasks text mood --memes 3000 --scene_texts 5500 --crowded_texts 500 --groups 800 --crowded_fields 800 \
    --scene_fields 1000 --full_fields 200 --group_fields 400 --spelled_texts 1200 --spelled_moods 100
renew_projector repeated settled young 300
mixture=(--words 0.3 --few 0.3 --share_patches --smallest 13 --largest 36 --plain 0.1 --tasks text mood --memes 6000
    --scene_texts 6000 --crowded_texts 800 --groups 1500 --crowded_fields 1500 --scene_fields 1500 --full_fields 200
    --group_fields 600 --spelled_texts 800 --spelled_moods 100)
draw_lessons firm --seed 25 "${mixture[@]}"
renew_projector firm repeated younger 400
draw_lessons proven --seed 26 "${mixture[@]}"
renew_projector proven firm newer 500
# The last of a flag counts.
draw_lessons fluent --seed 27 "${mixture[@]}" --words 0.4 --memes 9000 --crowded_texts 500 --spelled_texts 1500
renew_projector fluent proven fresher 600
