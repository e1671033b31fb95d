"""What real_weights.sh measures beside training: the language model on texts without images, and the table of all runs.

python benchmarks/real_weights.py check --captions FILE
python benchmarks/real_weights.py text --model DIR --base DIR --captions FILE --output FILE
python benchmarks/real_weights.py table --work_dir DIR
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from meme_llava.errors import UserError, stop_on_user_error  # noqa: E402
from meme_llava.report.html_page import thin  # noqa: E402

TEXTS, PARAGRAPHS = 200, 40
LONGEST = 48  # tokens of a text, which take most of the time
POINTS = 30  # of a training loss's line
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "List three fruits.",
    "Translate to French: Good morning.",
    "What is 7 plus 5?",
    "Who wrote Romeo and Juliet?",
)
# Of scores that evaluate.py writes: what stands in the table, under which name.
SCORES = {"text_found_in_captions": "text found", "chrf": "chrF", "stopped": "ended by itself", "looping": "in a loop"}


@stop_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    text = commands.add_parser("text", help="perplexity of texts, and answers to questions without an image")
    text.add_argument("--model", type=Path, required=True, help="the language model, the base, or a merged model")
    text.add_argument("--base", type=Path, required=True, help="whose tokenizer all of them share")
    text.add_argument("--captions", type=Path, required=True, help='JSONL of {"description": …}')
    text.add_argument("--output", type=Path, required=True)
    check = commands.add_parser("check", help="whether the captions can be read, before hours of training")
    check.add_argument("--captions", type=Path, required=True)
    table = commands.add_parser("table", help="write table.md of what the runs left")
    table.add_argument("--work_dir", type=Path, required=True)
    arguments = parser.parse_args(argv)
    if arguments.command == "check":
        read_captions(arguments.captions)
    elif arguments.command == "text":
        measure_texts(arguments)
    else:
        write_table(arguments.work_dir)


def measure_texts(arguments: argparse.Namespace) -> None:
    """Perplexities of a language model or LLaVA, and its greedy answers to QUESTIONS, as JSON."""
    import torch
    from transformers import AutoModelForCausalLM

    from meme_llava.dataset.conversation import Turn
    from meme_llava.model.llava import load_llava, load_processing

    processing = load_processing(arguments.base)
    encoder = processing.encoder
    is_llava = json.loads((arguments.model / "config.json").read_text())["model_type"] == "llava"
    load = load_llava if is_llava else AutoModelForCausalLM.from_pretrained
    model = load(arguments.model, dtype=torch.float32).eval()
    # The base has rows after the language model's own; `<image>` took the first of them.
    own_rows = encoder.image_token_id

    def compute_logits(ids: Sequence[int]) -> torch.Tensor:
        return model(input_ids=torch.tensor([ids])).logits[0, :, :own_rows]

    texts = {"captions": read_captions(arguments.captions), "English": read_paragraphs(ROOT / "docs")}
    found: dict[str, dict] = {"perplexity": {}, "answers": {}}
    with torch.inference_mode():
        for kind, some in texts.items():
            ids = [encoder.encode_text(text)[:LONGEST] for text in some]
            found["perplexity"][kind] = measure_perplexity(compute_logits, ids)
        for question in QUESTIONS:
            prompt = torch.tensor([encoder.encode_prompt([Turn("user", question)])])
            given = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "max_new_tokens": 48}
            ids = model.generate(**given, do_sample=False, eos_token_id=encoder.turn_end_id)[0, prompt.shape[1] :]
            found["answers"][question] = processing.tokenizer.decode(ids, skip_special_tokens=True)
    arguments.output.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n")
    print(arguments.output.read_text())


def measure_perplexity(compute_logits: Callable, texts: Sequence[Sequence[int]]) -> float:
    """exp of the mean negative log-likelihood of all tokens but each text's first.

    Args:
        compute_logits: (tokens, vocabulary) of token ids.
    """
    from torch.nn.functional import cross_entropy

    total, tokens = 0.0, 0
    for ids in texts:
        logits = compute_logits(ids)
        total += cross_entropy(logits[:-1], logits.new_tensor(ids[1:], dtype=int), reduction="sum").item()
        tokens += len(ids) - 1
    return math.exp(total / tokens)


def read_captions(path: Path) -> list[str]:
    """The first TEXTS descriptions of a JSONL file. Raises UserError for a line without one, or if all are empty."""
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            texts.append(json.loads(line)["description"].strip())
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f'{path}, line {number}: {line[:80]!r}, expected {{"description": text}}') from None
    if not any(texts):
        raise UserError(f"{path}: no description says anything")
    return [text for text in texts if text][:TEXTS]


def read_paragraphs(folder: Path) -> list[str]:
    """The first PARAGRAPHS paragraphs of the English Markdown pages of a folder that are prose, in order."""
    pages = (path for path in sorted(folder.glob("*.md")) if not path.name.endswith(".zh-CN.md"))
    paragraphs = [one for path in pages for one in path.read_text(encoding="utf-8").split("\n\n")]
    return [one for one in paragraphs if one[:1].isalpha() and len(one) > 80][:PARAGRAPHS]


def write_table(work_dir: Path) -> None:
    """Write losses.png and table.md, and print the latter: losses by step, scores, texts, and how long it all took."""
    runs = {path.parent.parent.name: path for path in sorted(work_dir.glob("*/train/trainer_state.json"))}
    histories = {name: json.loads(path.read_text())["log_history"] for name, path in runs.items()}
    draw_losses(histories, work_dir / "losses.png")
    parts = [table_of_losses(histories), table_of_scores(work_dir, list(runs))]
    if texts := sorted(work_dir.glob("text-*.json")):
        parts.append(table_of_texts({path.stem.removeprefix("text-"): json.loads(path.read_text()) for path in texts}))
    if (work_dir / "times.txt").is_file():
        times = [line.split() for line in (work_dir / "times.txt").read_text().splitlines()]
        parts.append(make_table(("step", "seconds", "CPU seconds"), times))
    (work_dir / "table.md").write_text("\n".join(parts))
    print((work_dir / "table.md").read_text())


def draw_losses(histories: dict[str, list[dict]], path: Path) -> None:
    """Training and validation loss by step, a colour a run; without `tiny`, whose tokens are others."""
    from matplotlib.figure import Figure

    shown = {name: history for name, history in histories.items() if name != "tiny"}
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    sides = figure.subplots(1, 2)
    for axes, key, title in zip(sides, ("loss", "eval_loss"), ("training loss", "validation loss"), strict=True):
        for name, history in shown.items():
            points = [(one["step"], one[key]) for one in history if key in one]
            if key == "loss":
                points = thin(points, max(1, len(points) // POINTS))
            axes.plot(*zip(*points, strict=True), label=name, marker="." if key == "eval_loss" else "")
        axes.set(title=f"{title}, nats a token", xlabel="step")
        axes.grid(alpha=0.3)
    sides[0].legend()
    figure.savefig(path, dpi=110)


def table_of_losses(histories: dict[str, list[dict]]) -> str:
    """Validation loss, and in brackets the mean training loss since the one before, by step and run."""
    steps = sorted({entry["step"] for history in histories.values() for entry in history if "eval_loss" in entry})
    columns = [describe_evaluations(history) for history in histories.values()]
    rows = [(str(step), *(column.get(step, "–") for column in columns)) for step in steps]
    return make_table(("step", *histories), rows)


def describe_evaluations(history: list[dict]) -> dict[int, str]:
    """Step: validation loss, and the mean training loss since the evaluation before, of one run."""
    found, training = {}, []
    for entry in history:
        if "loss" in entry:
            training.append(entry["loss"])
        if "eval_loss" in entry:
            mean = f" ({sum(training) / len(training):.3f})" if training else ""
            found[entry["step"]] = f"{entry['eval_loss']:.3f}{mean}"
            training = []
    return found


def table_of_scores(work_dir: Path, names: list[str]) -> str:
    """What evaluate.py says of the merged model of each run."""
    scores = {}
    for name in names:
        path = work_dir / name / "scores" / "metrics.json"
        scores[name] = json.loads(path.read_text())["scores"] if path.is_file() else {}
    rows = [
        (title, *(f"{some[key]['value']:.3g}" if key in some else "–" for some in scores.values()))
        for key, title in SCORES.items()
    ]
    return make_table(("score", *scores), rows)


def table_of_texts(found: dict[str, dict]) -> str:
    """Perplexities and answers without an image, by model."""
    kinds = next(iter(found.values()))["perplexity"]
    rows = [(f"perplexity, {kind}", *(f"{one['perplexity'][kind]:.2f}" for one in found.values())) for kind in kinds]
    rows += [
        (question, *(" ".join(one["answers"][question].split()) for one in found.values())) for question in QUESTIONS
    ]
    return make_table(("without an image", *found), rows)


def make_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '¦') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
