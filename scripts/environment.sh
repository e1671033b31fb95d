# shellcheck shell=bash
# Sourced by run.sh and tests/run.sh: a Python environment with what the given requirement files ask for.
#
#   activate_environment requirements.txt [more.txt …]
#
# VENV names its folder (.venv, made on first use); VENV=active takes the environment that is already active.

activate_environment() {
    if [[ "${VENV:-.venv}" == active ]]; then
        return
    fi
    local folder=${VENV:-.venv} python stamp
    python=$(find_python) || return 2
    if [[ ! -x "$folder/bin/python" ]]; then
        echo "making a Python environment in $folder"
        if command -v uv >/dev/null; then
            uv venv --quiet --python "$python" "$folder"
        elif ! "$python" -m venv "$folder"; then
            # Half an environment would look like a whole one to the next run.
            rm -rf "$folder"
            echo "error: $python cannot make environments (Debian: apt install python3-venv)" >&2
            return 2
        fi
    fi
    stamp=$(cat "$@" | cksum)
    if [[ "$(cat "$folder/requirements.stamp" 2>/dev/null)" != *"$stamp"* ]]; then
        echo "installing $* (once; torch is large)"
        install_requirements "$folder" "$@"
        echo "$stamp" >>"$folder/requirements.stamp"
    fi
    # shellcheck disable=SC1091
    source "$folder/bin/activate"
}

find_python() {
    local name
    for name in python3 python3.12 python3.11 python; do
        if command -v "$name" >/dev/null &&
            "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    echo "error: no Python 3.11 or 3.12 found; install one (Debian: apt install python3 python3-venv)" >&2
    return 2
}

install_requirements() {
    local folder=$1 file
    local -a files=()
    shift
    for file in "$@"; do files+=(-r "$file"); done
    if command -v uv >/dev/null; then
        share_pip_mirrors
        uv pip install --quiet --python "$folder/bin/python" "${files[@]}"
    else
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "${files[@]}"
    fi
}

# uv does not read pip's configuration, where many users have set a mirror.
share_pip_mirrors() {
    local pip_config
    command -v pip >/dev/null || return 0
    pip_config=$(pip config list 2>/dev/null | tr -d "'\"" | sed 's/\\n/ /g')
    read_pip_setting() { sed -n "s/^[^=]*\.$1=//p" <<<"$pip_config" | tail -n 1; }
    : "${UV_DEFAULT_INDEX:=$(read_pip_setting index-url)}"
    : "${UV_INDEX:=$(read_pip_setting extra-index-url)}"
    : "${UV_FIND_LINKS:=$(read_pip_setting find-links)}"
    # pip takes the best version of all its indexes; uv's own rule would stop at the first that knows the name.
    [[ -z "$UV_INDEX" ]] || export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match}
    local name
    for name in UV_DEFAULT_INDEX UV_INDEX UV_FIND_LINKS; do
        if [[ -n "${!name}" ]]; then export "${name?}"; else unset "$name"; fi
    done
}
