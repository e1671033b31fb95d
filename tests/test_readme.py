"""The documents name only what exists: paths, flags, variables, commands; and both languages say the same."""

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from meme_llava import cli as settings
from meme_llava.cli import parse_arguments
from meme_llava.convert.settings import BuildArguments, MergeArguments
from meme_llava.dataset.findings import ALLOWABLE, KINDS
from meme_llava.dataset.records import parse_record
from meme_llava.evaluate.settings import EvaluateArguments, JudgeArguments, ReportArguments, parse_report_arguments
from meme_llava.inference.endpoints import PRESETS
from meme_llava.inference.settings import DemoArguments, InferArguments
from meme_llava.prepare.describing import REASONS, DescribeArguments
from meme_llava.prepare.questions import DESCRIBE, READ
from meme_llava.report.check_summary import CheckArguments
from meme_llava.storage.manifest import MANIFEST
from meme_llava.storage.run_record import RUN_RECORD
from meme_llava.train.settings import TrainArguments, parse_train_arguments

ROOT = Path(__file__).resolve().parent.parent
PAIRS = {"README": ("README.md", "README.zh-CN.md"), "data": ("data/README.md", "data/README.zh-CN.md")}
DOCUMENTS = [name for pair in PAIRS.values() for name in pair]
DRAWING = ("data/tiny/making/draw_memes.py", "data/tiny/making/draw_lessons.py")
PLAIN_SCRIPTS = {
    "build_base_model.py": BuildArguments,
    "merge_lora.py": MergeArguments,
    "infer.py": InferArguments,
    "evaluate.py": EvaluateArguments,
    "report.py": ReportArguments,
    "judge.py": JudgeArguments,
    "demo.py": DemoArguments,
    "data/check.py": CheckArguments,
    "data/describe.py": DescribeArguments,
}
PREPARE = "data/prepare.py"
BENCHMARKS = (
    "benchmarks/full_size.py",
    "benchmarks/older_reader.py",
    "benchmarks/check_data.py",
    "benchmarks/input_pipeline.py",
    "benchmarks/loss.py",
    "benchmarks/plan_memory.py",
    "benchmarks/throughput.py",
)
# Flags of tests/run.sh, tensorboard, mlflow, transformers serve, vllm serve, hf download and git clone.
FOREIGN_FLAGS = {
    "--help",
    "--all",
    "--logdir",
    "--host",
    "--port",
    "--chat-template-kwargs",
    "--chat-template-content-format",
    "--max-model-len",
    "--repo-type",
    "--local-dir",
    "--exclude",
    "--depth",
    "--backend-store-uri",
}
HUB_IDS = {"Qwen/Qwen2-7B-Instruct", "OFA-Sys/chinese-clip-vit-large-patch14-336px"}
# Headings of the tables of messages, and messages in them that other programs print.
TROUBLESHOOTING = {"README.md": "## Troubleshooting", "README.zh-CN.md": "## 常见问题"}
FOREIGN_MESSAGES = {"No matching distribution found for transformers"}
# Made when the product runs, so no checkout has them.
MADE_BY_RUNS = ("output", ".venv")
ENDINGS_OF_OUR_FILES = (".py", ".sh", ".md")


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def list_blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", read(document), re.DOTALL | re.MULTILINE)


def list_commands(document: str) -> list[str]:
    """Every command of the bash blocks: continued lines joined, comments left out."""
    lines = "".join(list_blocks(document, "bash")).replace("\\\n", " ").splitlines()
    return [" ".join(re.sub(r"(^|\s)#.*$", "", line).split()) for line in lines if line.strip()]


