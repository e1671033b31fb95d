# Knows how a preset of configs/presets becomes variables of run.sh. To be sourced.

preset_folder=configs/presets
preset_names=(LANGUAGE_MODEL VISION_MODEL IMAGE_POLICY TRAIN_TYPE EPOCHS PROJECTOR_EPOCHS PROJECTOR_LR HIGH_LR LOW_LR
    WARMUP_RATIO LORA_R LORA_ALPHA MODEL_MAX_LENGTH GLOBAL_BATCH DEVICE_BATCH GPUS ENGINE)

# read_preset NAME: set every variable that the preset names, but for those that are set already.
# A preset is flat YAML: lines of "NAME: value", and comments on lines of their own.
read_preset() {
    local file=$preset_folder/$1.yaml line name value number=0
    [[ -f $file ]] ||
        fail "PRESET is '$1', expected one of $(basename -s .yaml "$preset_folder"/*.yaml | paste -sd ' '), or nothing"
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1))
        [[ ! $line =~ ^[[:space:]]*(#.*)?$ ]] || continue
        [[ $line =~ ^([A-Z_]+):[[:space:]]+([^[:space:]#\"\']+)[[:space:]]*$ ]] ||
            fail "$file: line $number is '$line', expected NAME: value"
        name=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
        [[ " ${preset_names[*]} " == *" $name "* ]] ||
            fail "$file: line $number sets $name, which no preset can; expected one of ${preset_names[*]}"
        [[ -n ${!name:-} ]] || printf -v "$name" %s "$value"
    done <"$file"
}
