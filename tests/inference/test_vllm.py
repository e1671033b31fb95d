"""vLLM answers about an image with what merge_lora.py exports for it as infer.py does."""

import base64
import io
import os
import shutil
import sys
from pathlib import Path

import pytest
from conftest import LANGUAGE_DIMENSIONS, ROOT, train_flags
from conversions import build, make_siglip, merge
from make_towers import make_language_model
from PIL import Image

import train
from meme_llava.errors import UserError
from meme_llava.inference.generation import load_answerer

openai = pytest.importorskip("openai", reason="needs the packages of data/requirements.txt")
sys.path.insert(0, str(ROOT / "benchmarks"))

import serve_with_vllm  # noqa: E402

PROGRAM = os.environ.get("VLLM") or shutil.which("vllm")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        PROGRAM is None,
        reason="needs vLLM: benchmarks/serve_with_vllm.sh installs it; set VLLM to DIR/vllm/bin/vllm",
    ),
]
QUESTION = "图里写了什么？"
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def language_model(world, tmp_path_factory):
    """Heads of 32 numbers: vLLM's attention for CPUs takes no head of 16, which the other tests' models have."""
    folder = tmp_path_factory.mktemp("language_model")
    texts = [turn["value"] for record in world.records for turn in record["conversations"]]
    make_language_model(folder, texts, seed=0, **{**LANGUAGE_DIMENSIONS, "hidden_size": 64})
    return folder


def draw(width, height):
    """Stripes and a slope of colours, so that every way to make a square of them shows another thing."""
    image = Image.linear_gradient("L").resize((width, height))
    stripes = Image.new("L", (width, height))
    stripes.paste(255, (width // 4, 0, width // 2, height))
    return Image.merge("RGB", (image, stripes, image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)))


# Wide, tall, square, and smaller than the tower's 28 pixels.
IMAGES = [draw(90, 40), draw(40, 90), draw(28, 28), draw(12, 20)]


def export(base, world, folder, kind):
    """Some steps of training, so that every part has changed, and what comes of it for vLLM."""
    trained = folder / "trained"
    train.main(train_flags(world, trained, model=base, max_steps=4, model_max_length=1000))
    merge(["--adapter", str(trained), "--output_dir", str(folder / "served"), "--export", kind, "--dtype", "float32"])
    return folder / "served"


def check_answers(served, answerer, log):
    """Hold vLLM's greedy answers against those of infer.py."""
    seen = set()
    with (
        serve_with_vllm.serve(Path(PROGRAM), served, log, "float32") as (url, name),
        openai.OpenAI(base_url=url, api_key="none", timeout=300, max_retries=0) as client,
    ):
        for image in IMAGES:
            png = io.BytesIO()
            image.save(png, "PNG")
            address = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
            content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": QUESTION}]
            reply = client.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": content}],
                temperature=0,
                max_tokens=NEW_TOKENS,
                extra_body={"return_token_ids": True},
            )
            ours = answerer.answer(image, QUESTION, max_new_tokens=NEW_TOKENS)
            assert reply.usage.prompt_tokens == answerer.build_inputs(image, QUESTION)["input_ids"].shape[1]
            # Its text leaves out an end that is half a character.
            text = answerer.processing.tokenizer.decode(reply.choices[0].token_ids, skip_special_tokens=True)
            assert text.strip() == ours.text
            seen.add(ours.text)
    assert len(seen) > 1, "the image must make a difference, or this test shows nothing"


@pytest.mark.parametrize(("tower", "policy"), [("siglip", "pad"), ("chinese_clip", "crop")])
def test_answers_are_those_of_infer(world, language_model, tmp_path, tower, policy):
    """Squashing is what test_a_language_models_lora_is_served does."""
    vision = world.vision_tower
    if tower == "siglip":
        make_siglip(vision := tmp_path / "tower")
    base = build(language_model, vision, tmp_path / "base", "--image_policy", policy)
    served = export(base, world, tmp_path, "none" if tower == "siglip" else "clip")
    check_answers(served, load_answerer(served, device="cpu", dtype="float32"), tmp_path / "log.txt")


def test_a_language_models_lora_is_served(world, language_model, tmp_path):
    base = build(language_model, world.vision_tower, tmp_path / "base")
    served = export(base, world, tmp_path, "vllm_lora")
    answerer = load_answerer(tmp_path / "trained", device="cpu", dtype="float32")
    check_answers(served, answerer, tmp_path / "log.txt")


def test_without_the_export_vllm_refuses_the_tower(world, trained, tmp_path):
    """The day it takes Chinese-CLIP by its name, --export clip can go."""
    merge(["--adapter", str(trained), "--output_dir", str(tmp_path / "merged"), "--no_verify"])
    with pytest.raises(UserError, match="the server does not listen"):
        with serve_with_vllm.serve(Path(PROGRAM), tmp_path / "merged", tmp_path / "log.txt"):
            pass
    assert "Unsupported vision config" in (tmp_path / "log.txt").read_text()


@pytest.mark.skipif(not os.environ.get("MODEL"), reason="needs the first run: set MODEL to its output/train")
def test_the_model_of_the_first_run_gives_the_same_answers(tmp_path):
    """At least 398 of 400, in the dtype in which it is stored."""
    served = tmp_path / "served"
    merge(["--adapter", os.environ["MODEL"], "--output_dir", str(served), "--export", "clip"])
    serve_with_vllm.main(["--vllm", PROGRAM, "--model", str(served), "--work_dir", str(tmp_path)])
