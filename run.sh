#!/usr/bin/env bash
# Meme-LLaVA from two towers to an answer about a meme.
#
#   bash run.sh                      every stage: build, train, merge, infer, and evaluate if there is EVAL_ANNOTATIONS
#   bash run.sh train merge          only these; a finished stage is not done again
#   bash run.sh train --save_steps 100    flags behind the stages go to train.py
#   bash run.sh train --eval_every 50     evaluate while training, on EVAL_ANNOTATIONS
#   bash run.sh                      again, after an interruption: training goes on from its newest whole checkpoint
#   bash run.sh train --plan --accelerator a800-80gb    what the run would take, in memory and time; needs no GPU
#   DRY_RUN=1 bash run.sh            print the commands, run nothing
#
# Edit the values below, or set them for one run: LOW_LR=1e-5 OUTPUT_DIR=output_b bash run.sh
# As it stands it joins two small towers by a fresh projector and trains on 400 sample memes, on a laptop's CPU, in a few
# minutes.
# The value of the published 8 x A800 run stands behind "real run:".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
fail() { echo "error: $*" >&2; exit 2; }
source scripts/presets.sh

# --- preset ---
PRESET=${PRESET:-}                        # none, or a file of configs/presets, whose values come before those below: v1 | v2 | two_stages | openai_clip | chinese_clip_huge
[[ -z $PRESET ]] || read_preset "$PRESET"

# --- models and data ---
LANGUAGE_MODEL=${LANGUAGE_MODEL:-data/tiny/language_model}    # folder, hub id, modelscope:ORG/MODEL. real run: Qwen/Qwen2-7B-Instruct
VISION_MODEL=${VISION_MODEL:-data/tiny/vision_tower}    # likewise. real run: OFA-Sys/chinese-clip-vit-large-patch14-336px
IMAGE_POLICY=${IMAGE_POLICY:-squash}      # how images become square: squash | pad | crop (cuts words off wide memes). real run: squash
ANNOTATIONS=${ANNOTATIONS:-data/annotations.json}    # .json or .jsonl, format in data/README.md
IMAGE_FOLDER=${IMAGE_FOLDER:-data}        # the records' image paths start here
EVAL_ANNOTATIONS=${EVAL_ANNOTATIONS:-auto}    # memes not in ANNOTATIONS, on which base and merged model are compared | none | auto = those of data/unseen with the sample memes, else none
EVAL_IMAGE_FOLDER=${EVAL_IMAGE_FOLDER:-auto}    # their image paths start here; auto = data/unseen for its memes, else IMAGE_FOLDER
OUTPUT_DIR=${OUTPUT_DIR:-output}          # gets train and merged; another one for every recipe that you compare
BASE_DIR=${BASE_DIR:-$OUTPUT_DIR/base}    # the assembled base model; name it to share one between several OUTPUT_DIRs

# --- recipe ---
TRAIN_TYPE=${TRAIN_TYPE:-lora}            # lora | projector | freeze_vision | full (configs/train). real run: lora
EPOCHS=${EPOCHS:-3}                       # passes over the records. real run: 5
PROJECTOR_EPOCHS=${PROJECTOR_EPOCHS:-0}   # passes in which the projector learns alone before TRAIN_TYPE begins; 0 = one stage. real run: 0
PROJECTOR_LR=${PROJECTOR_LR:-1e-3}        # peak learning rate of those
HIGH_LR=${HIGH_LR:-2e-3}                  # peak learning rate of the projector. real run: 1e-3
LOW_LR=${LOW_LR:-5e-4}                    # peak learning rate of all else that learns; small towers need more. real run: 2e-5
WARMUP_RATIO=${WARMUP_RATIO:-0.1}         # share of the steps with rising learning rates. real run: 0.1
LORA_R=${LORA_R:-32}                      # rank. real run: 32
LORA_ALPHA=${LORA_ALPHA:-64}              # updates are scaled by LORA_ALPHA / LORA_R. real run: 64
MODEL_MAX_LENGTH=${MODEL_MAX_LENGTH:-512} # positions a record may take, image tokens counted. real run: 2048
GLOBAL_BATCH=${GLOBAL_BATCH:-8}           # records per optimizer step, over all GPUs and machines. real run: 64
DEVICE_BATCH=${DEVICE_BATCH:-8}           # records a GPU computes at once, at most; accumulation follows. real run: 8

