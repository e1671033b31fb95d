"""What each part of the recipe is worth: the embedded default beside variants of it, three seeds each.

    python benchmarks/recipes.py --work_dir output/recipes --precision bf16      # everything, 100 minutes on 2 cores
    python benchmarks/recipes.py --work_dir output/recipes                       # on CPUs without AVX512_BF16; slower
    python benchmarks/recipes.py --work_dir output/recipes --recipes default all_low --seeds 0

Every variant builds a base with a fresh projector from data/tiny, trains it with run.sh on the sample memes and is
asked about the 200 of data/unseen. All see the same records equally often. The seed draws the projector, the LoRA
matrices and the order of the records. Runs that are finished are not done again; the table and the curves are drawn
from all that are there:

    recipes.md, recipes.png and recipes.json in --work_dir
"""

import argparse
import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend must be chosen first

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from meme_llava.errors import UserError, stop_on_user_error  # noqa: E402

EPOCHS = 3  # as run.sh has it
HIGH, LOW = "2e-3", "5e-4"  # as run.sh has them
MIDDLE = "1e-3"  # their geometric mean
QKV = ["--lora_vision_modules", "q_proj", "k_proj", "v_proj"]
SMOOTHED_STEPS = 25
UNSEEN = ROOT / "data" / "unseen"
METRICS = Path("scores", "metrics.json")  # in the folder of a run


@dataclass(frozen=True)
class Recipe:
    """A variant of the default.

    Args:
        meaning: what is different.
        variables: of run.sh, where they differ from its defaults.
        flags: of train.py.
    """

    meaning: str
    variables: dict[str, str] = field(default_factory=dict)
    flags: Sequence[str] = ()


RECIPES = {
    "default": Recipe(f"projector {HIGH}, LoRA {LOW}, warmup, one stage, LoRA on all six vision projections"),
    "all_low": Recipe(f"{LOW} for everything", {"HIGH_LR": LOW}),
    "all_middle": Recipe(f"{MIDDLE} for everything", {"HIGH_LR": MIDDLE, "LOW_LR": MIDDLE}),
    "all_high": Recipe(f"{HIGH} for everything", {"LOW_LR": HIGH}),
    "low_lora": Recipe("LoRA 2e-4, a tenth of the projector's", {"LOW_LR": "2e-4"}),
    "lowest_lora": Recipe("LoRA 4e-5, a fiftieth of the projector's, as published", {"LOW_LR": "4e-5"}),
    "no_warmup": Recipe("no warmup", {"WARMUP_RATIO": "0"}),
    "two_stages": Recipe(
        "the projector alone for one pass, then with LoRA",
        {"PROJECTOR_EPOCHS": "1", "PROJECTOR_LR": HIGH, "EPOCHS": str(EPOCHS - 1)},
    ),
    "projector_only": Recipe("the projector alone, no LoRA", {"TRAIN_TYPE": "projector"}),
    "vision_qkv": Recipe("vision LoRA on q, k, v only", flags=QKV),
    "no_vision_lora": Recipe("no vision LoRA, the tower is frozen", flags=["--vision_tower_training", "frozen"]),
}


@dataclass(frozen=True)
class Outcome:
    """What one run came to: shares from 0 to 1, and the training loss of every step."""

    character_error_rate: float
    mood_right: float
    no_text_right: float
    losses: list[float]


@dataclass(frozen=True)
class Command:
    """What to run, and the environment variables that it needs besides."""

    words: list[str]
    variables: dict[str, str]


def list_commands(name: str, seed: int, precision: str, work_dir: Path) -> list[Command]:
    """The commands of a run, in their order."""
    recipe, output = RECIPES[name], work_dir / f"{name}_{seed}"
    # `active`: run.sh takes the Python that runs this.
    variables = {"VENV": "active", "GPUS": "cpu", "EPOCHS": str(EPOCHS), **recipe.variables}
    variables |= {"BASE_DIR": str(work_dir / f"base_{seed}"), "OUTPUT_DIR": str(output)}
    training = ["bash", "run.sh", "train", "merge", *recipe.flags, "--precision", precision, "--seed", str(seed)]
    # run.sh would ask the base about them, too, every time.
    evaluation = [sys.executable, "evaluate.py", "--model", str(output / "merged"), "--output_dir"]
    evaluation += [str((output / METRICS).parent), "--annotations", str(UNSEEN / "annotations.json")]
    return [Command(training, variables), Command([*evaluation, "--image_folder", str(UNSEEN)], {})]


def make_base(seed: int, work_dir: Path) -> None:
    """A base model of the embedded towers and a projector drawn by `seed`, unless it is there."""
    base, towers = work_dir / f"base_{seed}", ROOT / "data" / "tiny"
    if not base.is_dir():
        words = [sys.executable, "build_base_model.py", "--seed", str(seed), "--output_dir", str(base)]
        words += ["--language_model", str(towers / "language_model"), "--vision_model", str(towers / "vision_tower")]
        run_command(Command(words, {}), work_dir / f"base_{seed}.log")


def run_recipe(name: str, seed: int, precision: str, work_dir: Path) -> None:
    """Do what is not done yet of a run. Raises UserError if one of its commands fails."""
    for command in list_commands(name, seed, precision, work_dir):
        run_command(command, work_dir / f"{name}_{seed}.log")
    print(f"{name}, seed {seed}: done", flush=True)


