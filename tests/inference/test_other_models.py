"""Others than our models answer an evaluation: a server, a model of transformers, a text recogniser."""

import importlib.util
import json
import os
import signal

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

pytest.importorskip("openai", reason="configs/requirements/other_models.txt is not installed")
pytest.importorskip("rapidocr", reason="configs/requirements/other_models.txt is not installed")

from caption_server import CUT_CONNECTION, CaptionServer, Step, answer, fail, find_image  # noqa: E402

import evaluate  # noqa: E402
from meme_llava.dataset.images import open_image  # noqa: E402
from meme_llava.evaluate.answer_sources import NOTHING_FOUND  # noqa: E402
from meme_llava.inference.asking import ask_all  # noqa: E402
from meme_llava.inference.endpoints import Endpoint  # noqa: E402
from meme_llava.inference.generation import load_answerer, load_transformers_model  # noqa: E402
from meme_llava.inference.questions import Question  # noqa: E402

KEY, KEY_VARIABLE = "sk-canary-0123456789abcdef", "EVALUATION_TEST_KEY"
QUESTION, SYSTEM = "图片里写了什么？", "你只说图里的字。"
WIDTHS = (50, 51, 52, 53)  # by which the server knows the images


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def make_record(name, text, reference=None, system=None):
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": reference or text}]
    if system is not None:
        turns.insert(0, {"from": "system", "value": system})
    return {"id": name, "image": name, "text": text, "task": "text", "conversations": turns}


@pytest.fixture
def asked(tmp_path):
    """Flags that ask about four images; the first record has a system prompt."""
    records = []
    for width in WIDTHS:
        Image.new("RGB", (width, 40), "white").save(tmp_path / f"{width}.png")
        records.append(make_record(f"{width}.png", "好耶", system=SYSTEM if width == WIDTHS[0] else None))
    (tmp_path / "annotations.json").write_text(json.dumps(records, ensure_ascii=False))
    return [
        *("--annotations", str(tmp_path / "annotations.json"), "--image_folder", str(tmp_path)),
        *("--output_dir", str(tmp_path / "scores")),
    ]


def ask_server(asked, server, *flags):
    endpoint = ["--answer_with", "endpoint", "--base_url", server.url, "--model", "m", "--key_variable", KEY_VARIABLE]
    evaluate.main([*asked, *endpoint, *flags])


def read_rows(folder):
    return [json.loads(line) for line in (folder / "scores" / "predictions.jsonl").read_text().splitlines()]


def test_a_server_answers(asked, tmp_path, capsys):
    script = {
        50: [answer("好耶", delay=0.3)],  # the first answer comes last
        51: [CUT_CONNECTION, fail(503), answer("上面写着好耶", finish_reason="length")],
        52: [fail(400, "no such image")],
        53: [answer(None, refusal="我不想说")],
    }
    with CaptionServer(script) as server:
        ask_server(asked, server, "--max_new_tokens", "77", "--batch_size", "4")
    rows = read_rows(tmp_path)
    assert [(row["answer"], row["tokens"], row["stopped"], row["problem"]) for row in rows] == [
        ("好耶", 10, True, None),
        ("上面写着好耶", 10, False, None),
        ("", None, None, "rejected: HTTP 400: no such image"),
        ("", 10, None, "refusal: 我不想说"),
    ]
    first = next(body for body in server.bodies if len(body["messages"]) == 2)
    assert first["messages"][0] == {"role": "system", "content": SYSTEM}
    assert first["messages"][1]["content"][1] == {"type": "text", "text": QUESTION}
    assert first["max_tokens"] == 77 and first["temperature"] == 0
    assert server.most_open > 1
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    metrics = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert metrics["asked"]["temperature"] == 0
    assert metrics["title"] == f"m at {server.url.split('/')[2]}"
    assert metrics["scores"]["texts_right"] == {"value": 0.25, "low": 0.0, "high": 0.75, "count": 4}
    printed = capsys.readouterr().out
    assert "2 of 4 questions not answered, which counts as an empty answer:" in printed
    assert "52.png: rejected: HTTP 400: no such image" in printed
    assert not any(KEY in path.read_text() for path in (tmp_path / "scores").iterdir())


def test_a_server_sees_the_pixels_that_our_models_see(asked, tmp_path):
    """JPEG changes them, and an answer now and then."""
    path = tmp_path / f"{WIDTHS[0]}.png"
    Image.effect_noise((WIDTHS[0], 40), 99).convert("RGB").save(path)
    with CaptionServer(default=answer("好耶")) as server:
        ask_server(asked, server, "--limit", "1")
        assert find_image(server.bodies[0]).tobytes() == open_image(path).tobytes()