# --- machine ---
GPUS=${GPUS:-auto}                        # auto = all there are | 8 = so many | 0,3 or 2, = these | cpu | cpu:2 = two CPU processes. real run: 8
ENGINE=${ENGINE:-auto}                    # auto | single | ddp | zero2 | zero3 | zero2_offload | zero3_offload | fsdp2. real run: zero2
NNODES=${NNODES:-1}                       # machines; run this script on each, NODE_RANK counting from 0; OUTPUT_DIR must be shared
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}     # address of machine 0 by which the others reach it
MASTER_PORT=${MASTER_PORT:-}              # a free port there; empty = any on one machine, 29500 with several
HOSTFILE=${HOSTFILE:-}                    # instead of NNODES to MASTER_ADDR: a file with a machine a line, this one first; needs ssh to the others
VENV=${VENV:-.venv}                       # Python environment, made on first use; active = the one already active

# ------------------------------------------------------------------------------------------------------------------
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || fail "this is bash $BASH_VERSION, expected 4.4 or newer"
source scripts/variables.sh
# shellcheck disable=SC2046
stop_at_misspelt_variables DRY_RUN $(sed -nE 's/^([A-Z_]+)=\$\{\1:-.*/\1/p' "${BASH_SOURCE[0]}")

: "${DRY_RUN:=0}"
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    sed -n '2,/^# -----/p' "${BASH_SOURCE[0]}" | sed '$d'
    exit
fi

# Which memes are kept for the evaluation, and where their images are.
eval_annotations=$EVAL_ANNOTATIONS eval_image_folder=$EVAL_IMAGE_FOLDER
if [[ $eval_annotations == auto ]]; then
    eval_annotations=none
    [[ ! $ANNOTATIONS -ef data/annotations.json ]] || eval_annotations=data/unseen/annotations.json
fi
if [[ $eval_image_folder == auto ]]; then
    eval_image_folder=$IMAGE_FOLDER
    [[ ! $eval_annotations -ef data/unseen/annotations.json ]] || eval_image_folder=data/unseen
fi

known_stages='build|train|merge|infer|evaluate'
stages=()
train_flags=()  # what train.py gets besides the variables
while (($#)); do
    case $1 in
        -*) train_flags=("$@"); break ;;
        *) [[ $1 =~ ^($known_stages)$ ]] || fail "unknown stage $1; expected ${known_stages//|/, }"
            stages+=("$1") ;;
    esac
    shift