def run_command(command: Command, log: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **command.variables}
    with log.open("a", encoding="utf-8") as output:
        code = subprocess.run(
            command.words, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        raise UserError(f"{' '.join(command.words)} ended with code {code}; its output is in {log}")


def read_outcome(output_dir: Path) -> Outcome | None:
    """The outcome of a run, or None if it is not finished."""
    metrics = output_dir / METRICS
    if not metrics.is_file():
        return None
    scores = json.loads(metrics.read_text(encoding="utf-8"))["scores"]
    history = json.loads((output_dir / "train" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return Outcome(
        *(scores[name]["value"] for name in ("character_error_rate", "right: mood", "no_text_right")),
        [entry["loss"] for entry in history if "loss" in entry],
    )


def read_outcomes(work_dir: Path) -> dict[str, dict[int, Outcome]]:
    """All finished runs in `work_dir`, by recipe and seed."""
    outcomes = {}
    for name in RECIPES:
        for folder in sorted(work_dir.glob(f"{name}_[0-9]*")):
            seed = folder.name.removeprefix(f"{name}_")
            if seed.isdecimal() and (outcome := read_outcome(folder)):
                outcomes.setdefault(name, {})[int(seed)] = outcome
    return outcomes


def write_table(outcomes: dict[str, dict[int, Outcome]]) -> str:
    """The scores as Markdown: the mean over the seeds, and the lowest and highest."""
    lines = [
        "| Recipe | What is different | Seeds | Character error rate | Mood right | No text, correctly reported |",
        "|---|---|---|---|---|---|",
    ]
    for name, by_seed in outcomes.items():
        columns = [
            show_range([getattr(outcome, score) for outcome in by_seed.values()])
            for score in ("character_error_rate", "mood_right", "no_text_right")
        ]
        lines.append(f"| `{name}` | {RECIPES[name].meaning} | {len(by_seed)} | " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


def show_range(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1%} to {max(values):.1%})"


def draw_curves(outcomes: dict[str, dict[int, Outcome]], path: Path) -> None:
    """The training loss, mean over the seeds and smoothed, and every run's character error rate."""
    figure, (loss_axes, error_axes) = plt.subplots(1, 2, figsize=(12, 5), width_ratios=(3, 2))
    for row, (name, by_seed) in enumerate(outcomes.items()):
        length = min(len(outcome.losses) for outcome in by_seed.values())
        mean = [statistics.mean(outcome.losses[step] for outcome in by_seed.values()) for step in range(length)]
        ends = range(SMOOTHED_STEPS, length + 1)
        # What trained on the projector alone before begins where that ended.
        start = outcomes["default"] if "default" in outcomes else by_seed
        offset = max(0, min(len(outcome.losses) for outcome in start.values()) - length)
        smooth = [statistics.mean(mean[end - SMOOTHED_STEPS : end]) for end in ends]
        # Matplotlib's own cycle has ten colours.
        color = "black" if name == "default" else f"C{list(RECIPES).index(name) - 1}"
        loss_axes.plot([offset + end for end in ends], smooth, label=name, color=color, linewidth=1.3)
        rates = [100 * outcome.character_error_rate for outcome in by_seed.values()]
        error_axes.plot(rates, [row] * len(rates), "o", color=color, markersize=7, alpha=0.7)
    loss_axes.set_xlabel("optimizer step")
    loss_axes.set_ylabel(f"training loss, mean of {SMOOTHED_STEPS} steps and all seeds")
    loss_axes.set_yscale("log")
    loss_axes.legend()
    error_axes.set_yticks(range(len(outcomes)), list(outcomes))
    error_axes.invert_yaxis()
    error_axes.set_xlabel("character error rate on unseen memes, %\na point for each seed")
    error_axes.set_xlim(left=0)
    error_axes.margins(y=0.1)
    for axes in (loss_axes, error_axes):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    work_dir = arguments.work_dir.resolve()
    work_dir.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        make_base(seed, work_dir)
    with concurrent.futures.ThreadPoolExecutor(arguments.parallel) as pool:
        # Seed by seed, so that an interrupted benchmark has compared all recipes with some seeds.
        runs = [
            pool.submit(run_recipe, name, seed, arguments.precision, work_dir)
            for seed in arguments.seeds
            for name in arguments.recipes
        ]
        for done in concurrent.futures.as_completed(runs):
            done.result()
    outcomes = read_outcomes(work_dir)
    table = write_table(outcomes)
    (work_dir / "recipes.md").write_text(table, encoding="utf-8")
    plain = {name: {seed: vars(outcome) for seed, outcome in by_seed.items()} for name, by_seed in outcomes.items()}
    (work_dir / "recipes.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    draw_curves(outcomes, work_dir / "recipes.png")
    print(table, end="")


def list_recipes() -> str:
    return "\n".join(f"    {name:15}{recipe.meaning}" for name, recipe in RECIPES.items())


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nRecipes:\n{list_recipes()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--work_dir", type=Path, required=True, help="gets bases, runs and results; kept between calls")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--precision", default="fp32", help="of the training, as train.py takes it")
    parser.add_argument("--parallel", type=int, default=2, help="runs at once, each on one CPU core")
    arguments = parser.parse_args(argv)
    if arguments.parallel < 1:
        parser.error("--parallel must be at least 1")
    return arguments


if __name__ == "__main__":
    main()
