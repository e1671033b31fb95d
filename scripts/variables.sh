# Knows which names look like those of run.sh's variables, but are not. To be sourced.

# stop_at_misspelt_variables NAME…: a variable that is one slip away from one of these names would change nothing.
stop_at_misspelt_variables() {
    local name known
    for name in $(compgen -v); do
        # ENV is set in many containers.
        [[ " $* " != *" $name "* && $name != ENV && -n ${!name:-} ]] || continue
        for known in "$@"; do
            ! is_misspelt "$name" "$known" ||
                fail "the variable $name is set, which run.sh does not know; did you mean $known? (else: unset $name)"
        done
    done
}

# Whether a name is another one in small letters, or with a letter too many, too few or another, or two that changed
# places.
is_misspelt() {
    local name=${1^^} known=$2 place before after rest swapped
    for ((place = 0; place <= ${#known}; place++)); do
        before=${known:0:place} after=${known:place}
        rest=${after:1} swapped=${after:1:1}${after:0:1}${after:2}
        case $name in
            "$before"?"$after" | "$before$rest" | "$before"?"$rest" | "$before$swapped") return 0 ;;
        esac
    done
    return 1
}