done
if ((${#stages[@]} == 0)); then
    stages=(build train merge infer)
    [[ $eval_annotations == none ]] || stages+=(evaluate)
fi
word_before=
for word in "${train_flags[@]}"; do
    [[ ! $word =~ ^($known_stages)$ || $word_before == --* ]] || fail "$word stands behind the flags of train.py; put stages first"
    word_before=$word
done
# What is kept for the evaluation is evaluated while training, too, if that is asked for.
if [[ " ${train_flags[*]} " =~ " --eval"[_-]"every"[\ =] && ! " ${train_flags[*]} " =~ " --eval"[_-]"annotations"[\ =] && $eval_annotations != none ]]; then
    train_flags+=(--eval_annotations "$eval_annotations" --eval_image_folder "$eval_image_folder")
fi
if [[ $eval_annotations != none ]]; then
    [[ -f $eval_annotations ]] || fail "EVAL_ANNOTATIONS=$eval_annotations: no such file"
    [[ -d $eval_image_folder ]] || fail "EVAL_IMAGE_FOLDER=$eval_image_folder: no such folder"
    [[ ! $eval_annotations -ef $ANNOTATIONS ]] || fail "EVAL_ANNOTATIONS is ANNOTATIONS; what was trained on shows nothing about other memes"
elif [[ " ${stages[*]} " == *" evaluate "* ]]; then
    fail "evaluate needs EVAL_ANNOTATIONS, an annotation file of memes that are not trained on"
fi
[[ $IMAGE_POLICY =~ ^(squash|pad|crop)$ ]] || fail "IMAGE_POLICY is '$IMAGE_POLICY', expected squash, pad or crop"
# These look at the run and train nothing, so no GPU is needed and a finished run is not an obstacle.
looks_only=0
[[ ! " ${train_flags[*]} " =~ " --"(plan|show[_-]batch|help)" " ]] || looks_only=1
[[ $ENGINE == auto || $ENGINE == single || $ENGINE == ddp || -f configs/deepspeed/$ENGINE.json || -f configs/fsdp/$ENGINE.json ]] ||
    fail "ENGINE is '$ENGINE', expected auto, single, ddp or a file of configs/deepspeed or configs/fsdp: $(basename -s .json configs/{deepspeed,fsdp}/*.json | paste -sd ' ')"
[[ ! -e $OUTPUT_DIR || -d $OUTPUT_DIR ]] || fail "OUTPUT_DIR=$OUTPUT_DIR is a file, expected a folder"

source scripts/environment.sh
if [[ $DRY_RUN == 0 ]]; then
    activate_environment requirements.txt
    python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("transformers") is None)' ||
        fail "the active Python environment lacks our libraries: pip install -r requirements.txt"
fi

base_dir=$BASE_DIR
projector_dir=$OUTPUT_DIR/projector
train_dir=$OUTPUT_DIR/train
merged_dir=$OUTPUT_DIR/merged

# The machines of a hostfile: this one is the first, the others are reached by ssh.
hosts=()
if [[ -n $HOSTFILE ]]; then
    [[ -f $HOSTFILE ]] || fail "HOSTFILE=$HOSTFILE: no such file"
    mapfile -t hosts < <(sed -E 's/#.*//; s/^[[:space:]]+//' "$HOSTFILE" | awk 'NF {print $1}')
    ((${#hosts[@]})) || fail "HOSTFILE=$HOSTFILE names no machine"
    [[ $NNODES == 1 || $NNODES == "${#hosts[@]}" ]] || fail "NNODES=$NNODES, but HOSTFILE=$HOSTFILE names ${#hosts[@]} machines; leave NNODES out"
    NNODES=${#hosts[@]}
    [[ $MASTER_ADDR != 127.0.0.1 ]] || MASTER_ADDR=${hosts[0]}
fi

# How many processes a machine runs: one a GPU, or on the CPU one unless told otherwise.
on_gpu=1
case $GPUS in
    auto) processes=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true) ;;
    cpu) processes=0 ;;
    cpu:[1-9]) on_gpu=0 processes=${GPUS#cpu:} ;;
    *[!0-9,]* | ,* | *,,* | 0[0-9]* | '') fail "GPUS is '$GPUS', expected auto, a count, a list such as 0,3, cpu or cpu:2 (up to cpu:9)" ;;
    *,*) export CUDA_VISIBLE_DEVICES=${GPUS%,}
        processes=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | wc -l) ;;
    *) processes=$GPUS ;;
