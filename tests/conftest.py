"""A tiny world built with the product's own code: images, records, two towers, a base model, a trained adapter."""

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# What tests find in images is remembered for this session alone.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="meme_llava_tests_")

# Torch and transformers are loaded where they are used: the process that deals out the tests needs neither.
import pytest  # noqa: E402
from local_server import find_free_port, wait_until_listening  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

import build_base_model  # noqa: E402
import merge_lora  # noqa: E402
import train  # noqa: E402
from meme_llava.errors import CheckpointError  # noqa: E402
from meme_llava.storage.run_record import MANIFEST, describe_file, verify_directory, write_manifest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
LANGUAGE_DIMENSIONS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
}
VISION_DIMENSIONS = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
CHROMIUM = Path("/usr/bin/chromium")
BROWSER_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
IMAGE_SIZE = 28  # 2 x 2 patches: 4 image tokens
LINES = ["我太难了", "好耶", "摸鱼中", "收到", "今天也要加油鸭", "别催了", "困", "爱了爱了"]


@dataclass(frozen=True)
class World:
    folder: Path
    annotations: Path
    image_folder: Path
    language_model: Path
    vision_tower: Path
    base: Path
    records: list


def make_records() -> list[dict]:
    """Eight records: one image each, but for a two-turn one, one with two images and one of text only."""
    records = []
    for index, line in enumerate(LINES):
        records.append(
            {
                "id": f"r{index}",
                "image": f"p{index}.png",
                "conversations": [
                    {"from": "human", "value": "<image>\n图里写了什么？"},
                    {"from": "gpt", "value": f"写着“{line}”。"},
                ],
            }
        )
    records[1]["conversations"] += [{"from": "human", "value": "什么意思？"}, {"from": "gpt", "value": "很开心。"}]
    records[2]["image"] = ["p2.png", "p3.png"]
    records[2]["conversations"][0]["value"] = "<image>和<image>\n有什么不同？"
    del records[3]["image"]
    records[3]["conversations"][0]["value"] = "你好"
    return records


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    images = folder / "images"
    images.mkdir()
    for index in range(len(LINES)):
        image = Image.new("RGB", (40, 30), (30 * index, 255 - 30 * index, 128))
        ImageDraw.Draw(image).ellipse((index, index, 20 + index, 20), fill="black")
        image.save(images / f"p{index}.png")
    records = make_records()
    annotations = folder / "annotations.json"
    annotations.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    texts = [turn["value"] for record in records for turn in record["conversations"]]
    from make_towers import make_language_model, make_vision_tower

    make_language_model(folder / "language_model", texts, seed=0, **LANGUAGE_DIMENSIONS)
    make_vision_tower(folder / "vision_tower", IMAGE_SIZE, seed=0, **VISION_DIMENSIONS)
    base = folder / "base"
    build_base_model.main(
        [
            *("--language_model", str(folder / "language_model")),
            *("--vision_model", str(folder / "vision_tower")),
            *("--output_dir", str(base)),
        ]
    )
    # A training collects garbage several times; what the libraries have loaded need not be looked through each time.
    gc.collect()
    gc.freeze()
    return World(folder, annotations, images, folder / "language_model", folder / "vision_tower", base, records)


def train_flags(world: World, output_dir: Path, **changes) -> list[str]:
    """A complete command line of train.py on the tiny world; `changes` replace or add settings, None removes one."""
    settings = {
        "model": world.base,
        "annotations": world.annotations,
        "image_folder": world.image_folder,
        "output_dir": output_dir,
        "train_type": "lora",
        "num_train_epochs": 1,
        "high_lr": 1e-2,
        "low_lr": 5e-3,
        "lora_r": 4,
        "lora_alpha": 8,
        "warmup_ratio": 0.0,
        "model_max_length": 200,
        "global_batch_size": 4,
        "device_batch_size": 4,
        "dataloader_workers": 0,
        "report_to": "none",
        **changes,
    }
    flags = []
    for name, value in settings.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            flags += [f"--{name}", *map(str, values)]
    return flags


@pytest.fixture(scope="session")
def trained(world) -> Path:
    """The output of two LoRA steps."""
    output_dir = world.folder / "trained"
    train.main(train_flags(world, output_dir))
    return output_dir


