# Presets, and the stages of run.sh on their way to meme_llava/pipeline. Sourced by run.sh.
# shellcheck shell=bash
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) ||
    { echo "error: this is bash $BASH_VERSION, expected 4.4 or newer" >&2 && exit 2; }
source scripts/environment.sh

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
    "$python" -m meme_llava.pipeline check "${declared[@]}" 0 "$@"
    [[ $DRY_RUN == 0 && ${1:-} != @(-h|--help) ]] || exit 0
    activate_environment requirements.txt
    # From here on a signal to run.sh reaches this program, which hands it on to the stage that runs.
    exec python -m meme_llava.pipeline run "${declared[@]}" 0 "$@"
}

# read_preset NAME: set what configs/presets/NAME.yaml sets, but for variables that are set already.
# A preset is flat YAML: lines of "NAME: value", and comments on lines of their own.
read_preset() {
    local file=configs/presets/$1.yaml line number=0
    [[ -f $file ]] ||
        fail "PRESET is '$1', expected one of $(basename -s .yaml configs/presets/*.yaml | paste -sd ' '), or nothing"
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1))
        [[ ! $line =~ ^[[:space:]]*(#.*)?$ ]] || continue
        [[ $line =~ ^([A-Z_]+):[[:space:]]+([^[:space:]#\"\']+)[[:space:]]*$ ]] ||
            fail "$file: line $number is '$line', expected NAME: value"
        grep -q "^${BASH_REMATCH[1]}=" run.sh scripts/more_settings.sh ||
            fail "$file: line $number sets ${BASH_REMATCH[1]}, which is no setting of run.sh"
        [[ -n ${!BASH_REMATCH[1]:-} ]] || printf -v "${BASH_REMATCH[1]}" %s "${BASH_REMATCH[2]}"
    done <"$file"
}
[[ -z ${PRESET:-} ]] || read_preset "$PRESET"

set -a # The settings that follow are exported: the pipeline reads them.