esac
for name in GLOBAL_BATCH DEVICE_BATCH NNODES; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "$name is '${!name}', expected a whole number above 0"
done
((processes > 0)) || on_gpu=0
if ((on_gpu)); then
    if [[ $DRY_RUN == 0 && $looks_only == 0 ]]; then
        found=$(python -c 'import torch; print(torch.cuda.device_count())')
        ((processes <= found)) || fail "GPUS=$GPUS asks for $processes GPUs, torch sees $found (CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-unset}); set GPUS=$( ((found)) && echo "$found" || echo cpu)"
    fi
    # A single process must see a single GPU, or torch splits its batches over all of them.
    if ((processes == 1)); then
        CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
        export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES%%,*}
    fi
else
    ((processes > 0)) || processes=1
    export CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu
    # OpenMP's threads spin while they wait; on a laptop that is busy otherwise, long spins halve the speed.
    export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}
fi
all_processes=$((processes * NNODES))
# On many GPUs a small global batch leaves less than DEVICE_BATCH to each.
device_batch=$((DEVICE_BATCH * all_processes > GLOBAL_BATCH ? GLOBAL_BATCH / all_processes : DEVICE_BATCH))
((device_batch > 0 && GLOBAL_BATCH % (device_batch * all_processes) == 0)) ||
    fail "GLOBAL_BATCH=$GLOBAL_BATCH does not divide into DEVICE_BATCH=$DEVICE_BATCH x $all_processes process(es); change one of them or GPUS"

# Run a command, or print it under DRY_RUN=1.
execute() {
    if [[ $DRY_RUN != 0 ]]; then
        printf '%q ' "$@"
        echo
    else
        run_watched "$@"
    fi
}

# Run a command so that a signal to this script reaches it, and return its exit code.
running=
signalled=0
run_watched() {
    local code
    "$@" &
    running=$!
    while true; do
        signalled=0 code=0
        wait "$running" || code=$?
        # A signal ends the wait, not the command.
        ((signalled)) || break
    done
    running=
    return "$code"
}
hand_on() {
    signalled=1
    if [[ -n $running ]]; then kill -TERM "$running" 2>/dev/null || true; else exit $((128 + $1)); fi
}
trap 'hand_on 15' TERM
trap 'hand_on 2' INT
# Under nohup, whoever hangs up is not heard.
trap -p HUP | grep -q "''" || trap 'hand_on 1' HUP

# Run a stage that writes a directory, unless the same command finished it before on the same input.
# What was run is noted beside the result, so an edited variable is never answered with an old result.
#   run_stage NAME DIRECTORY INPUT_FILES COMMAND…
run_stage() {
    local name=$1 directory=$2 inputs=$3 note="$2.command" wanted
    shift 3
    [[ " ${stages[*]} " == *" $name "* ]] || return 0
    if [[ $DRY_RUN != 0 ]]; then
        execute "${launcher[@]}" "$@"
        return
    fi
    # How a step was computed does not matter to the result, so launcher, device batch and the like stay out of the note.
    # A missing input is reported by the stage itself.
    wanted=$(printf '%q ' "$@" | sed -E "$how_computed; s/ $//" && echo && { xargs -r -d '\n' cksum <<<"$inputs" 2>/dev/null || true; })
    if [[ ! -f "$note" || ! -f $directory/run_record.json ]]; then
        mkdir -p "$(dirname "$directory")"
        run_watched "${launcher[@]}" "$@" "${resume[@]}" || exit $?
        # train.py --help and the like end well without a result.
        [[ -f $directory/run_record.json ]] || exit 0
        ((NODE_RANK > 0)) || echo "$wanted" >"$note"
    elif [[ "$(cat "$note")" == "$wanted" ]]; then
        echo "finished already: $directory"
    else
        diff <(sed 's/ --/\n--/g' "$note") <(sed 's/ --/\n--/g' <<<"$wanted") | grep '^[<>]' >&2 || true
        fail "$directory was made from other settings or input (< then, > now; a line of numbers is the checksum of a file that changed). Choose another OUTPUT_DIR, or delete $directory and $note."
    fi
}
launcher=()
resume=()
how_computed='s/ --(device_batch_size|engine|hang_timeout|attention|gradient_checkpointing|dataloader_workers) [^ ]*//g'
how_computed+='; s/ --(no_)?(torch_compile|cache_vision_features|allow_changes)( |$)/\3/g'

