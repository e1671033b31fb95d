"""What every page of the docs promises: it names only what exists, its commands run, and its twin says the same."""

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from meme_llava import cli
from meme_llava.dataset.findings import ALLOWABLE, KINDS
from meme_llava.dataset.records import parse_record
from meme_llava.errors import UserError
from meme_llava.evaluate.settings import parse_report_arguments
from meme_llava.inference.endpoints import PRESETS
from meme_llava.pipeline.plan import split_flags
from meme_llava.prepare.describing import REASONS
from meme_llava.prepare.writer import DESCRIBE, READ
from meme_llava.storage.run_record import MANIFEST, RUN_RECORD
from meme_llava.train import settings as train_settings

DOCUMENTS = sorted(
    str(path.relative_to(ROOT)) for pattern in ("*.md", "docs/*.md", "data/**/*.md") for path in ROOT.glob(pattern)
)
TWINS = ("README", "docs/install", "docs/full_size", "data/README")
README_LINES = 200
IMAGE_BYTES = 300_000
MAKING_FOLDER = "data/tiny/making"
MAKING = tuple(
    f"{MAKING_FOLDER}/{name}.py"
    for name in ("draw_memes", "draw_lessons", "prepare_towers", "train_towers", "write_towers")
)
BENCHMARKS = tuple(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("benchmarks/*.py")))
# Flags of tests/run.sh, pip, docker, tensorboard, mlflow, servers, hf download, git clone, data.
FOREIGN_FLAGS = {
    *("--help", "--all", "--check", "--index-url", "--ipc", "--shm-size"),
    *("--logdir", "--backend-store-uri"),
    *("--host", "--port", "--chat-template-kwargs", "--chat-template-content-format", "--max-model-len"),
    *("--mm-processor-kwargs", "--override-generation-config"),
    *("--enable-lora", "--max-lora-rank", "--lora-modules", "--enforce-eager"),
    *("--mmproj", "--chat-template"),
    *("--repo-type", "--local-dir", "--exclude", "--depth"),
    "--gpus-per-node",
}
# Variables of other programs, and DRY_RUN.
FOREIGN_VARIABLES = {
    *("DRY_RUN", "CUDA_VISIBLE_DEVICES", "PIP_EXTRA_INDEX_URL", "UV_TORCH_BACKEND", "XDG_CACHE_HOME"),
    *("PYTHONSAFEPATH", "RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"),
    *("HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
    *("TENSORBOARD_LOGGING_DIR", "WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR", "SWANLAB_MODE", "SWANLAB_PROJECT"),
    *("SWANLAB_LOG_DIR", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"),
    *(preset.key_variable for preset in PRESETS.values() if preset.key_variable),
}
REAL_WEIGHTS_VARIABLES = {"CAPTIONS", "IMAGE_SIZE", "PRECISION", "STEPS"}  # of benchmarks/real_weights.sh
# Words in capitals that are no variable: constants of the code, placeholders, misspelt ones, and one that is gone.
OTHER_NAMES = {"ALPHABET", "COMMANDS", "DIVIDED", "EXPECTATIONS", "VALUE_CHECKS", "RUBRIC", "NAME", "VALUE", "HOSTFILE"}
OTHER_NAMES |= {"EPOCH", "GLOBAL_BATCH_SIZE", "LORA_RANK", "NUM_GPUS"}
HUB_IDS = {"Qwen/Qwen2-7B-Instruct", "OFA-Sys/chinese-clip-vit-large-patch14-336px"}
# Made when the product runs, so no checkout has them.
MADE_BY_RUNS = ("output", ".venv")
ENDINGS_OF_OUR_FILES = (".py", ".sh", ".md")
# Numbers that Chinese writes in another unit: 7.1 million is 710 万.
SAME_NUMBER = {"7.1": "710", "7.6": "76", "0.3": "3"}


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def read_prose(document: str) -> str:
    return re.sub(r"^```.*?^```$", "```", read(document), flags=re.DOTALL | re.MULTILINE)


def list_blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", read(document), re.DOTALL | re.MULTILINE)


def list_commands(document: str) -> list[str]:
    """Every command of the bash blocks: continued lines joined, comments left out."""
    lines = "".join(list_blocks(document, "bash")).replace("\\\n", " ").splitlines()
    return [" ".join(re.sub(r"(^|\s)#.*$", "", line).split()) for line in lines if line.strip()]


def list_all_commands() -> list[str]:
    return sorted({command for document in DOCUMENTS for command in list_commands(document)})


def list_code_spans(document: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", read_prose(document))


def list_flags(document: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", read(document)))


def list_links(document: str) -> list[tuple[str, str]]:
    """Path and anchor of every link to a file or a heading of ours."""
    links = re.findall(r"\]\(([^)\s]+)\)", read_prose(document))
    return [(link.partition("#")[0], link.partition("#")[2]) for link in links if "://" not in link]


def list_anchors(document: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", read_prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def read_table(document: str, first_cell: str) -> list[list[str]]:
    """The rows of the table whose first row begins with a cell, written as there; they come without code marks."""
    for table in re.findall(r"(?:^\|.*\n)+", read(document), re.MULTILINE):
        _, _, *rows = table.splitlines()
        if rows[0].startswith(f"| {first_cell} |"):
            return [[cell.strip() for cell in row.replace("`", "").strip("|").split("|")] for row in rows]
    raise AssertionError(f"{document}: no table begins with {first_cell}")


def load_script(script: str):
    name = f"{Path(script).stem}_of_docs_test"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / script)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


make_tables = load_script("docs/make_tables.py")
VARIABLES = {
    name: values
    for file in make_tables.RUN_SH
    if (ROOT / file).is_file()
    for name, values in make_tables.read_variables(file).items()
}


def list_known_flags() -> set[str]:
    fields = [field for settings in make_tables.SCRIPTS.values() for field in dataclasses.fields(settings)]
    flags = {f"--{field.name}" for field in fields}
    flags |= {f"--no_{field.name}" for field in fields if field.default is True}
    flags |= {flag for script in (*MAKING, *BENCHMARKS) for flag in re.findall(r'"(--\w+)"[,)]', read(script))}
    return flags | {f"--{lesson}" for lesson in load_script("data/tiny/making/draw_lessons.py").LESSONS}


def find_fault(words: list[str]) -> str | None:
    """What a script's own parser says against a command; nothing is run."""
    try:
        parse_command(words)
    except (UserError, SystemExit) as error:
        return f"{' '.join(words)}: {error}"
    return None


def parse_command(words: list[str]) -> None:
    script, flags = words[0], words[1:]
    if "--help" in flags or script == "docs/make_tables.py":
        return
    if script == "train.py":
        train_settings.parse_train_arguments(flags, "")
    elif script == "report.py":
        parse_report_arguments(flags, "")
    elif script == "data/prepare.py":
        cli.parse_arguments(make_tables.SCRIPTS[f"{script} {flags[0]}"], flags[1:], "")
    elif script in make_tables.SCRIPTS:
        cli.parse_arguments(make_tables.SCRIPTS[script], flags, "")
    else:
        load_script(script).parse_arguments(flags)


@pytest.fixture(autouse=True)
def find_modules_beside_scripts(monkeypatch):
    for folder in ("data", MAKING_FOLDER, "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A checkout whose reader has saved the example recipe of the docs."""
    copy = tmp_path / "checkout"
    for folder in ("configs", "scripts", "meme_llava"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.sh"), *ROOT.glob("*.py"), ROOT / "requirements.txt"]:
        shutil.copy(path, copy)
    (copy / "data").symlink_to(ROOT / "data")
    (block,) = list_blocks("docs/train_types.md", "yaml")
    (copy / "configs" / "train" / "language_lora.yaml").write_text(block, encoding="utf-8")
    monkeypatch.setattr(train_settings, "RECIPE_FOLDER", copy / "configs" / "train")
    return copy


@pytest.fixture
def ssh(tmp_path) -> Path:
    """A folder with an ssh that runs the command here, one after another."""
    stand_in = tmp_path / "bin" / "ssh"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/usr/bin/env bash\nexec flock {tmp_path}/lock bash -c "${{!#}}"\n')
    stand_in.chmod(0o755)
    return stand_in.parent


def test_pages_are_found():
    assert len([document for document in DOCUMENTS if document.startswith("docs/")]) >= 15
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md", "data/tiny/README.md"} <= set(DOCUMENTS)
    chinese = [document for document in DOCUMENTS if document.endswith(".zh-CN.md")]
    assert chinese == sorted(f"{twin}.zh-CN.md" for twin in TWINS)


def test_readme_is_short():
    for document in ("README.md", "README.zh-CN.md"):
        assert len(read(document).splitlines()) <= README_LINES


def test_every_page_can_be_reached_from_the_readme():
    reached, waiting = set(), ["README.md"]
    while waiting:
        document = waiting.pop()
        reached.add(document)
        linked = [os.path.normpath(Path(document).parent / path) for path, _ in list_links(document) if path]
        waiting += [path for path in linked if path in DOCUMENTS and path not in reached]
    assert sorted(set(DOCUMENTS) - reached) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for path, anchor in list_links(document):
        target = os.path.normpath(Path(document).parent / path) if path else document
        assert (ROOT / target).exists(), f"{document} links {path}"
        assert not anchor or anchor in list_anchors(target), f"{document} links {path}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_paths_exist(document):
    folders = (
        ROOT,
        (ROOT / document).parent,
        *(ROOT / folder for folder in ("meme_llava", "data", MAKING_FOLDER, "benchmarks")),
    )
    spans = {
        span.rstrip("/")
        for span in list_code_spans(document)
        if re.fullmatch(r"[\w.][\w.*-]*(/[\w.*-]+)*/?", span)
        and ("/" in span or span.endswith(ENDINGS_OF_OUR_FILES))
        and span not in HUB_IDS
        and not span.startswith(MADE_BY_RUNS)
    }
    assert sorted(span for span in spans if not any(any(folder.glob(span)) for folder in folders)) == []


def test_images_are_there_and_small():
    images = [path for folder in ("docs", "docs/images") for path in (ROOT / folder).glob("*.*g")]
    assert len(images) >= 2
    assert [path.name for path in images if path.stat().st_size > IMAGE_BYTES] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_flags_exist(document):
    known = list_known_flags()
    assert len(known) >= 50
    assert sorted(list_flags(document) - known - FOREIGN_FLAGS) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_variables_exist(document):
    spans = [re.fullmatch(r"([A-Z][A-Z0-9_]*[A-Z0-9])(?:=.*)?", span) for span in list_code_spans(document)]
    names = {match.group(1) for match in spans if match}
    for command in list_commands(document):
        names |= set(re.findall(r"(?:^|[\s\"])([A-Z][A-Z0-9_]*)=", command))
    assert len(VARIABLES) >= 18
    assert sorted(names - set(VARIABLES) - FOREIGN_VARIABLES - REAL_WEIGHTS_VARIABLES - OTHER_NAMES) == []


def test_help_of_run_sh_names_every_variable():
    result = subprocess.run(["bash", "run.sh", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert [name for name in VARIABLES if name not in result.stdout] == []


def test_python_commands_parse():
    # A benchmark's shell script hands its flags to the Python script of the same name.
    commands = [re.sub(r"^bash (benchmarks/\w+)\.sh", r"python \1.py", command) for command in list_all_commands()]
    commands = [command for command in commands if command.startswith("python ")]
    assert len(commands) >= 30
    # A shortened command cannot be copied, so there is none.
    assert [command for command in commands if "…" in command or "..." in command] == []
    faults = []
    for command in commands:
        words = shlex.split(command)[1:]
        faults.append(find_fault(words))
        assert [word for word in words if word.startswith(("data/", "configs/")) and not (ROOT / word).exists()] == []
    assert [fault for fault in faults if fault] == []


def test_stages_without_run_sh_read_what_the_one_before_wrote():
    (block,) = [block for block in list_blocks("docs/outputs.md", "bash") if "build_base_model.py" in block]
    build, train, merge = (split_flags(shlex.split(line)) for line in block.replace("\\\n", " ").splitlines())
    assert [stage[0][1] for stage in (build, train, merge)] == ["build_base_model.py", "train.py", "merge_lora.py"]
    assert train[1]["model"] == build[1]["output_dir"]
    assert merge[1]["adapter"] == train[1]["output_dir"]
    assert "resume_from_checkpoint" not in train[1]  # which is an error in an empty folder


def test_run_sh_commands_pass_a_dry_run(checkout, ssh, eight_gpus):
    commands = [command for command in list_all_commands() if re.search(r"\bbash run\.sh\b", command)]
    assert len(commands) >= 15
    # GPUS=cpu: what is read here must not depend on the tester's GPUs. A command may set its own.
    environment = {
        name: value for name, value in os.environ.items() if name not in {*VARIABLES, "CUDA_VISIBLE_DEVICES"}
    }
    environment |= {"DRY_RUN": "1", "GPUS": "cpu", "PATH": f"{ssh}:{os.environ['PATH']}"}
    environment |= {"PYTHONPATH": str(eight_gpus)}
    faults = []
    for command in commands:
        result = subprocess.run(
            ["bash", "-c", command], cwd=checkout, env=environment, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 0 and "torch sees" not in result.stderr, f"{command}: {result.stderr}"
        printed = [shlex.split(line) for line in result.stdout.splitlines()]
        assert printed, command
        for words in printed:
            script = next(place for place, word in enumerate(words) if word in make_tables.SCRIPTS)
            faults.append(find_fault(words[script:]))
    assert len(faults) >= 20
    assert [fault for fault in faults if fault] == []


def test_other_commands_are_known():
    others = {
        command
        for command in list_all_commands()
        if not re.search(r"^python |^bash benchmarks/|\bbash (tests/)?run\.sh\b", command)
    }
    assert others == {
        "source .venv/bin/activate",
        "pip install -r data/requirements.txt",
        "pip install -r requirements.txt",
        "pip install -r configs/requirements/gguf.txt",
        "pip install -r configs/requirements/other_models.txt",
        "pip install -r configs/requirements/trackers.txt",
        "pip install -r configs/requirements/four_bit.txt",
        "pip install -r requirements.txt -r configs/requirements/demo.txt",
        "ANNOTATIONS=train.json EVAL_ANNOTATIONS=val.json IMAGE_FOLDER=/data/memes CAPTIONS=captions.jsonl "
        "bash benchmarks/real_weights.sh output/real_weights",
        "PRECISION=bf16 bash benchmarks/real_weights.sh output/real_weights",
        # Downloads, which no test runs.
        "export HF_ENDPOINT=https://hf-mirror.com",
        "hf download REILX/chinese-meme-description-dataset --repo-type dataset --local-dir /data/memes/captions "
        '--exclude "*gemini-1_0*"',
        "cp -r data/images /data/memes",
        "hf download SWHL/ChineseOCRBench --repo-type dataset --local-dir /data/parquet/ChineseOCRBench",
        "git clone --depth 1 https://github.com/LLM-Red-Team/emo-visual-data /data/memes/emo-visual-data",
        "git clone --depth 1 https://github.com/zhaoolee/ChineseBQB /data/memes/ChineseBQB",
        "export GEMINI_API_KEY=your-key",
        "tensorboard --logdir output/train/tensorboard",
        # tests/inference/test_serve.py starts the same server with the same flags.
        "pip install 'openai>=3.54,<4' 'fastapi>=0.165,<1' 'uvicorn>=0.54,<1'",
        "transformers serve output/merged --host 127.0.0.1 --port 8000 --device cpu --dtype float32 "
        "--chat-template-kwargs '{\"sanitize_control_tokens\": true}'",
        "vllm serve output/served --host 127.0.0.1 --port 8000 --max-model-len 4096",
        "vllm serve output/served_lora --host 127.0.0.1 --port 8000 --max-model-len 4096 --enable-lora "
        "--max-lora-rank 32 --lora-modules memes=output/served_lora/language_lora",
        "llama-server -m output/served_gguf/language.gguf --mmproj output/served_gguf/mmproj.gguf --host 127.0.0.1 "
        "--port 8000",
        "ollama create memes -f output/served_gguf/Modelfile",
        "ollama run memes '这张表情包写了什么，是什么意思？ data/images/meme_000000.jpg'",
    }


def test_generated_tables_are_up_to_date():
    stale = [path.name for path, text in make_tables.make_documents().items() if path.read_text("utf-8") != text]
    assert stale == [], "run: python docs/make_tables.py"


@pytest.mark.parametrize("document", ["README.md", "README.zh-CN.md"])
def test_settings_of_the_readme_are_those_of_run_sh(document):
    rows = read_table(document, "`LANGUAGE_MODEL`")
    assert len(rows) >= 10
    for name, default, published, _ in rows:
        assert (default, None if published == "–" else published) == VARIABLES[name][:2], name


def test_variables_in_other_tables_have_their_defaults():
    for name, default, _ in read_table("docs/multi_gpu.md", "`NNODES`"):
        assert VARIABLES[name][0] in (default, "")


def test_quoted_messages_are_in_the_code():
    sources = [
        *ROOT.glob("*.py"),
        *ROOT.glob("data/*.py"),
        *ROOT.glob("*.sh"),
        *ROOT.glob("meme_llava/**/*.py"),
        *ROOT.glob("scripts/*.sh"),
    ]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # a message that spans two literals is one
    code = code.replace("{RUN_RECORD}", RUN_RECORD).replace("{MANIFEST}", MANIFEST)
    code = re.sub(r"\$\w+|\$\(\(.*?\)\)|\{[^{}\n]*\}", "…", code).replace("'…'", "…")
    table = read("docs/troubleshooting.md").split("## Messages")[1].split("\n## ")[0]
    messages = [quoted for row in re.findall(r"^\| (.*?) \|", table, re.MULTILINE) for quoted in row.split("`")[1:2]]
    assert len(messages) >= 35
    missing = []
    for message in messages:
        fragments = [part for part in message.replace("'…'", "…").split("…") if part.strip()]
        if not fragments or not re.search(r"[^\n]*?".join(re.escape(part) for part in fragments), code):
            missing.append(message)
    assert missing == []


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if list_blocks(document, "json")])
def test_example_records_are_accepted(document):
    records = [json.loads(block) for block in list_blocks(document, "json")]
    assert len(records) >= (5 if document.startswith("data/") else 1)
    for record in records:
        for image in parse_record(record, document).images:
            assert (ROOT / "data" / image).is_file()


def test_kinds_that_may_be_allowed_are_those_of_the_check():
    (sentence,) = [line for line in read("docs/data_check.md").splitlines() if line.startswith("- `--allow`")]
    assert {name for name in re.findall(r"`(\w+)`", sentence) if name in KINDS} == ALLOWABLE


def test_table_of_questions_is_that_of_prepare():
    rows = read_table("docs/data_preparation.md", DESCRIBE[0])
    assert [row[0] for row in rows] == [*DESCRIBE, *READ]
    assert {row[1] for row in rows[: len(DESCRIBE)]} == {"a caption"}
    assert {row[1] for row in rows[len(DESCRIBE) :]} == {"the words"}


def test_tables_of_describe_and_prepare_are_theirs():
    document = "docs/data_preparation.md"
    assert [row[0] for row in read_table(document, "`captions`")] == list(load_script("data/prepare.py").COMMANDS)
    assert [row[0] for row in read_table(document, "`refusal`")] == list(REASONS)
    rows = read_table(document, "`gpt-4o`")
    assert [row[0] for row in rows] == list(PRESETS)
    for name, model, variable in rows:
        preset = PRESETS[name]
        # The local server's model is the user's, and it needs no key.
        assert (model, variable) == (preset.model, preset.key_variable) or name == "local"
    assert PRESETS["local"].model is PRESETS["local"].key_variable is None


def test_tables_of_presets_and_train_types_are_complete():
    for first, folder in (("`v1`", "configs/presets"), ("`lora`", "configs/train")):
        named = {row[0] for row in read_table("docs/train_types.md", first)}
        assert named == {path.stem for path in (ROOT / folder).glob("*.yaml")}
    engines = {row[0] for row in read_table("docs/multi_gpu.md", "`single`")}
    files = {path.stem for folder in ("deepspeed", "fsdp") for path in (ROOT / "configs" / folder).glob("*.json")}
    assert engines == {"single", "ddp", *files}


@pytest.mark.parametrize("twin", TWINS)
def test_both_languages_say_the_same(twin):
    english, chinese = f"{twin}.md", f"{twin}.zh-CN.md"
    assert list_commands(english) == list_commands(chinese)
    assert list_flags(english) == list_flags(chinese)

    def list_shape(document: str) -> list[str]:
        """Headings, table rows and list items, in order, without their words."""
        return re.findall(r"^(#+ |\||- |```)", read_prose(document), re.MULTILINE)

    def list_numbers(document: str) -> set[str]:
        numbers = re.findall(r"(?<![\w.,])\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?", read_prose(document))
        return {SAME_NUMBER.get(number, number) for number in numbers}

    assert list_shape(english) == list_shape(chinese)
    assert sorted(list_numbers(english) ^ list_numbers(chinese)) == []
    # Settings, file names and messages are quoted alike; links differ by their language.
    spans = [{span.replace(".zh-CN", "") for span in list_code_spans(document)} for document in (english, chinese)]
    assert sorted(spans[0] ^ spans[1]) == []