def list_code_spans(document: str) -> list[str]:
    prose = re.sub(r"^```.*?^```$", "", read(document), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", prose)


def list_flags(document: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", read(document)))


def list_known_flags() -> set[str]:
    sources = [settings_class for settings_class, _ in load_script(PREPARE).COMMANDS.values()]
    classes = [TrainArguments, *PLAIN_SCRIPTS.values(), *sources]
    fields = [field for arguments in classes for field in dataclasses.fields(arguments)]
    flags = {f"--{field.name}" for field in fields}
    flags |= {f"--no_{field.name}" for field in fields if field.default is True}
    flags |= {flag for script in (*DRAWING, *BENCHMARKS) for flag in re.findall(r'"(--\w+)",', read(script))}
    return flags | {f"--{lesson}" for lesson in load_script("data/tiny/making/draw_lessons.py").LESSONS}


def read_run_sh_variables() -> dict[str, tuple[str, str | None]]:
    """Name → (default, value of the real run or None) from run.sh's own lines."""
    variables = {}
    for line in read("run.sh").splitlines():
        if match := re.match(r"([A-Z_]+)=\$\{\1:-([^}]*)\}(.*)", line):
            name, default, comment = match.groups()
            real = re.search(r"real run: (\S+)$", comment)
            variables[name] = (default, real.group(1) if real else None)
    return variables


def read_variable_table(document: str) -> dict[str, tuple[str, str | None]]:
    rows = re.findall(r"^\| `([A-Z_]+)` \| (?:`([^`]+)`|empty|空) \| (?:`([^`]+)`|–) \|", read(document), re.MULTILINE)
    return {name: (default, real or None) for name, default, real in rows}


def read_table(document: str, first_cell: str) -> list[list[str]]:
    """The rows of the table whose first row begins with a cell, written as there; they come without code marks."""
    for table in re.findall(r"(?:^\|.*\n)+", read(document), re.MULTILINE):
        _, _, *rows = table.splitlines()
        if rows[0].startswith(f"| {first_cell} |"):
            return [[cell.strip() for cell in row.replace("`", "").strip("|").split("|")] for row in rows]
    raise AssertionError(f"{document}: no table begins with {first_cell}")


def parse_command(words: list[str]) -> None:
    """Give a script's flags to its own parser; nothing is run."""
    script, flags = words[0], words[1:]
    if "--help" in flags:
        return
    if script == "train.py":
        parse_train_arguments(flags, "")
    elif script == "report.py":
        parse_report_arguments(flags, "")
    elif script == PREPARE:
        parse_arguments(load_script(PREPARE).COMMANDS[flags[0]][0], flags[1:], "")
    elif script in (*DRAWING, *BENCHMARKS):
        load_script(script).parse_arguments(flags)
    else:
        parse_arguments(PLAIN_SCRIPTS[script], flags, "")


def load_script(script: str):
    spec = importlib.util.spec_from_file_location(f"{Path(script).stem}_of_readme_test", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def find_modules_beside_scripts(monkeypatch):
    for folder in ("data", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


@pytest.fixture
def example_recipe(tmp_path, monkeypatch):
    """The recipes with the README's example among them, as its reader would save it."""
    (block,) = list_blocks("README.md", "yaml")
    for path in settings.RECIPE_FOLDER.glob("*.yaml"):
        shutil.copy(path, tmp_path)
    (tmp_path / "language_lora.yaml").write_text(block, encoding="utf-8")
    monkeypatch.setattr(settings, "RECIPE_FOLDER", tmp_path)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_paths_exist(document):
    folder = (ROOT / document).parent
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", read(document))]
    links = [link for link in links if link and "://" not in link]
    spans = {
        span.rstrip("/")
        for span in list_code_spans(document)
        if re.fullmatch(r"[\w.][\w.*-]*(/[\w.*-]+)*/?", span)
        and ("/" in span or span.endswith(ENDINGS_OF_OUR_FILES))
        and span not in HUB_IDS
        and not span.startswith(MADE_BY_RUNS)
    }
    assert len(links) >= 1
    assert len(spans) >= 4
    assert [link for link in links if not (folder / link).exists()] == []
    assert [span for span in spans if not (any(ROOT.glob(span)) or any(folder.glob(span)))] == []


@pytest.mark.parametrize(("document", "least"), list(zip(DOCUMENTS, (25, 25, 8, 8), strict=True)))
def test_named_flags_exist(document, least):
    known = list_known_flags()
    flags = list_flags(document)
    assert len(known) >= 50
    assert len(flags) >= least
    assert sorted(flags - known - FOREIGN_FLAGS) == []


def test_python_commands_parse():
    commands = [command for document in DOCUMENTS for command in list_commands(document)]
    commands = [command for command in commands if command.startswith("python ")]
    assert len(commands) >= 18
    # A shortened command cannot be copied, so there is none.
    assert [command for command in commands if "…" in command or "..." in command] == []
    for command in commands:
        words = shlex.split(command)[1:]
        parse_command(words)
        assert [word for word in words if word.startswith(("data/", "configs/")) and not (ROOT / word).exists()] == []


def test_run_sh_commands_pass_a_dry_run(example_recipe):
    commands = [command for document in DOCUMENTS for command in list_commands(document)]
    commands = sorted({command for command in commands if re.search(r"\bbash run\.sh\b", command)})
    assert len(commands) >= 12
    names = {*read_run_sh_variables(), "CUDA_VISIBLE_DEVICES"}
    # GPUS=cpu: what is read here must not depend on the tester's GPUs. A command may set its own.
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"DRY_RUN": "1", "GPUS": "cpu"}
    parsed = 0
    for command in commands:
        result = subprocess.run(
            ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 0, f"{command}: {result.stderr}"
        printed = [shlex.split(line) for line in result.stdout.splitlines()]
        assert printed, command
        for words in printed:
            script = next((place for place, word in enumerate(words) if word in {"train.py", *PLAIN_SCRIPTS}), None)
            # ssh starts run.sh on another machine.
            assert script is not None or words[0] == "ssh", words
            if script is not None:
                parse_command(words[script:])
                parsed += 1
    assert parsed >= 20


def test_other_commands_are_known():
    commands = {command for document in DOCUMENTS for command in list_commands(document)}
    others = {command for command in commands if not re.search(r"^python |\bbash run\.sh\b", command)}
    assert others == {
        "bash tests/run.sh",
        "source .venv/bin/activate",
        "pip install -r data/requirements.txt",
        "pip install -r configs/requirements/other_models.txt",
        "pip install -r requirements.txt -r configs/requirements/demo.txt",
        # Downloads; nobody ran them where this was built.
        "export HF_ENDPOINT=https://hf-mirror.com",
        "hf download REILX/chinese-meme-description-dataset --repo-type dataset --local-dir /data/memes/captions "
        '--exclude "*gemini-1_0*"',
        "hf download SWHL/ChineseOCRBench --repo-type dataset --local-dir /data/parquet/ChineseOCRBench",
        "git clone --depth 1 https://github.com/LLM-Red-Team/emo-visual-data /data/memes/emo-visual-data",
        "git clone --depth 1 https://github.com/zhaoolee/ChineseBQB /data/memes/ChineseBQB",
        "export GEMINI_API_KEY=your-key",
        "tensorboard --logdir output/train/tensorboard",
        "pip install -r configs/requirements/trackers.txt",
        # tests/inference/test_serve.py starts the same server with the same flags.
        "pip install 'openai>=3.54,<4' 'fastapi>=0.165,<1' 'uvicorn>=0.54,<1'",
        "transformers serve output/merged --host 127.0.0.1 --port 8000 --device cpu --dtype float32 "
        "--chat-template-kwargs '{\"sanitize_control_tokens\": true}'",
        "vllm serve output/served --host 127.0.0.1 --port 8000 --dtype bfloat16 --max-model-len 4096 "
        "--chat-template-content-format openai",
    }
    assert (ROOT / "tests" / "run.sh").is_file()


@pytest.mark.parametrize("document", PAIRS["README"])
def test_variable_table_is_that_of_run_sh(document):
    variables = read_run_sh_variables()
    assert len(variables) >= 18
    assert sum(real is not None for _, real in variables.values()) >= 12
    assert read_variable_table(document) == variables


def test_variables_named_in_commands_exist():
    assignments = set()
    for document in DOCUMENTS:
        for command in list_commands(document):
            assignments |= set(re.findall(r"(?:^|\s)([A-Z_]+)=", command))
    assert len(assignments) >= 18
    foreign = {"DRY_RUN", "PIP_EXTRA_INDEX_URL", "UV_TORCH_BACKEND", "HF_ENDPOINT", "GEMINI_API_KEY", "WANDB_MODE"}
    assert sorted(assignments - set(read_run_sh_variables()) - foreign) == []


@pytest.mark.parametrize("document", PAIRS["README"])
def test_quoted_messages_are_in_the_code(document):
    sources = [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *ROOT.glob("meme_llava/**/*.py"), *ROOT.glob("scripts/*.sh")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # a message that spans two literals is one
    code = code.replace("{RUN_RECORD}", RUN_RECORD).replace("{MANIFEST}", MANIFEST)
    code = re.sub(r"\$\w+|\$\(\(.*?\)\)|\{[^{}\n]*\}", "…", code).replace("'…'", "…")
    table = read(document).split(TROUBLESHOOTING[document])[1].split("\n## ")[0]
    messages = [quoted for row in re.findall(r"^\| (.*?) \|", table, re.MULTILINE) for quoted in row.split("`")[1:2]]
    assert len(messages) >= 18
    missing = []
    for message in sorted(set(messages) - FOREIGN_MESSAGES):
        fragments = [part for part in message.replace("'…'", "…").split("…") if part.strip()]
        if not fragments or not re.search(r"[^\n]*?".join(re.escape(part) for part in fragments), code):
            missing.append(message)
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_example_records_are_accepted(document):
    records = [json.loads(block) for block in list_blocks(document, "json")]
    assert len(records) >= (4 if document.startswith("data/") else 1)
    for record in records:
        for image in parse_record(record, document).images:
            assert (ROOT / "data" / image).is_file()


@pytest.mark.parametrize(
    ("document", "severities"),
    list(zip(PAIRS["data"], ({"bad": "bad", "noted": "noted"}, {"bad": "不可用", "noted": "提示"}), strict=True)),
)
def test_table_of_kinds_is_that_of_the_check(document, severities):
    rows = read_table(document, "`not_json`")
    assert len(rows) >= 36
    assert [row[:2] for row in rows] == [[kind.name, severities[kind.severity]] for kind in KINDS.values()]
    if document == "data/README.md":
        assert [row[2] for row in rows] == [kind.meaning for kind in KINDS.values()]
    # Each kind has a meaning of its own, in Chinese too.
    assert len({row[2] for row in rows}) == len(KINDS)
    (sentence,) = [line for line in read(document).splitlines() if line.startswith("- `--allow`")]
    assert {name for name in re.findall(r"`(\w+)`", sentence) if name in KINDS} == ALLOWABLE


@pytest.mark.parametrize("document", PAIRS["data"])
def test_table_of_questions_is_that_of_prepare(document):
    rows = read_table(document, DESCRIBE[0])
    assert [row[0] for row in rows] == [*DESCRIBE, *READ]
    described, read_out = rows[: len(DESCRIBE)], rows[len(DESCRIBE) :]
    assert len({row[1] for row in described}) == len({row[1] for row in read_out}) == 1
    assert described[0][1] != read_out[0][1]


@pytest.mark.parametrize("document", PAIRS["data"])
def test_tables_of_describe_and_prepare_are_theirs(document):
    assert [row[0] for row in read_table(document, "`captions`")] == list(load_script(PREPARE).COMMANDS)
    assert [row[0] for row in read_table(document, "`refusal`")] == list(REASONS)
    rows = read_table(document, "`gpt-4o`")
    assert [row[0] for row in rows] == list(PRESETS)
    for name, model, variable in rows:
        preset = PRESETS[name]
        # The local server's model is the user's, and it needs no key.
        assert (model, variable) == (preset.model, preset.key_variable) or name == "local"
    assert PRESETS["local"].model is PRESETS["local"].key_variable is None


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_both_languages_say_the_same(pair):
    english, chinese = pair
    assert len(list_commands(english)) >= 5
    assert list_commands(english) == list_commands(chinese)
    assert list_flags(english) == list_flags(chinese)

    def list_variables(document: str) -> set[str]:
        return set(re.findall(r"\b[A-Z][A-Z_]*[A-Z]\b", " ".join(list_code_spans(document))))

    def list_shape(document: str) -> list[str]:
        """Headings, table rows and list items, in order, without their words."""
        prose = re.sub(r"^```.*?^```$", "```", read(document), flags=re.DOTALL | re.MULTILINE)
        return re.findall(r"^(#+ |\||- |```)", prose, re.MULTILINE)

    assert list_variables(english) == list_variables(chinese)
    assert len(list_shape(english)) >= 20
    assert list_shape(english) == list_shape(chinese)
    # Messages, file names and settings are quoted alike; links differ by their language.
    assert sorted(set(list_code_spans(english)) ^ set(list_code_spans(chinese))) == []