@pytest.fixture(scope="session")
def served_model(world, trained) -> Path:
    """The model of `trained`, merged for serving."""
    output_dir = world.folder / "served"
    merge_lora.main(["--adapter", str(trained), "--output_dir", str(output_dir), "--export", "clip"])
    return output_dir


@pytest.fixture(scope="session")
def server(served_model, tmp_path_factory):
    """The address of `transformers serve` that has loaded the merged model."""
    for module in ("fastapi", "uvicorn"):
        pytest.importorskip(module, reason="transformers serve needs the packages of tests/requirements.txt")
    port = find_free_port()
    command = [
        *(sys.executable, "-m", "transformers.cli.transformers", "serve", str(served_model)),
        *("--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"),
        *("--chat-template-kwargs", '{"sanitize_control_tokens": true}'),
    ]
    # One thread, as conftest gives this process: sums in another order could turn a close choice of a token.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until_listening(process, port, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait(timeout=10)


# Not for the whole session: while playwright runs, nothing else can run an event loop in this thread.
@pytest.fixture(scope="module")
def browser():
    """A headless browser; the test skips where Debian's chromium or the playwright package is absent."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the playwright package (a browser test)")
    if not CHROMIUM.exists():
        pytest.skip(f"needs {CHROMIUM} (a browser test)")
    with playwright.sync_playwright() as manager:
        browser = manager.chromium.launch(executable_path=str(CHROMIUM), args=BROWSER_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def answerer(served_model):
    """The merged model, as infer.py loads it."""
    from meme_llava.inference.generation import load_answerer

    return load_answerer(served_model, device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def quick_curves(request, monkeypatch):
    """Drawing its curves takes as long as a training here; the first one draws them, and every one under a launcher."""
    if "world" in request.fixturenames:
        monkeypatch.setattr("meme_llava.train.loop.draw_training_curves", lambda log_history, path: path.touch())


@pytest.fixture(autouse=True)
def fresh_accelerator(request, monkeypatch):
    """A process trains once; that of the tests does it again and again, each time with another accelerator."""
    if "world" in request.fixturenames:
        from accelerate.state import AcceleratorState

        from meme_llava.train import prepared_run

        def choose_device(engine, choose=prepared_run.choose_device):
            AcceleratorState._reset_state(reset_partial_state=True)
            return choose(engine)

        monkeypatch.setattr(prepared_run, "choose_device", choose_device)


@pytest.fixture(autouse=True)
def one_thread():
    # Sums in another order differ in the last bit; one thread keeps every run the same.
    import torch

    torch.set_num_threads(1)


def reseal(folder: Path, facts: dict | None = None) -> None:
    """Write the manifest of a training output anew, as if its present files were those that training wrote."""
    try:
        verify_directory(folder)
    except CheckpointError:
        names = [path.name for path in folder.iterdir() if path.is_file() and path.name != MANIFEST]
        write_manifest(folder, {name: describe_file(folder / name) for name in names}, facts or {})


@pytest.fixture
def eight_gpus(tmp_path) -> Path:
    """A folder with a torch that sees the eight GPUs of the published run, for PYTHONPATH: the real one is slow."""
    package = tmp_path / "packages" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from types import SimpleNamespace\nversion = SimpleNamespace(cuda='12.8')\n")
    (package / "cuda.py").write_text("is_available = lambda: True\ndevice_count = lambda: 8\n")
    return package.parent


def read_losses(output_dir: Path) -> list[float]:
    """The loss of every logged step of a finished run."""
    state = json.loads((output_dir / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def run_drawing(script: str, folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """Draw with a script of data/tiny/making into `folder`; the test skips where no font can draw Chinese."""
    command = [sys.executable, str(ROOT / "data" / "tiny" / "making" / script), "--output_dir", str(folder), *flags]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "No font with Chinese characters" in process.stderr:
        pytest.skip("no Chinese font is installed; apt install fonts-noto-cjk")
    return process


def encode_example(encoder, turns, max_length=None):
    """Ids and labels of a conversation, every image token repeated, and how many positions were cut."""
    tokens = encoder.encode_tokens(turns, max_length)
    ids, labels = tokens.spread(encoder.image_token_id, encoder.tokens_per_image)
    return SimpleNamespace(input_ids=ids.tolist(), labels=labels.tolist(), cut_tokens=tokens.cut_tokens)
