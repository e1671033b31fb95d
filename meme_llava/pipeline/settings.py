"""Settings of run.sh: their names and help text, misspelt ones, and which of them a message about flags means."""

import difflib
import re
from collections.abc import Mapping, Sequence

from meme_llava import ROOT
from meme_llava.errors import UserError
from meme_llava.pipeline.stage import Flags, Stage

FILES = (ROOT / "run.sh", ROOT / "scripts" / "more_settings.sh")
SETTING = re.compile(r"^([A-Z][A-Z0-9_]*)=\$\{\1:-(.*?)\} *", re.MULTILINE)


def list_settings() -> list[str]:
    return [found[1] for path in FILES for found in SETTING.finditer(path.read_text(encoding="utf-8"))]


def describe_settings() -> str:
    """The text of `bash run.sh --help`: how run.sh is called, and its settings with their defaults."""
    page, more = (path.read_text(encoding="utf-8") for path in FILES)
    about, _, page = page.partition("\n[ -n ")
    about = re.sub(r"^# ?", "", about.partition("\n")[2], flags=re.MULTILINE)
    settings = page[page.index("# ---") : page.index("source scripts/more")] + "\n" + more[more.index("# ---") :]
    settings = SETTING.sub(lambda found: f"{found[1]}={found[2]}".ljust(34) + " ", settings)
    return f"{about}\n\n{re.sub(' +$', '', settings, flags=re.MULTILINE)}".rstrip()


def check_names(variables: Mapping[str, str], known: Sequence[str]) -> None:
    """Stop at a variable whose name is nearly that of a setting: it would change nothing."""
    if variables.get("HOSTFILE"):
        raise UserError(
            "HOSTFILE is no longer a setting; a loop in docs/multi_gpu.md starts all nodes (unset HOSTFILE)"
        )
    # ENV is set in many containers.
    for name in sorted(name for name, value in variables.items() if value and name not in (*known, "ENV")):
        if near := difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.85):
            raise UserError(
                f"the variable {name} is set, which run.sh does not know; did you mean {near[0]}? (else: unset {name})"
            )


def name_settings(message: str, stage: Stage, train_flags: Flags) -> str:
    """A message about flags as one about the settings that gave them; what the user typed as a flag stays one."""
    given = dict(re.findall(r'--(\w+) "\$([A-Z][A-Z0-9_]*)"', FILES[0].read_text(encoding="utf-8")))
    given |= {"master_port": "MASTER_PORT", "node_rank": "NODE_RANK", "nnodes": "NNODES"}
    if stage.flags.get("train_type") == ["projector"]:
        given |= {"num_train_epochs": "PROJECTOR_EPOCHS", "high_lr": "PROJECTOR_LR"}
    message = re.sub(r"^.*?: argument (--\w+): (.*?)(\. --help lists.*)?$", r"\1: \2", message)
    for flag in given.keys() - train_flags.keys():
        message = re.sub(rf"--{flag}\b", given[flag], message)
    return message