def test_answers_that_came_are_kept_when_a_server_falls_silent(asked, tmp_path, capsys):
    with CaptionServer({52: [fail(503, "busy")]}) as server:
        with pytest.raises(SystemExit) as stop:
            ask_server(asked, server, "--batch_size", "1")
        assert stop.value.code == 2
        printed = capsys.readouterr().err
        assert "gave no answer, the last time: unanswered: HTTP 503: busy. What was answered is kept" in printed
        assert server.count(52) == 5
        assert len(read_rows(tmp_path)) == 2
        server.script.clear()
        ask_server(asked, server)
        assert server.count(50) == server.count(51) == 1
    assert len(read_rows(tmp_path)) == 4
    assert "2 of 4 questions are done already" in capsys.readouterr().out


def test_one_image_without_an_answer_does_not_stand_in_the_way(asked, tmp_path):
    """A gateway that fails on one image would fail on it again."""
    script = {51: [Step('{"choices": []}')], 52: [answer("", finish_reason="length")]}
    script[53] = [answer("半句", finish_reason="content_filter")]
    with CaptionServer(script, answer("好耶")) as server:
        ask_server(asked, server)
    first, second, third, fourth = read_rows(tmp_path)
    assert (first["answer"], first["problem"]) == ("好耶", None)
    assert second["problem"].startswith("unanswered: status 200, but no completion")
    assert third["problem"] == "cut: no text, finish_reason 'length'"
    assert fourth["problem"] == "refusal: stopped by the provider’s content filter"


def test_nothing_but_problems_is_no_score(asked, tmp_path, capsys):
    with CaptionServer(default=fail(400, "no images here")) as server, pytest.raises(SystemExit) as stop:
        ask_server(asked, server)
    assert stop.value.code == 2
    assert "no question was answered, at first: rejected: HTTP 400: no images here" in capsys.readouterr().err
    assert not (tmp_path / "scores" / "metrics.json").exists()


def test_a_key_that_is_not_accepted_stops_at_once(asked, capsys):
    with CaptionServer(default=fail(401, "bad key")) as server, pytest.raises(SystemExit) as stop:
        ask_server(asked, server, "--batch_size", "1")
    assert stop.value.code == 2
    assert "the key is not accepted" in capsys.readouterr().err
    assert len(server.requests) == 1


def test_ctrl_c_keeps_the_answers_that_came(asked, tmp_path, monkeypatch, capsys):
    # On a busy machine an answer that is ready takes a while to be read.
    monkeypatch.setattr("meme_llava.inference.asking.GRACE_SECONDS", 2)
    with CaptionServer({52: [answer(delay=5)]}) as server:
        server.on_request = lambda count: os.kill(os.getpid(), signal.SIGINT) if count == 4 else None
        with pytest.raises(SystemExit) as stop:
            ask_server(asked, server)
        assert stop.value.code == 130
        assert [row["image"] for row in read_rows(tmp_path)] == ["50.png", "51.png"]
        assert "2 of 4 questions are done; the same command goes on" in capsys.readouterr().err
        server.script.clear()
        ask_server(asked, server)
    assert len(read_rows(tmp_path)) == 4


def test_ctrl_c_while_an_answer_is_written_loses_no_other(tmp_path):
    for width in WIDTHS[:2]:
        Image.new("RGB", (width, 40), "white").save(tmp_path / f"{width}.png")
    questions = [Question(tmp_path / f"{width}.png", QUESTION) for width in WIDTHS[:2]]
    with CaptionServer({50: [answer("甲")], 51: [answer("乙", delay=0.5)]}) as server:
        answers = ask_all(Endpoint(server.url, "m"), questions, concurrency=2, max_new_tokens=8, timeout=9)
        assert next(answers)[1].text == "甲"
        os.kill(os.getpid(), signal.SIGINT)
        assert next(answers)[1].text == "乙"
        with pytest.raises(KeyboardInterrupt):
            next(answers)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_model_of_transformers_answers(asked, served_model, tmp_path):
    """Our own merged model, through its chat template: the same answers as by our prompt."""
    evaluate.main([*asked, "--answer_with", "transformers", "--model", str(served_model), "--max_new_tokens", "8"])
    answerer = load_answerer(served_model, device="cpu", dtype="float32")
    for width, row in zip(WIDTHS, read_rows(tmp_path), strict=True):
        image = open_image(tmp_path / f"{width}.png", answerer.processing.image_policy)
        system = SYSTEM if width == WIDTHS[0] else None
        expected = answerer.answer(image, QUESTION, system, max_new_tokens=8)
        assert (row["answer"], row["tokens"]) == (expected.text, expected.tokens)
        assert row["stopped"] == expected.stopped


def test_a_folder_that_is_no_such_model_is_refused(asked, world, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*asked, "--answer_with", "transformers", "--model", str(world.language_model)])
    assert stop.value.code == 2
    assert "cannot be loaded as an image-text-to-text model of transformers" in capsys.readouterr().err


