"""Compares training recipes on the embedded towers: how well does each read memes that it was not trained on?

    python benchmarks/recipes.py --output_dir output/recipes --seeds 0 1 2

runs `run.sh build train merge evaluate` as it stands and with one thing changed at a time, once for each seed. A seed
draws the fresh multi_modal_projector, the LoRA start values and the order of the records. Writes results.json,
table.md and curves.png. Run again after an interruption, it keeps what is finished.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from transformers.trainer import TRAINER_STATE_NAME  # noqa: E402

from meme_llava.checkpoint import write_json  # noqa: E402
from meme_llava.display import print_table  # noqa: E402
from meme_llava.errors import UserError, stop_on_user_error  # noqa: E402

SMOOTHED_STEPS = 20  # of the curves
COLUMNS = ("recipe", "character error rate", "mood right", "no text, told so")


@dataclass(frozen=True)
class Recipe:
    """What differs from run.sh as it stands.

    Args:
        variables: of run.sh.
        flags: of train.py.
        projector_share: share of the passes in a stage of its own before LoRA, in which only the projector learns.
    """

    variables: dict[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    projector_share: float = 0


def list_recipes(defaults: dict[str, str]) -> dict[str, Recipe]:
    """The recipes by name. `defaults` are run.sh's own rates."""
    high, low = defaults["HIGH_LR"], defaults["LOW_LR"]
    return {
        "run.sh as it stands": Recipe(),
        f"all {low}": Recipe({"HIGH_LR": low}),
        f"all {high}": Recipe({"LOW_LR": high}),
        "published 1e-3, 2e-5": Recipe({"HIGH_LR": "1e-3", "LOW_LR": "2e-5"}),
        "no warmup": Recipe({"WARMUP_RATIO": "0"}),
        "projector first": Recipe(projector_share=1 / 3),
        "vision LoRA on q, k, v": Recipe(flags=("--lora_vision_modules", "q_proj", "k_proj", "v_proj")),
        "no vision LoRA": Recipe(flags=("--vision_tower_training", "frozen")),
        "projector only": Recipe({"TRAIN_TYPE": "projector"}),
    }


@dataclass(frozen=True)
class Outcome:
    """Scores on unseen memes, and the loss of every optimizer step."""

    character_error_rate: float
    mood_right: float
    no_text_right: float
    losses: list[float]


def read_defaults() -> dict[str, str]:
    """Rates and passes of run.sh as it stands, from the training command that it prints."""
    words = print_command("train")
    flags = {"HIGH_LR": "--high_lr", "LOW_LR": "--low_lr", "EPOCHS": "--num_train_epochs"}
    return {name: words[words.index(flag) + 1] for name, flag in flags.items()}


def print_command(stage: str, **variables: str) -> list[str]:
    """The words of the command that run.sh runs in a stage."""
    return shlex.split(run_script([stage], os.environ | variables | {"DRY_RUN": "1"}))


def build_base(folder: Path, seed: int) -> None:
    """The base model of run.sh with a multi_modal_projector of this seed."""
    command = [*print_command("build", BASE_DIR=str(folder)), "--seed", str(seed)]
    subprocess.run([sys.executable, *command[1:]], cwd=ROOT, check=True)


def run_script(words: list[str], environment: dict[str, str]) -> str:
    """What `bash run.sh …` prints. Raises UserError if it fails."""
    process = subprocess.run(
        ["bash", "run.sh", *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if process.returncode:
        raise UserError(f"bash run.sh {' '.join(words)} ended with {process.returncode}; what it said stands above")
    return process.stdout


def run_recipe(recipe: Recipe, seed: int, folder: Path, base: Path, epochs: float) -> Outcome:
    """Train, merge and evaluate; stages that are finished are not done again."""
    environment = os.environ | {"BASE_DIR": str(base)} | recipe.variables
    first = round(epochs * recipe.projector_share, 2)
    losses = []
    if recipe.projector_share:
        stage = {"OUTPUT_DIR": f"{folder}/projector", "TRAIN_TYPE": "projector", "EPOCHS": str(first)}
        run_script(["train", "merge", "--seed", str(seed)], environment | stage)
        environment |= {"BASE_DIR": f"{folder}/projector/merged"}
        losses = read_losses(folder / "projector" / "train")
    last = {"OUTPUT_DIR": str(folder), "EPOCHS": str(round(epochs - first, 2))}
    run_script(["train", "merge", "evaluate", "--seed", str(seed), *recipe.flags], environment | last)
    scores = json.loads((folder / "scores" / "metrics.json").read_text(encoding="utf-8"))["scores"]
    return Outcome(
        scores["character_error_rate"],
        scores["right_by_task"]["mood"][1],
        scores["no_text_right"],
        losses + read_losses(folder / "train"),
    )


def read_losses(train_dir: Path) -> list[float]:
    log = json.loads((train_dir / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def write_results(folder: Path, outcomes: dict[str, list[Outcome]]) -> None:
    """results.json, table.md and curves.png of what there is so far."""
    write_json(folder / "results.json", {name: [asdict(run) for run in runs] for name, runs in outcomes.items()})
    lines = [COLUMNS, ("---",) * len(COLUMNS), *make_rows(outcomes)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    (folder / "table.md").write_text(table, encoding="utf-8")
    draw_curves(outcomes, folder / "curves.png")


def make_rows(outcomes: dict[str, list[Outcome]]) -> list[tuple[str, ...]]:
    """A row for each recipe: mean and, behind ±, standard deviation over the seeds."""

    def show(values: list[float]) -> str:
        spread = f" ± {statistics.stdev(values):.1%}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1%}{spread}"

    return [
        (
            name,
            show([outcome.character_error_rate for outcome in runs]),
            show([outcome.mood_right for outcome in runs]),
            show([outcome.no_text_right for outcome in runs]),
        )
        for name, runs in outcomes.items()
    ]


def draw_curves(outcomes: dict[str, list[Outcome]], path: Path) -> None:
    """Training loss of every recipe, mean over the seeds, each point the mean of the last steps."""
    figure, axes = plt.subplots(figsize=(9, 5.5))
    for name, runs in outcomes.items():
        mean = [statistics.mean(losses) for losses in zip(*(outcome.losses for outcome in runs), strict=True)]
        smooth = [statistics.mean(mean[max(0, end - SMOOTHED_STEPS) : end]) for end in range(1, len(mean) + 1)]
        axes.plot(range(1, len(mean) + 1), smooth, label=name, linewidth=1.4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"training loss, mean of {SMOOTHED_STEPS} steps")
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args(argv)
    folder = arguments.output_dir.resolve()
    defaults = read_defaults()
    outcomes: dict[str, list[Outcome]] = {}
    for seed in arguments.seeds:
        base = folder / f"base_{seed}"
        if not base.is_dir():
            build_base(base, seed)
        for number, (name, recipe) in enumerate(list_recipes(defaults).items()):
            outcome = run_recipe(recipe, seed, folder / f"recipe_{number}_seed_{seed}", base, float(defaults["EPOCHS"]))
            outcomes.setdefault(name, []).append(outcome)
            write_results(folder, outcomes)
    print_table(f"Unseen memes, {len(arguments.seeds)} seeds", COLUMNS, make_rows(outcomes))


if __name__ == "__main__":
    main()
