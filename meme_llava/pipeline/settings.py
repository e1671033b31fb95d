"""Settings of run.sh: which there are, their help, and variables that were meant for one. Without libraries."""

import difflib
import re
from collections.abc import Container, Iterable, Mapping, Sequence

from meme_llava import ROOT
from meme_llava.errors import UserError

FILES = (ROOT / "run.sh", ROOT / "scripts" / "more_settings.sh")
SETTING = re.compile(r"^([A-Z][A-Z0-9_]*)=\$\{\1:-(.*?)\} *", re.MULTILINE)
# What other trainers call a setting.
SYNONYMS = {
    "EPOCHS": "NUM_EPOCHS N_EPOCHS",
    "HIGH_LR (projector) and LOW_LR (all else)": "LR LEARNING_RATE",
    "HIGH_LR": "PROJECTOR_LEARNING_RATE MM_PROJECTOR_LR",
    "LORA_R": "LORA_RANK",
    "MODEL_MAX_LENGTH": "MAX_LENGTH MAX_SEQ_LENGTH MAX_SEQ_LEN CUTOFF_LEN",
    "GLOBAL_BATCH": "BATCH BATCH_SIZE TRAIN_BATCH_SIZE TOTAL_BATCH_SIZE",
    "DEVICE_BATCH": "PER_DEVICE_BATCH_SIZE PER_DEVICE_TRAIN_BATCH_SIZE MICRO_BATCH_SIZE",
    "GPUS": "NUM_GPUS N_GPUS NGPUS NPROC_PER_NODE",
    "NNODES": "NUM_NODES",
    "IMAGE_FOLDER": "IMAGE_DIR IMAGES_DIR",
    "OUTPUT_DIR": "OUTPUT OUT_DIR OUTDIR",
}
# Flags of train.py that are single words and yet stand for nothing else.
TELLING_FLAGS = {"attention", "precision", "seed"}


def list_settings() -> dict[str, str]:
    """The settings with their defaults, as run.sh has them."""
    return dict(found.groups() for path in FILES for found in SETTING.finditer(path.read_text(encoding="utf-8")))


class Settings(dict):
    """The value of each setting by its name."""

    def __missing__(self, name: str) -> str:
        raise UserError(f"run.sh: no line sets {name}, which is needed; expected {name}=${{{name}:-VALUE}}")


def read_settings(variables: Mapping[str, str]) -> Settings:
    """The values that run.sh has exported."""
    return Settings((name, variables.get(name, "")) for name in list_settings())


def describe_settings() -> str:
    """The text of `bash run.sh --help`: how run.sh is called, and its settings with their defaults."""
    page, more = (path.read_text(encoding="utf-8") for path in FILES)
    about, _, page = page.partition("\n[ -n ")
    about = re.sub(r"^# ?", "", about.partition("\n")[2], flags=re.MULTILINE)
    settings = page[page.index("# ---") : page.index("source scripts/more")] + "\n" + more[more.index("# ---") :]
    settings = SETTING.sub(lambda found: f"{found[1]}={found[2]}".ljust(34) + " ", settings)
    return f"{about}\n\n{re.sub(' +$', '', settings, flags=re.MULTILINE)}".rstrip()


def map_flags(of_projector: bool = False) -> dict[str, str]:
    """Flag → the setting that gives it in run.sh.

    Args:
        of_projector: the flags are those of the stage that PROJECTOR_EPOCHS adds.
    """
    given = dict(re.findall(r'--(\w+) "\$([A-Z][A-Z0-9_]*)"', FILES[0].read_text(encoding="utf-8")))
    # Several stages take --image_folder; that of the training is meant.
    known = list_settings()
    given |= {flag: flag.upper() for flag in given if flag.upper() in known}
    return given | ({"num_train_epochs": "PROJECTOR_EPOCHS", "high_lr": "PROJECTOR_LR"} if of_projector else {})


def check_names(variables: Mapping[str, str], known: Sequence[str]) -> None:
    """Stop at a variable that is meant for a setting and named otherwise: it would change nothing."""
    if variables.get("HOSTFILE"):
        raise UserError(
            "HOSTFILE is no longer a setting; a loop in docs/multi_gpu.md starts all nodes (unset HOSTFILE)"
        )
    # A word alone, such as MODEL, may be set for something else.
    others = {flag.upper(): name for flag, name in map_flags().items() if "_" in flag}
    others |= {other: name for name, words in SYNONYMS.items() for other in words.split()}
    # ENV is set in many containers.
    for name in sorted(name for name, value in variables.items() if value and name not in (*known, "ENV")):
        near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.85)
        if meant := others.get(name.upper()) or "".join(near):
            raise UserError(
                f"the variable {name} is set, which run.sh does not know; did you mean {meant}? (else: unset {name})"
            )


def check_flag_names(variables: Mapping[str, str], known: Sequence[str], flags: Iterable[str]) -> None:
    """Stop at a variable that is named as a flag of train.py: it would change nothing."""
    for flag in sorted(flag for flag in flags if ("_" in flag or flag in TELLING_FLAGS) and flag.upper() not in known):
        if value := variables.get(flag.upper()):
            raise UserError(
                f"the variable {flag.upper()} is set, which run.sh does not know; it is a flag of train.py: "
                f"bash run.sh --{flag} {value} (else: unset {flag.upper()})"
            )


def name_settings(message: str, of_projector: bool, train_flags: Container[str]) -> str:
    """A message about flags as one about the settings that gave them; what the user typed as a flag stays one."""
    given = map_flags(of_projector) | {
        name.lower(): name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "NNODES")
    }
    message = re.sub(r"^.*?: argument (--\w+): (.*?)(\. --help lists.*)?$", r"\1: \2", message)
    for flag in (flag for flag in given if flag not in train_flags):
        message = re.sub(rf"--{flag}\b", given[flag], message)
    return message


def read_count(variables: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", variables[name]):
        raise UserError(f"{name} is '{variables[name]}', expected a whole number above 0")
    return int(variables[name])