# With a hostfile: start this script's training on the other machines, in the same folder, with the same values.
start_other_machines() {
    local number name values=()
    ((${#hosts[@]} > 1 && NODE_RANK == 0)) && [[ " ${stages[*]} " == *" train "* && ! -f $train_dir.command ]] || return 0
    for name in LANGUAGE_MODEL VISION_MODEL IMAGE_POLICY ANNOTATIONS IMAGE_FOLDER OUTPUT_DIR BASE_DIR TRAIN_TYPE EPOCHS PROJECTOR_EPOCHS \
        PROJECTOR_LR HIGH_LR LOW_LR WARMUP_RATIO LORA_R LORA_ALPHA MODEL_MAX_LENGTH GLOBAL_BATCH DEVICE_BATCH GPUS ENGINE NNODES MASTER_ADDR MASTER_PORT VENV; do
        values+=("$name=$(printf %q "${!name}")")
    done
    for ((number = 1; number < NNODES; number++)); do
        execute ssh -o BatchMode=yes "${hosts[number]}" \
            "cd $(printf %q "$PWD") && env ${values[*]} NODE_RANK=$number bash run.sh train $(printf '%q ' "${train_flags[@]}")" </dev/null &
        # Printed commands would get into each other's lines.
        [[ $DRY_RUN == 0 ]] || wait
    done
}

# require STAGE DIRECTORY EARLIER: stop unless EARLIER has made the directory that STAGE needs.
require() {
    [[ $DRY_RUN != 0 || " ${stages[*]} " != *" $1 "* || -f $2/run_record.json ]] ||
        fail "$1 needs $2, which is not there; run first, with the same variables: bash run.sh $3"
}

# --- the training command, checked before anything is built ---
[[ $NODE_RANK =~ ^[0-9]+$ ]] && ((NODE_RANK < NNODES)) || fail "NODE_RANK is '$NODE_RANK', expected 0 to $((NNODES - 1)), below NNODES=$NNODES"
[[ -z $MASTER_PORT ]] || { [[ $MASTER_PORT =~ ^[1-9][0-9]{0,4}$ ]] && ((MASTER_PORT < 65536)); } || fail "MASTER_PORT is '$MASTER_PORT', expected 1 to 65535"
train_launcher=(python -m meme_llava.distributed.launch --die_with_parent --processes "$processes")
if ((NNODES > 1)); then
    # Machine 0 may have to download and build the base model first.
    train_launcher+=(--nodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" --start_timeout 7200)
elif [[ -n $MASTER_PORT ]]; then
    train_launcher+=(--master_port "$MASTER_PORT")
fi
# list_train_command OUTPUT_DIR TRAIN_TYPE EPOCHS HIGH_LR: a word a line.
list_train_command() {
    local engine=()
    [[ $ENGINE == auto ]] || engine=(--engine "$ENGINE")
    printf '%s\n' train.py --model "$base_dir" --annotations "$ANNOTATIONS" --image_folder "$IMAGE_FOLDER" \
        --output_dir "$1" --train_type "$2" --num_train_epochs "$3" \
        --high_lr "$4" --low_lr "$LOW_LR" --warmup_ratio "$WARMUP_RATIO" --lora_r "$LORA_R" --lora_alpha "$LORA_ALPHA" \
        --model_max_length "$MODEL_MAX_LENGTH" --global_batch_size "$GLOBAL_BATCH" --device_batch_size "$device_batch" \
        "${train_flags[@]}" "${engine[@]}"
}
# An interrupted run goes on from its newest checkpoint; train.py refuses if settings changed in between.
list_resume_flags() {
    if [[ ! -f $1.command ]] && compgen -G "$1/checkpoint-[0-9]*" >/dev/null; then
        printf '%s\n' --resume_from_checkpoint latest
    fi
}
projector_command=()
mapfile -t train_command < <(list_train_command "$train_dir" "$TRAIN_TYPE" "$EPOCHS" "$HIGH_LR")
[[ $PROJECTOR_EPOCHS =~ ^[0-9]*\.?[0-9]+$ ]] || fail "PROJECTOR_EPOCHS is '$PROJECTOR_EPOCHS', expected passes over the records, or 0"
if [[ $PROJECTOR_EPOCHS != 0 ]]; then
    for word in "${train_flags[@]}"; do
        # They would make the first stage another one, too.
        [[ ! $word =~ ^--(train[_-]type|num[_-]train[_-]epochs|high[_-]lr|output[_-]dir)(=|$) ]] ||
            fail "${word%%=*} counts for both stages of PROJECTOR_EPOCHS=$PROJECTOR_EPOCHS; set TRAIN_TYPE, EPOCHS, HIGH_LR or OUTPUT_DIR in its place"
    done
    [[ $TRAIN_TYPE != projector ]] || fail "PROJECTOR_EPOCHS=$PROJECTOR_EPOCHS begins with the projector alone, and so does TRAIN_TYPE=projector; set PROJECTOR_EPOCHS=0"
    mapfile -t projector_command < <(list_train_command "$projector_dir" projector "$PROJECTOR_EPOCHS" "$PROJECTOR_LR")
fi
if ((looks_only)); then
    # What is planned is the run on all GPUs, though one process looks at it.
    [[ ! " ${train_flags[*]} " =~ " --plan " || " ${train_flags[*]} " =~ " --gpus" ]] || train_command+=(--gpus "$all_processes")
    [[ " ${train_flags[*]} " =~ " --help " || -f $base_dir/run_record.json || $DRY_RUN != 0 ]] ||
        fail "this needs the base model $base_dir; run first, with the same variables: bash run.sh build"
    execute python "${train_command[@]}"
    exit
fi
mapfile -t resume_projector < <(list_resume_flags "$projector_dir")
mapfile -t resume_training < <(list_resume_flags "$train_dir")
# The other machines wait for machine 0, which checks and builds; what they share is there when it starts training.
if ((NODE_RANK > 0)); then
    stages=(train)
elif [[ $DRY_RUN == 0 && " ${stages[*]} " == *" train "* && ! -f $train_dir.command ]]; then
    ((${#projector_command[@]} == 0)) || python -m meme_llava.train.precheck "${projector_command[@]:1}" "${resume_projector[@]}"
    python -m meme_llava.train.precheck "${train_command[@]:1}" "${resume_training[@]}"
fi
# A second stage that was begun without this first one would refuse to go on, but only after it.
if ((${#projector_command[@]})) && [[ $DRY_RUN == 0 && " ${stages[*]} " == *" train "* && ! -f $projector_dir.command ]]; then
    if [[ -f $train_dir.command ]] || compgen -G "$train_dir/checkpoint-[0-9]*" >/dev/null; then
        fail "$train_dir was trained without the projector of $projector_dir, which is not there; choose another OUTPUT_DIR, or delete $train_dir and $train_dir.command"
    fi
fi
# Neither is a training run to end before memes that cannot be evaluated.
if [[ $DRY_RUN == 0 && " ${stages[*]} " == *" evaluate "* ]]; then
    python -m meme_llava.evaluate.precheck --annotations "$eval_annotations" --image_folder "$eval_image_folder"
fi

# announce TEXT: which of two like stages comes now.
announce() {
    [[ $DRY_RUN == 1 || " ${stages[*]} " != *" train "* ]] || printf '\n=== %s ===\n' "$1"
}

# --- build ---
# Where two towers were trained together, the record of that lies beside their folders.
base_inputs=$(printf '%s\n' "$LANGUAGE_MODEL/config.json" "$LANGUAGE_MODEL/../run_record.json" "$VISION_MODEL/config.json")
run_stage build "$base_dir" "$base_inputs" python build_base_model.py --language_model "$LANGUAGE_MODEL" \
    --vision_model "$VISION_MODEL" --image_policy "$IMAGE_POLICY" --output_dir "$base_dir"

# --- train ---
launcher=("${train_launcher[@]}")
((NODE_RANK > 0)) || require train "$base_dir" build
start_other_machines
train_inputs=$ANNOTATIONS$'\n'$base_dir/run_record.json
if ((${#projector_command[@]})); then
    announce "train 1 of 2: the projector alone"
    resume=("${resume_projector[@]}")
    run_stage train "$projector_dir" "$train_inputs" "${projector_command[@]}"
    train_inputs+=$'\n'$projector_dir/run_record.json
    train_command+=(--projector_from "$projector_dir")
    announce "train 2 of 2: $TRAIN_TYPE, from that projector"
fi
resume=("${resume_training[@]}")
run_stage train "$train_dir" "$train_inputs" "${train_command[@]}"
launcher=()
resume=()
if ((NODE_RANK > 0)); then
    echo "machine $NODE_RANK is done; machine 0 merges" >&2
    exit
fi

# --- merge ---
require merge "$train_dir" train
run_stage merge "$merged_dir" "$train_dir/run_record.json" \
    python merge_lora.py --adapter "$train_dir" --output_dir "$merged_dir"

# --- infer ---
if [[ " ${stages[*]} " == *" infer "* ]]; then
    require infer "$merged_dir" merge
    if [[ $eval_annotations == none ]]; then
        # What was left out of training is not a reference answer to ask for.
        asked=(--annotations "$ANNOTATIONS" --image_folder "$IMAGE_FOLDER" --limit 100)
        [[ ! -f $train_dir/quarantine.jsonl ]] || asked+=(--quarantine "$train_dir/quarantine.jsonl")
    else
        asked=(--annotations "$eval_annotations" --image_folder "$eval_image_folder" --limit 20)
    fi
    execute python infer.py --model "$merged_dir" "${asked[@]}"
fi

# --- evaluate ---
if [[ " ${stages[*]} " == *" evaluate "* ]]; then
    require evaluate "$base_dir" build
    require evaluate "$merged_dir" merge
    asked=(--annotations "$eval_annotations" --image_folder "$eval_image_folder")
    execute python evaluate.py --model "$base_dir" "${asked[@]}" --output_dir "$OUTPUT_DIR/scores_before"
    execute python evaluate.py --model "$merged_dir" "${asked[@]}" --output_dir "$OUTPUT_DIR/scores" \
        --compare_with "$OUTPUT_DIR/scores_before"
    execute python report.py "before=$OUTPUT_DIR/scores_before" "after=$OUTPUT_DIR" --output "$OUTPUT_DIR/report.html" --title "$OUTPUT_DIR"
fi

if [[ $DRY_RUN == 0 && -d $merged_dir ]]; then
    python=python
    [[ $VENV == active ]] || python=$VENV/bin/python
    echo
    echo "base model          $base_dir"
    ((${#projector_command[@]} == 0)) || echo "projector alone     $projector_dir"
    echo "adapter, curves     $train_dir (training_curves.png; tensorboard --logdir $train_dir/tensorboard)"
    echo "standalone model    $merged_dir"
    if [[ -f $OUTPUT_DIR/report.html ]]; then
        echo "scores, answers     $OUTPUT_DIR/scores, before training $OUTPUT_DIR/scores_before"
        echo "page to look at     $OUTPUT_DIR/report.html (others beside it: python report.py $OUTPUT_DIR OTHER_DIR)"
    fi
    echo "ask it yourself     $python infer.py --model $(printf %q "$merged_dir") --image FILE --question TEXT"
fi
