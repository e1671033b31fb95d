# Presets, and the stages of run.sh on their way to meme_llava/pipeline. Sourced by run.sh.
# shellcheck shell=bash
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) ||
    { echo "error: this is bash $BASH_VERSION, expected 4.4 or newer" >&2 && exit 2; }
source scripts/environment.sh
unset PYTHONSAFEPATH # with it Python would not find our modules in this folder

fail() { echo "error: $*" >&2; exit 2; }

# stage NAME COMMAND…: declare a stage; run_stages runs it.
declared=()
stage() { declared+=("$#" "$@"); }

# run_stages [STAGE…] [FLAGS OF train.py…]: check everything, then run what is not finished.
run_stages() {
    local python=python
    set +a
    [[ $VENV == active ]] || python=$VENV/bin/python
    command -v "$python" >/dev/null || python=$(find_python)
    "$python" -m meme_llava.pipeline check "$caller" "${declared[@]}" 0 "$@"
    [[ $DRY_RUN == 0 && ${1:-} != @(-h|--help) ]] || exit 0
    activate_environment requirements.txt
    # From here on a signal to run.sh reaches this program, which hands it on to the stage that runs.
    exec python -m meme_llava.pipeline run "$caller" "${declared[@]}" 0 "$@"
}

# Say of a slip in a page of settings what bash would not, or only in its own words.
check_page() {
    local file=$1 line name number=0
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1))
        [[ $line =~ ^[[:space:]]*([A-Z][A-Z0-9_]*)[[:space:]]*= ]] || continue
        name=${BASH_REMATCH[1]}
        # Plain NAME=value would win over what stands in front of the command, and over presets.
        [[ $line == "$name=\${$name:-"*"}"* ]] ||
            fail "$file: line $number is '${line%%  *}', expected $name=\${$name:-VALUE}"
    done <"$file"
}
check_page run.sh
check_page scripts/more_settings.sh

check_names() {
    local name
    name=$(comm -23 <(grep -oE '"\$[A-Z_]+' run.sh | tr -d '"$' | sort -u) \
        <(grep -ohE '^[A-Z_]+=' run.sh scripts/more_settings.sh | tr -d = | sort -u) | head -n 1)
    [[ -z $name ]] || fail "run.sh: a stage takes $name, and no line sets it; expected $name=\${$name:-VALUE}"
}
check_names

# Paths in front of the command start from the folder where it was typed; those in run.sh and presets, from the checkout.
start_paths_from_caller() {
    local name path
    for name in ANNOTATIONS IMAGE_FOLDER OUTPUT_DIR BASE_DIR EVAL_ANNOTATIONS EVAL_IMAGE_FOLDER VENV \
        LANGUAGE_MODEL VISION_MODEL; do
        path=${!name:-}
        [[ $path != @(|/*|auto|none|active) ]] || continue
        # Qwen/Qwen2-7B-Instruct is the id of a model on a hub, unless there is such a folder.
        [[ $name == *_MODEL && $path != .* && ! -e ${caller%/}/$path ]] || printf -v "$name" %s "${caller%/}/$path"
    done
}
[[ $caller -ef . ]] || start_paths_from_caller

# read_preset NAME: set what configs/presets/NAME.yaml sets, but for variables that are set already.
# A preset is flat YAML: lines of "NAME: value", and comments on lines of their own.
read_preset() {
    local LC_ALL=C file=configs/presets/$1.yaml line number=0 seen=" " # comments may be in any encoding
    [[ -f $file ]] ||
        fail "PRESET is '$1', expected one of $(basename -s .yaml configs/presets/*.yaml | paste -sd ' '), or nothing"
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1))
        line=${line#$'\xef\xbb\xbf'} # a byte order mark
        [[ ! $line =~ ^[[:space:]]*(#.*)?$ ]] || continue
        [[ $line =~ ^([A-Z][A-Z0-9_]*):[[:space:]]+([^[:space:]#\"\']+)[[:space:]]*$ ]] ||
            fail "$file: line $number is '$line', expected NAME: value"
        grep -q "^${BASH_REMATCH[1]}=" run.sh scripts/more_settings.sh ||
            fail "$file: line $number sets ${BASH_REMATCH[1]}, which is no setting of run.sh"
        [[ $seen != *" ${BASH_REMATCH[1]} "* ]] ||
            fail "$file: line $number sets ${BASH_REMATCH[1]} a second time; delete one of the lines"
        seen+="${BASH_REMATCH[1]} "
        [[ -n ${!BASH_REMATCH[1]:-} ]] || printf -v "${BASH_REMATCH[1]}" %s "${BASH_REMATCH[2]}"
    done <"$file"
}
[[ -z ${PRESET:-} ]] || read_preset "$PRESET"

set -a # The settings that follow are exported: the pipeline reads them.