def test_a_text_recogniser_answers_what_is_written(tmp_path, capsys):
    image = Image.new("RGB", (320, 160), "white")
    font = ImageFont.load_default(size=48)
    ImageDraw.Draw(image).multiline_text((20, 20), "HELLO\nWORLD 42", "black", font, spacing=20)
    image.save(tmp_path / "words.png")
    Image.new("RGB", (320, 160), "white").save(tmp_path / "empty.png")
    records = [
        make_record("words.png", "HELLO WORLD 42"),
        make_record("empty.png", "", NOTHING_FOUND),
        make_record("words.png", "HELLO WORLD 42", "很开心"),
    ]
    (tmp_path / "annotations.json").write_text(json.dumps(records, ensure_ascii=False))
    evaluate.main(
        [
            *("--answer_with", "rapidocr", "--annotations", str(tmp_path / "annotations.json")),
            *("--image_folder", str(tmp_path), "--output_dir", str(tmp_path / "scores")),
        ]
    )
    rows = read_rows(tmp_path)
    assert [row["answer"].upper().replace(" ", "") for row in rows] == ["HELLO\nWORLD42", NOTHING_FOUND]
    scores = json.loads((tmp_path / "scores" / "metrics.json").read_text())["scores"]
    assert scores["character_error_rate"]["value"] == 0.0
    assert scores["no_text_right"]["value"] == 1.0
    assert "RapidOCR is asked the 2 of 3 questions whose answer is the text" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer_with", "package", "message"),
    [
        ("rapidocr", "rapidocr", "--answer_with rapidocr needs rapidocr: pip install -r"),
        ("endpoint", "openai", "asking a server needs openai: pip install -r"),
    ],
)
def test_a_missing_package_is_named(asked, monkeypatch, answer_with, package, message, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*asked, "--answer_with", answer_with])
    assert stop.value.code == 2
    assert f"{message} configs/requirements/other_models.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--answer_with", "meme_llava"], "--answer_with meme_llava needs --model"),
        (["--model", "m", "--preset", "local"], "--preset has no use with --answer_with meme_llava"),
        (["--answer_with", "rapidocr", "--model", "m"], "--model has no use with --answer_with rapidocr"),
        (["--model", "m", "--temperature", "1"], "--temperature has no use with --answer_with meme_llava"),
        (["--answer_with", "endpoint", "--device", "cpu"], "--device has no use with --answer_with endpoint"),
        (["--answer_with", "endpoint"], "give --preset (gpt-4o, gemini, claude, yi-vision, glm, local) or --base_url"),
        (["--answer_with", "endpoint", "--preset", "local"], "give --model: the name by which the server at"),
        (["--answer_with", "endpoint", "--timeout", "0"], "--timeout is 0.0, expected greater than 0"),
    ],
)
def test_settings_without_use_are_refused(asked, flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*asked, *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def make_original_llava(folder, start=""):
    """A tiny random model with the parts of llava-hf/llava-1.5-7b-hf: CLIP, Llama, its processor and chat template."""
    words = Tokenizer(
        WordLevel({word: place for place, word in enumerate(["<unk>", "<s>", "</s>", "<pad>", "<image>"])})
    )
    words.add_tokens([*"USER: ASSISTANT:".split(), *QUESTION, "\n"])
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=28, patch_size=14, **sizes),
        text_config=LlamaConfig(vocab_size=len(tokenizer), eos_token_id=2, pad_token_id=3, **sizes),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = LlavaForConditionalGeneration(config)
    # A published model may ask for sampling; scores need the likeliest answer.
    model.generation_config.update(do_sample=True, temperature=0.2, top_p=0.9, eos_token_id=2)
    model.save_pretrained(folder)
    size = {"height": 28, "width": 28}
    images = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
    template = (
        f"{start}"
        "{% for message in messages %}{{ message['role'].upper() }}: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


@pytest.mark.parametrize("start", ["", "<s>"])
def test_a_prompt_begins_once(tmp_path, start):
    """Whether the template or the tokenizer writes the token of the beginning."""
    make_original_llava(tmp_path, start)
    model = load_transformers_model(tmp_path, "cpu", "float32")
    image = Image.new("RGB", (40, 30))
    ids = model.build_inputs([image], [Question(tmp_path / "a.png", QUESTION)])["input_ids"][0].tolist()
    assert ids[0] == 1 and ids.count(1) == 1


def test_the_original_llava_answers_the_same_in_every_batch(asked, tmp_path):
    make_original_llava(tmp_path / "llava")
    answers = []
    for batch_size in ("1", "4"):
        flags = ["--answer_with", "transformers", "--model", str(tmp_path / "llava"), "--max_new_tokens", "6"]
        evaluate.main([*asked, *flags, "--batch_size", batch_size, "--overwrite"])
        answers.append([(row["answer"], row["tokens"]) for row in read_rows(tmp_path)])
    assert answers[0] == answers[1]
    assert any(text for text, _ in answers[0])
