"""Write the tables of the docs that the code knows better: docs/settings.md, and the kinds of findings.

python docs/make_tables.py            # writes them
python docs/make_tables.py --check    # says which are out of date, and writes nothing
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import prepare  # noqa: E402

from meme_llava.cli import make_parser  # noqa: E402
from meme_llava.convert.settings import BuildArguments, MergeArguments  # noqa: E402
from meme_llava.dataset.findings import BAD_KINDS, KINDS  # noqa: E402
from meme_llava.evaluate.settings import EvaluateArguments, JudgeArguments, ReportArguments  # noqa: E402
from meme_llava.inference.settings import DemoArguments, InferArguments  # noqa: E402
from meme_llava.prepare.describing import DescribeArguments  # noqa: E402
from meme_llava.report.data_check import CheckArguments  # noqa: E402
from meme_llava.train.settings import TrainArguments, read_recipe  # noqa: E402

SCRIPTS = {
    "train.py": TrainArguments,
    "build_base_model.py": BuildArguments,
    "merge_lora.py": MergeArguments,
    "infer.py": InferArguments,
    "demo.py": DemoArguments,
    "evaluate.py": EvaluateArguments,
    "report.py": ReportArguments,
    "judge.py": JudgeArguments,
    "data/check.py": CheckArguments,
    "data/describe.py": DescribeArguments,
    **{f"data/prepare.py {name}": settings for name, (settings, _) in prepare.COMMANDS.items()},
}
# Where the variables of a run are.
RUN_SH = ("run.sh", "scripts/more_settings.sh")
# At the end of a comment there: what the published run took.
PUBLISHED = re.compile(r"[.;,]? *(?:real run|published):? *(\S+)$")
TOP = """\
# All settings

<!-- Written by docs/make_tables.py from run.sh and the code. Do not edit: change the code and run it again. -->

A setting has one home. Values that users edit are variables of `run.sh`. What makes a train type is in \
`configs/train`, and the values of published recipes are in `configs/presets`. Everything else has its default in \
the code.

The command line wins over a recipe, and a recipe wins over a default. `run.sh` puts its variables on the command \
line. An unknown flag or key is an error, and so is a misspelt variable of `run.sh` such as `EPOCH`, or the name of \
a flag in capitals; `run.sh` does not notice a variable with an entirely different name.
Every run prints its settings and writes them to `run_record.json` beside the weights.

## run.sh

Edit the values in `run.sh` (what stands between `:-` and `}`), or set them for one run in front of the command: \
`EPOCHS=5 bash run.sh`. Flags after the stages go to `train.py`. Relative paths that you give start from the folder \
in which you type the command, those in `run.sh` from the folder of `run.sh`. "Published" is the value of the \
published 8×A800 run.

"""
MORE = """\
### Settings that few runs change

They are not on the page of `run.sh`. `bash run.sh --help` shows them, and they are set in front of the command, too.

"""


def make_settings() -> str:
    """The whole of docs/settings.md."""
    heads = ("Variable", "Default", "Published", "Meaning")
    main, *more = [list_variables(file) for file in RUN_SH if (ROOT / file).is_file()]
    parts = [TOP + format_table(heads, main)]
    if more:
        parts.append(MORE + format_table(heads, more[0]))
    for script, settings in SCRIPTS.items():
        parts.append(f"## {script}\n\n" + format_table(("Flag", "Default", "Meaning"), list_flags(script, settings)))
    return "\n".join(parts)


def read_variables(file: str) -> dict[str, tuple[str, str | None, str]]:
    """Variable → default, published value if there is one, and meaning.

    The meaning is the comment behind the variable, or on the lines above it.
    """
    variables = {}
    above = []
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"([A-Z][A-Z0-9_]*)=\$\{\1:-([^}]*)\}(?:\s+#\s*(.*))?", line):
            name, default, comment = match.groups()
            comment = comment or " ".join(above)
            published = PUBLISHED.search(comment)
            meaning = PUBLISHED.sub("", comment).strip()
            variables[name] = (default, published.group(1) if published else None, meaning)
        is_comment = re.fullmatch(r"# (?!---)(.*)", line)
        above = [*above, is_comment.group(1)] if is_comment else []
    return variables


def list_variables(file: str) -> list[tuple[str, str, str, str]]:
    return [
        (f"`{name}`", f"`{default}`" if default else "empty", f"`{published}`" if published else "–", escape(meaning))
        for name, (default, published, meaning) in read_variables(file).items()
    ]


def list_flags(script: str, settings: type) -> list[tuple[str, str, str]]:
    recipe = read_recipe("lora") if settings is TrainArguments else {}
    rows = []
    for action in make_parser(settings, "")._actions:
        flag = action.option_strings[0]
        if action.dest == "help" or flag.startswith("--no_"):
            continue
        if action.dest in recipe:
            default = "recipe"
        elif action.required:
            default = "required"
        elif action.default in (None, []):
            default = "–"
        elif isinstance(action.default, bool):
            default = f"on; `--no_{action.dest}`" if action.default else "off"
        else:
            words = action.default if isinstance(action.default, list) else [action.default]
            default = f"`{' '.join(map(str, words))}`"
        choices = " | ".join(f"`{choice}`" for choice in action.choices or [])
        rows.append((f"`{flag}`", default, escape(action.help) + (f" ({choices})" if choices else "")))
    return rows


def make_kinds() -> str:
    rows = [(f"`{name}`", "bad" if name in BAD_KINDS else "noted", escape(meaning)) for name, meaning in KINDS.items()]
    return format_table(("Kind", "Severity", "Meaning"), rows)


def escape(text: str) -> str:
    """Text for a cell: a placeholder such as <image> would be taken for HTML."""
    return re.sub(r"(<\w+>)", r"`\1`", text)


def format_table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = [[re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in row] for row in (heads, *rows)]
    head, *body = [f"| {' | '.join(row)} |\n" for row in cells]
    return head + "|" + "---|" * len(heads) + "\n" + "".join(body)


def make_documents() -> dict[Path, str]:
    """Document → what it should hold."""
    data_check = ROOT / "docs" / "data_check.md"
    begin, end = "<!-- kinds: written by docs/make_tables.py -->\n", "<!-- end -->"
    before, rest = data_check.read_text(encoding="utf-8").split(begin)
    after = rest.split(end, 1)[1]
    return {
        ROOT / "docs" / "settings.md": make_settings(),
        data_check: f"{before}{begin}\n{make_kinds()}\n{end}{after}",
    }


def main(argv: list[str] | None = None) -> None:
    """Write the tables, or check them."""
    words = sys.argv[1:] if argv is None else argv
    stale = [
        path
        for path, text in make_documents().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    if words == ["--check"]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date: python docs/make_tables.py", file=sys.stderr)
        sys.exit(bool(stale))
    for path in stale:
        path.write_text(make_documents()[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
