# Settings of run.sh that few runs change; set them in front of the command. `bash run.sh --help` shows them, too.
# shellcheck shell=bash disable=SC2034

# --- how run.sh runs ---
PRESET=${PRESET:-}                            # a file of configs/presets; its values replace the defaults
BASE_DIR=${BASE_DIR:-$OUTPUT_DIR/base}        # base model, built there if there is none; name it to share one
VENV=${VENV:-.venv}                           # Python environment, made on first use; active: the active one
DRY_RUN=${DRY_RUN:-0}                         # 1: print the commands, run nothing

# --- evaluation ---
# Records kept out of ANNOTATIONS; none: no evaluation; auto: data/unseen for the sample memes, else none
EVAL_ANNOTATIONS=${EVAL_ANNOTATIONS:-auto}
EVAL_IMAGE_FOLDER=${EVAL_IMAGE_FOLDER:-auto}  # their image paths start here; auto: data/unseen or IMAGE_FOLDER

# --- two training stages ---
PROJECTOR_EPOCHS=${PROJECTOR_EPOCHS:-0}       # passes that train the projector alone, before TRAIN_TYPE; published: 0
PROJECTOR_LR=${PROJECTOR_LR:-1e-3}            # peak rate of those passes

# --- several nodes: run.sh is started on each of them, with the same settings and its own NODE_RANK ---
# rank=0; for host in node-a node-b; do
#     ssh -n "$host" "cd $PWD && NNODES=2 NODE_RANK=$rank MASTER_ADDR=node-a bash run.sh" &
#     rank=$((rank + 1)); done; wait
NNODES=${NNODES:-1}                           # nodes; they share OUTPUT_DIR, ANNOTATIONS and IMAGE_FOLDER
NODE_RANK=${NODE_RANK:-0}                     # number of this node; node 0 builds, merges and evaluates
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}         # address by which the other nodes reach node 0
MASTER_PORT=${MASTER_PORT:-}                  # a free port there; empty: any on one node, 29500 with several
