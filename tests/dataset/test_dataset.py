"""No record is dropped, replaced or blamed in silence: each one trains, or is listed with its place and reason."""

import codecs
import copy
import gzip
import json
import random
from pathlib import Path

import pytest
import torch
from conftest import SHARED_DATA
from make_towers import train_tokenizer
from PIL import Image

from meme_llava.dataset import dataset as dataset_module
from meme_llava.dataset.check import write_quarantine
from meme_llava.dataset.collator import PackingCollator
from meme_llava.dataset.conversation import ConversationEncoder, Turn
from meme_llava.dataset.dataset import MemeDataset, TrainingOrder, load_records
from meme_llava.dataset.findings import RecordPolicy
from meme_llava.dataset.images import ImagePolicy
from meme_llava.dataset.records import read_records
from meme_llava.dataset.sampling import BatchShape
from meme_llava.errors import UserError

TOKENS_PER_IMAGE = 4
POLICY = ImagePolicy(size=2, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))  # pixel values are colours / 255


@pytest.fixture(scope="module")
def encoder() -> ConversationEncoder:
    tokenizer = train_tokenizer(["图里写了什么？", "写着“好耶”。"])
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return ConversationEncoder(tokenizer, TOKENS_PER_IMAGE, source="test")


@pytest.fixture
def image_folder(tmp_path) -> Path:
    folder = tmp_path / "images"
    (folder / "a folder").mkdir(parents=True)
    Image.new("RGB", (8, 6), (255, 0, 0)).save(folder / "red.png")
    Image.new("RGB", (8, 6), (0, 0, 255)).save(folder / "blue.png")
    (folder / "error page.jpg").write_text("<!DOCTYPE html><html>404</html>")
    (folder / "loop.png").symlink_to("loop.png")
    Image.new("RGB", (8, 6)).save(tmp_path / "outside.png")
    (folder / "outside.png").symlink_to(tmp_path / "outside.png")
    return folder


def human(value="<image>\n图里写了什么？") -> dict:
    return {"from": "human", "value": value}


def gpt(value="写着“好耶”。") -> dict:
    return {"from": "gpt", "value": value}


def make_record(record_id: str = "r", image="red.png", conversations=None) -> dict:
    return {"id": record_id, "image": image, "conversations": conversations or [human(), gpt()]}


def without_image(conversations) -> dict:
    return {"id": "bad", "conversations": conversations}


def bad(**changes) -> dict:
    return {**make_record("bad"), **changes}


def with_turns(*turns) -> dict:
    return bad(conversations=list(turns))


def write_json(path: Path, records: list) -> Path:
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def load(annotations: Path, image_folder: Path, encoder, bad_records: str = "error", max_length: int = 200):
    # Many tests repeat one record; what becomes of duplicates is tested in test_check.py.
    repeated = RecordPolicy(bad_records=bad_records, allow=["duplicate_id", "duplicate_caption", "too_small"])
    return load_records(annotations, image_folder, repeated, encoder, max_length, POLICY)


def list_bad(loaded) -> list:
    return [finding for findings in loaded.checked.bad.values() for finding in findings]


def ids_of(dataset: MemeDataset) -> list[str]:
    return [dataset[index]["record_id"] for index in range(len(dataset))]


# ---- One unusable record between two good ones ----

ALTERNATE = "'conversations' must alternate human, gpt, human, gpt … and end with gpt"
WRONG_IMAGE = "expected a file name, a list of file names, or no 'image' at all"
NOT_RELATIVE = "is not a path relative to the image folder"

UNUSABLE_RECORDS = {
    "a string": ("hello", "is text, expected an object"),
    "a number": (7, "is a whole number, expected an object"),
    "not a number": (float("nan"), "is a number, expected an object"),
    "null": (None, "is null, expected an object"),
    "a list": ([make_record()], "is a list, expected an object"),
    "empty": ({"id": "bad"}, "has no list 'conversations' (keys: id)"),
    "a caption file's record": (
        {"id": "bad", "picName": "a.jpg", "description": "一只猫"},
        "has no list 'conversations' (keys: id, picName, description). A line of a caption file: python data",
    ),
    "conversations null": (bad(conversations=None), "has no list 'conversations' (keys: id, image, conversations)"),
    "conversations a string": (bad(conversations="hi"), "has no list 'conversations'"),
    "conversations an object": (bad(conversations=human()), "has no list 'conversations'"),
    "conversations empty": (bad(conversations=[]), "has no list 'conversations'"),
    "a turn that is a string": (with_turns(human(), "hi"), "conversations[1] is 'hi', expected an object"),
    "a turn that is null": (with_turns(None), "conversations[0] is None, expected an object"),
    "a turn that is empty": (with_turns(human(), {}), "conversations[1] is {}, expected an object"),
    "a turn without text": (with_turns(human(), {"from": "gpt"}), "conversations[1] is {'from': 'gpt'}, expected"),
    "a turn without speaker": (with_turns({"value": "hi"}), "conversations[0] is {'value': 'hi'}, expected"),
    # The format of OpenAI and of most other tools.
    "role and content": (
        with_turns({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}),
        "conversations[0] is {'role': 'user', 'content': 'hi'}, expected an object with 'from' and 'value'",
    ),
    "from and text": (
        with_turns({"from": "human", "text": "hi"}),
        "conversations[0] is {'from': 'human', 'text': 'hi'}, expected an object with 'from' and 'value'",
    ),
    "unknown speaker": (
        with_turns(human(), {"from": "assistant", "value": "hi"}),
        "conversations[1].from is 'assistant', expected one of system, human, gpt",
    ),
    "speaker null": (with_turns({"from": None, "value": "hi"}), "conversations[0].from is None, expected one of"),
    "speaker a list": (with_turns({"from": ["gpt"], "value": "hi"}), "conversations[0].from is ['gpt'], expected one"),
    "speaker an object": (with_turns({"from": {}, "value": "hi"}), "conversations[0].from is {}, expected one of"),
    "answer null": (with_turns(human(), gpt(None)), "conversations[1].value is None, expected text"),
    "answer empty": (with_turns(human(), gpt("")), "conversations[1].value is '', expected text"),
    "answer of spaces": (
        with_turns(human(), gpt(" \n\u3000")),
        "conversations[1].value is ' \\n\\u3000', expected text",
    ),
    "answer a number": (with_turns(human(), gpt(5)), "conversations[1].value is 5, expected text"),
    "question in parts": (
        with_turns(human([{"type": "text", "text": "hi"}]), gpt()),
        "conversations[0].value is [{'type': 'text', 'text': 'hi'}], expected text",
    ),
    "two questions in a row": (with_turns(human(), human("再说"), gpt()), ALTERNATE),
    "two answers in a row": (with_turns(human(), gpt(), gpt()), ALTERNATE),
    "an answer first": (with_turns(gpt(), human()), ALTERNATE),
    "no answer at the end": (with_turns(human(), gpt(), human("然后？")), ALTERNATE),
    "only a question": (with_turns(human()), ALTERNATE),
    "only a system turn": (without_image([{"from": "system", "value": "hi"}]), ALTERNATE),
    "a system turn later": (with_turns(human(), {"from": "system", "value": "hi"}, gpt()), ALTERNATE),
    "an image without its place": (
        with_turns(human("图里写了什么？"), gpt()),
        "has 1 image but 0 <image> in its human",
    ),
    "two places for one image": (with_turns(human("<image><image>"), gpt()), "has 1 image but 2 <image>"),
    "one place for two images": (bad(image=["red.png", "blue.png"]), "has 2 images but 1 <image>"),
    "a place without an image": (without_image([human(), gpt()]), "has 0 images but 1 <image>"),
    "the place in the answer": (with_turns(human("写什么？"), gpt("<image>")), "has 1 image but 0 <image>"),
    "the place in the system turn": (
        with_turns({"from": "system", "value": "<image>"}, human("写什么？"), gpt()),
        "has 1 image but 0 <image>",
    ),
    "image null": (bad(image=None), f"'image' is None, {WRONG_IMAGE}"),
    "image empty": (bad(image=""), f"'image' is [''], {WRONG_IMAGE}"),
    "image a number": (bad(image=5), f"'image' is 5, {WRONG_IMAGE}"),
    "image an object": (bad(image={"path": "red.png"}), f"'image' is {{'path': 'red.png'}}, {WRONG_IMAGE}"),
    "images with a null": (bad(image=["red.png", None]), f"'image' is ['red.png', None], {WRONG_IMAGE}"),
    "image missing": (bad(image="gone.png"), "gone.png: No such file or directory"),
    "image in another case": (bad(image="RED.png"), "RED.png: No such file or directory"),
    "image a directory": (bad(image="a folder"), "a folder: not a regular file"),
    "image an error page": (bad(image="error page.jpg"), "error page.jpg: not a JPEG/PNG/GIF/WEBP/BMP image"),
    "image absolute": (bad(image="/etc/passwd"), f"image '/etc/passwd' {NOT_RELATIVE}"),
    "image a URL": (bad(image="https://host/a.png"), f"image 'https://host/a.png' {NOT_RELATIVE}"),
    "image with backslashes": (bad(image="a\\b.png"), f"image 'a\\\\b.png' {NOT_RELATIVE}; write / in place of \\"),
    "image with NUL": (bad(image="a\0.png"), f"image 'a\\x00.png' {NOT_RELATIVE}"),
    "image above the folder": (bad(image="../outside.png"), "image '../outside.png' leaves the image folder"),
    "image behind a link out": (bad(image="outside.png"), "image 'outside.png' leaves the image folder"),
    "image a link to itself": (bad(image="loop.png"), "loop.png"),
    "image name too long": (bad(image="图" * 100 + ".png"), "File name too long"),
    "image name with half a character": (bad(image="\ud83d.png"), "\\ud83d"),
    "text with half a character": (with_turns(human(), gpt("好\ud83d耶")), "\\ud83d"),
    "second image missing": (
        bad(image=["red.png", "gone.png"], conversations=[human("<image><image>"), gpt()]),
        "gone.png: No such file or directory",
    ),
    "no room for an answer": (with_turns(human("<image>\n" + "问" * 400), gpt()), "model_max_length is 200"),
}


@pytest.mark.parametrize("value, reason", UNUSABLE_RECORDS.values(), ids=UNUSABLE_RECORDS)
@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_an_unusable_record_is_listed_with_its_own_place_and_reason(
    tmp_path, image_folder, encoder, form, value, reason
):
    records = [make_record("first"), value, make_record("last")]
    if form == "json":
        annotations, place = tmp_path / "memes.json", "memes.json record 1"
        annotations.write_text(json.dumps(records), encoding="utf-8")
    else:
        # Blank lines count in the numbering, so that an editor's line number is the message's.
        annotations, place = tmp_path / "memes.jsonl", "memes.jsonl line 3"
        first, middle, last = map(json.dumps, records)
        annotations.write_text(f"{first}\n\n{middle}\n  \n{last}\n", encoding="utf-8")
    record_id = "bad" if isinstance(value, dict) else "?"

    left = load(annotations, image_folder, encoder, "quarantine")
    assert ids_of(left.dataset) == ["first", "last"]
    assert [(finding.place, finding.record_id) for finding in list_bad(left)] == [(place, record_id)]
    assert reason in list_bad(left)[0].detail

    with pytest.raises(UserError) as caught:
        load(annotations, image_folder, encoder, "error")
    first_line, listed, advice = str(caught.value).split("\n")
    assert first_line == f"{annotations}: 1 of 3 records cannot be trained on:"
    assert listed == f"  {list_bad(left)[0]}"
    assert "--bad_records quarantine" in advice


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"id": "bad", "conversations": [', "ends in the middle"),
        ('{"id": "bad",}', "is not JSON"),
        ("{'id': 'bad'}", "is not JSON"),
        ('{"id": "a"} {"id": "b"}', "is not JSON"),
        ('{"id": "bad"', "ends in the middle"),
        ("id,image,text", "is not JSON"),
        ("NaN", "is a number, expected an object"),
        ("[" * 100_000, "is nested too deep"),
        ("1" * 5000, "holds a number of more than 4,300 digits"),
    ],
)
def test_a_broken_jsonl_line_does_not_touch_its_neighbours(tmp_path, image_folder, encoder, line, reason):
    good = json.dumps(make_record("good"))
    annotations = tmp_path / "memes.jsonl"
    annotations.write_text(f"{good}\n{line}\n{good}\n", encoding="utf-8")
    left = load(annotations, image_folder, encoder, "quarantine")
    assert ids_of(left.dataset) == ["good", "good"]
    assert [(finding.place, finding.record_id) for finding in list_bad(left)] == [("memes.jsonl line 2", "?")]
    assert reason in list_bad(left)[0].detail


# ---- Good records in unusual dress ----


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),  # byte order mark, as Notepad and Excel write it
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.rstrip("\n").encode(),
        lambda text: ("\n\n" + text + "\n \t\n").encode(),
    ],
    ids=["byte order mark", "CRLF", "no last line break", "blank lines"],
)
@pytest.mark.parametrize("name", ["memes.json", "memes.jsonl"])
def test_byte_order_marks_and_line_breaks_do_no_harm(tmp_path, image_folder, encoder, name, encode):
    values = [make_record("first"), make_record("second")]
    if name.endswith("l"):
        text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    else:
        text = json.dumps(values, ensure_ascii=False, indent=1) + "\n"
    (tmp_path / name).write_bytes(encode(text))
    loaded = load(tmp_path / name, image_folder, encoder)
    assert ids_of(loaded.dataset) == ["first", "second"]
    assert list_bad(loaded) == []


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x7f", "\u3000"])
def test_a_jsonl_record_may_contain_any_separator_that_json_allows(tmp_path, separator):
    # Only a line feed ends a line of JSONL. Text copied from web pages is full of U+2028, which JSON need not escape.
    text = f"好{separator}耶"
    lines = [make_record("first", conversations=[human(), gpt(text)]), make_record("second")]
    annotations = tmp_path / "memes.jsonl"
    annotations.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    records, problems = read_records(annotations)
    assert problems == []
    assert [(record.record_id, record.place) for record in records] == [
        ("first", "memes.jsonl line 1"),
        ("second", "memes.jsonl line 2"),
    ]
    assert records[0].turns[1].text == text


def test_every_allowed_kind_of_record_is_read(tmp_path):
    values = [
        {"id": 7, "image": ["red.png", "blue.png"], "conversations": [human("<image>和<image>？"), gpt()]},
        {
            "conversations": [
                {"from": "system", "value": "你是猫。"},
                human("你好"),
                gpt("喵"),
                human("再见"),
                gpt("喵喵"),
            ]
        },
        # Extra keys, in the record and in a turn, belong to other tools.
        {
            **make_record("extra"),
            "text": "好耶",
            "conversations": [{**human(), "weight": 1}, gpt("答案里的<image>是文字")],
        },
        {"id": "none", "image": [], "conversations": [human("你好"), gpt()]},
    ]
    records, problems = read_records(write_json(tmp_path / "memes.json", values))
    assert problems == []
    # An id is for people; without one the place stands in.
    assert [record.record_id for record in records] == ["7", "memes.json record 1", "extra", "none"]
    assert [record.images for record in records] == [("red.png", "blue.png"), (), ("red.png",), ()]
    assert [(turn.role, turn.text) for turn in records[1].turns] == [
        ("system", "你是猫。"),
        ("user", "你好"),
        ("assistant", "喵"),
        ("user", "再见"),
        ("assistant", "喵喵"),
    ]


# ---- Files that are not annotations at all ----

GOOD_LINE = json.dumps(make_record("a"), ensure_ascii=False)
UNUSABLE_FILES = {
    "empty": ("memes.json", b"", "memes.json: is empty"),
    "an object": ("memes.json", GOOD_LINE.encode(), "memes.json: holds an object, expected an array of records"),
    "a string": ("memes.json", b'"hi"', "memes.json: holds text, expected an array of records"),
    "a trailing comma": ("memes.json", b'[\n {"id": 1},\n]', "memes.json: is not JSON (line 3, column 1: "),
    "an unclosed array": ("memes.json", b'[{"id": 1}', "memes.json: ends in the middle, at "),
    "JSONL called .json": (
        "memes.json",
        f"{GOOD_LINE}\n{GOOD_LINE}".encode(),
        "memes.json: holds one record a line, expected an array of records; rename it to memes.jsonl",
    ),
    "an array called .jsonl": (
        "memes.jsonl",
        f" [\n{GOOD_LINE}]".encode(),
        "memes.jsonl: is a JSON array, and the ending .jsonl means one record a line; rename it to memes.json",
    ),
    "two records on one line": ("memes.json", f"{GOOD_LINE} {GOOD_LINE}".encode(), "memes.json: is not JSON (line 1, "),
    "nested too deep": ("memes.json", b"[" * 100_000, "memes.json: is nested too deep"),
    "a number too long": (
        "memes.json",
        b"[" + b"1" * 5000 + b"]",
        "memes.json: holds a number of more than 4,300 digits",
    ),
    "GBK": ("memes.json", f"[{GOOD_LINE}]".encode("gbk"), "memes.json: not UTF-8 ("),
    "GBK lines": ("memes.jsonl", GOOD_LINE.encode("gbk"), "Convert it, e.g. iconv -f GB18030 -t UTF-8"),
    **{
        f"{encoding} {'with' if mark else 'without'} a mark": (
            "memes.json",
            mark + f"[{GOOD_LINE}]".encode(encoding),
            f"Convert it, e.g. iconv -f {name} -t UTF-8 memes.json > converted"
            if not mark
            else f"It is {name}: iconv -f {name} -t UTF-8 memes.json > converted",
        )
        for encoding, mark, name in (
            ("utf-16-le", codecs.BOM_UTF16_LE, "UTF-16"),
            ("utf-16-be", codecs.BOM_UTF16_BE, "UTF-16"),
            ("utf-32-le", codecs.BOM_UTF32_LE, "UTF-32"),
            ("utf-16-le", b"", "UTF-16LE"),
            ("utf-16-be", b"", "UTF-16BE"),
        )
    },
    "UTF-16 of ASCII": ("memes.json", '[{"id": "a"}]'.encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8 memes.json"),
    "gzip": ("memes.json.gz", gzip.compress(GOOD_LINE.encode()), "It is compressed by gzip: gunzip memes.json.gz"),
    "zstd": ("memes.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes(9), "It is compressed by zstd: unzstd memes.jsonl.zst"),
    "Excel": ("memes.xlsx", b"PK\x03\x04" + bytes(9), "It is a zip archive or an Excel file: unpack it, or save the"),
    "parquet": ("memes.parquet", b"PAR1" + bytes(9), "It is a parquet file: python data/prepare.py parquet"),
    "an image": ("memes.json", b"\x89PNG\r\n\x1a\n\xff\xff\xff", "Save it as UTF-8"),
    "an empty array": ("memes.json", b"[]", "memes.json: no record to train on"),
    "an empty JSONL": ("memes.jsonl", b"\n\n", "memes.jsonl: no record to train on"),
}


@pytest.mark.parametrize("bad_records", ["error", "quarantine"])
@pytest.mark.parametrize("name, content, message", UNUSABLE_FILES.values(), ids=UNUSABLE_FILES)
def test_a_file_that_is_no_annotation_file_stops_the_run(
    tmp_path, image_folder, encoder, name, content, message, bad_records
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(tmp_path / name, image_folder, encoder, bad_records)
    assert message in str(caught.value)


def test_missing_files_and_folders_are_named(tmp_path, image_folder, encoder):
    with pytest.raises(UserError, match=r"gone\.json: No such file or directory.*Is the path right"):
        load(tmp_path / "gone.json", image_folder, encoder)
    with pytest.raises(UserError, match="images: Is a directory"):
        load(image_folder, image_folder, encoder)
    annotations = write_json(tmp_path / "memes.json", [make_record()])
    with pytest.raises(
        UserError, match=r"Memes\.json: No such file or directory; there is 'memes\.json', which differs"
    ):
        load(tmp_path / "Memes.json", image_folder, encoder)
    with pytest.raises(UserError, match="Images: no such image folder; there is 'images', which differs in case"):
        load(annotations, tmp_path / "Images", encoder)
    for folder, message in (("gone", "no such image folder"), ("memes.json", "is a file, expected the folder")):
        with pytest.raises(UserError, match=f"{folder}: {message}"):
            load(annotations, tmp_path / folder, encoder)


def test_a_key_that_stands_twice_in_an_array_is_found_in_its_record(tmp_path, image_folder, encoder):
    twice = '{"id": "bad", "image": "red.png", "image": "blue.png", "conversations": []}'
    good = [json.dumps(make_record(name), indent=1) for name in ("first", "],[", "last")]
    (tmp_path / "memes.json").write_text(f"[{good[0]} , {twice},\n{good[1]},{good[2]}\n]", encoding="utf-8")
    left = load(tmp_path / "memes.json", image_folder, encoder, "quarantine")
    assert ids_of(left.dataset) == ["first", "],[", "last"]
    assert [str(finding) for finding in list_bad(left)] == [
        "memes.json record 1 (id '?'): the key 'image' stands twice; leave one of the two [repeated_key]"
    ]
    path = write_quarantine(tmp_path / "output", left.checked)
    assert json.loads(path.read_text(encoding="utf-8"))["record"] == twice
    for content, message in (
        (f'{{"a": 1, {twice[1:]}', "holds an object, expected an array of records"),
        (f"[{twice}, nonsense]", r"is not JSON \(line 1, "),
    ):
        (tmp_path / "memes.json").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            load(tmp_path / "memes.json", image_folder, encoder, "quarantine")


# ---- Many records ----


def test_error_mode_lists_all_problems_and_stops(tmp_path, image_folder, encoder):
    values = [
        make_record("fine"),
        {"id": "no turns"},
        make_record("no file", image="gone.png"),
        make_record("fine too"),
        "text",
        make_record("too long", conversations=[human("<image>\n" + "问" * 400), gpt()]),
    ]
    annotations = write_json(tmp_path / "memes.json", values)
    with pytest.raises(UserError) as caught:
        load(annotations, image_folder, encoder)
    message = str(caught.value)
    assert "memes.json: 4 of 6 records cannot be trained on:" in message
    for place, record_id in ((1, "no turns"), (2, "no file"), (4, "?"), (5, "too long")):
        assert f"\n  memes.json record {place} (id {record_id!r}): " in message
    assert "fine" not in message


def test_a_cause_is_said_once_with_its_count_and_three_examples(tmp_path, image_folder, encoder):
    values = [make_record(f"r{index}", image=f"gone_{index}.png") for index in range(64)]
    values[2:2] = [{"id": "no turns"}]
    values += [
        make_record("r0", image=f"gone_{index}.png", conversations=[human(), gpt("好" * 80)]) for index in range(5)
    ]
    with pytest.raises(UserError) as caught:
        load(write_json(tmp_path / "memes.json", values), image_folder, encoder)
    missing = ["No such file or directory [missing_image]"] * 3
    folder, place = image_folder.resolve(), "memes.json record"
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'memes.json'}: 70 of 70 records cannot be trained on:",
        "  64 records: there is no such file [missing_image], e.g.",
        *(
            f"    {place} {number} (id 'r{index}'): {folder}/gone_{index}.png: {why}"
            for number, index, why in zip((0, 1, 3), (0, 1, 2), missing, strict=True)
        ),
        f"  {place} 2 (id 'no turns'): has no list 'conversations' (keys: id). See data/README.md for the record "
        "format. [malformed]",
        "  5 records: there is no such file [missing_image]; an answer repeats itself without end [loop], e.g.",
        *(
            f"    {place} {65 + index} (id 'r0'): {folder}/gone_{index}.png: {why}; turn 2 repeats '好' [loop]"
            for index, why in enumerate(missing)
        ),
        "Images of 69 records are missing; is --image_folder (IMAGE_FOLDER of run.sh) the folder that their paths "
        "start from?",
        "Fix them.",  # nothing would be left to train on
    ]


def test_quarantine_that_leaves_nothing_says_why(tmp_path, image_folder, encoder):
    # A wrong image folder makes every record unusable; "no record" alone would send the user looking elsewhere.
    annotations = write_json(
        tmp_path / "memes.json", [make_record("a", image="gone.png"), make_record("b", image="no")]
    )
    with pytest.raises(UserError, match="memes.json: no record to train on") as caught:
        load(annotations, image_folder, encoder, "quarantine")
    assert "2" in str(caught.value) and "gone.png: No such file" in str(caught.value)


def test_quarantined_records_are_written_as_one_json_line_each(tmp_path, image_folder, encoder):
    values = [make_record("好"), make_record("坏", image="gone.png"), {"id": "\ud83d"}]
    (tmp_path / "memes.json").write_text(json.dumps(values), encoding="utf-8")
    left = load(tmp_path / "memes.json", image_folder, encoder, "quarantine")
    path = write_quarantine(tmp_path / "output", left.checked)
    assert path == tmp_path / "output" / "quarantine.jsonl"
    written = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(line["place"], line["record_id"]) for line in written] == [
        ("memes.json record 1", "坏"),
        ("memes.json record 2", "\ud83d"),
    ]
    assert [line["record"] for line in written] == values[1:]
    assert [[reason["kind"] for reason in line["reasons"]] for line in written] == [["missing_image"], ["malformed"]]


def spoil(record: dict, rng: random.Random) -> object:
    """A record with one value somewhere inside it replaced or removed; sometimes it still is a good one."""
    record = copy.deepcopy(record)
    places = [(record, key) for key in record]
    places += [(record["conversations"], index) for index in range(len(record["conversations"]))]
    places += [(turn, key) for turn in record["conversations"] for key in turn]
    container, key = rng.choice(places)
    junk = [None, 0, -1.5, True, "", " ", "<image>", "human", "gpt", "x", [], ["x"], {}, {"x": 1}, [[]], "图", "\x00"]
    if rng.random() < 0.3:
        del container[key]
    else:
        container[key] = rng.choice(junk)
    return record


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_whatever_is_spoilt_every_record_is_either_read_or_listed_once(tmp_path, image_folder, encoder, form, seed):
    rng = random.Random(seed)
    good = make_record(conversations=[human(), gpt(), human("什么意思？"), gpt("很开心。")])
    values, spoilt = [], set()
    for index in range(200):
        values.append({**good, "id": f"r{index}"})
        if rng.random() < 0.5:
            values[-1] = spoil(values[-1], rng)
            spoilt.add(index)
    if form == "json":
        annotations = write_json(tmp_path / "memes.json", values)
        places = [f"memes.json record {index}" for index in range(200)]
    else:
        annotations = tmp_path / "memes.jsonl"
        annotations.write_text("\n".join(map(json.dumps, values)), encoding="utf-8")
        places = [f"memes.jsonl line {index + 1}" for index in range(200)]

    records, problems = read_records(annotations)
    assert len(records) + len(problems) == 200
    assert {item.place for item in [*records, *problems]} == set(places)
    # A record nobody touched is never blamed, and is read with its own id.
    assert {problem.place for problem in problems} <= {places[index] for index in spoilt}
    untouched = {places[index]: f"r{index}" for index in range(200) if index not in spoilt}
    assert untouched.items() <= {record.place: record.record_id for record in records}.items()

    left = load(annotations, image_folder, encoder, "quarantine")
    assert len(left.dataset) + len(left.checked.bad) == 200


# ---- Length ----


def test_records_whose_answers_are_cut_are_named(tmp_path, image_folder, encoder):
    values = [make_record("short"), make_record("long", conversations=[human(), gpt("哈" * 50)])]
    annotations = write_json(tmp_path / "memes.json", values)
    whole = load(annotations, image_folder, encoder, max_length=1000)
    assert whole.cut_records == []
    full_length = int(whole.dataset.lengths[1])
    assert load(annotations, image_folder, encoder, max_length=full_length).cut_records == []
    cut = load(annotations, image_folder, encoder, max_length=full_length - 17)
    # 17 would end inside a character.
    assert cut.cut_records == ["memes.json record 1 (id 'long'): 18 positions cut [cut_answer]"]
    assert cut.dataset.lengths.tolist() == [int(whole.dataset.lengths[0]), full_length - 18]


def test_a_record_without_room_for_an_answer_is_named_with_the_length_it_needs(tmp_path, image_folder, encoder):
    annotations = write_json(tmp_path / "memes.json", [make_record("tight")])
    length = int(load(annotations, image_folder, encoder).dataset.lengths[0])
    supervised = int(load(annotations, image_folder, encoder).dataset.supervised_lengths[0])
    needed = length - supervised + 2  # the prompt, one token of the answer, the end token
    assert load(annotations, image_folder, encoder, max_length=needed).dataset.supervised_lengths.tolist() == [2]
    with pytest.raises(UserError) as caught:
        load(annotations, image_folder, encoder, max_length=needed - 1)
    assert (
        f"memes.json record 0 (id 'tight'): needs {needed} positions to begin its first answer, "
        f"model_max_length is {needed - 1} [too_long]\n" in str(caught.value)
    )


# ---- Items ----


def test_an_item_is_its_tokens_and_its_images_in_order(tmp_path, image_folder, encoder):
    values = [
        make_record("two", image=["blue.png", "red.png"], conversations=[human("<image>和<image>？"), gpt("好")]),
        without_image([human("你好"), gpt("好耶")]),
    ]
    data = load(write_json(tmp_path / "memes.json", values), image_folder, encoder).dataset
    two, none = data[0], data[1]
    assert set(two) == {"record_id", "input_ids", "labels", "image_paths", "pixel_values"}
    assert [two["record_id"], none["record_id"]] == ["two", "bad"]
    for item in (two, none):
        assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
        assert item["input_ids"].shape == item["labels"].shape
        supervised = item["labels"] != -100
        assert torch.equal(item["labels"][supervised], item["input_ids"][supervised])
    assert two["image_paths"] == (image_folder / "blue.png", image_folder / "red.png")
    assert [(image.dtype, image.shape) for image in two["pixel_values"]] == [(torch.uint8, (3, 2, 2))] * 2
    assert [image[:, 0, 0].tolist() for image in two["pixel_values"]] == [[0, 0, 255], [255, 0, 0]]
    assert none["image_paths"] == () and none["pixel_values"] == []
    assert int((two["input_ids"] == encoder.image_token_id).sum()) == 2 * TOKENS_PER_IMAGE

    answer = encoder.encode_text("好耶") + [encoder.turn_end_id]
    assert none["labels"][none["labels"] != -100].tolist() == answer
    assert data.lengths.tolist() == [len(two["input_ids"]), len(none["input_ids"])]
    assert data.supervised_lengths.tolist() == [len(encoder.encode_text("好")) + 1, len(answer)]
    assert data.image_counts.tolist() == [2, 0]


@pytest.mark.parametrize("kept, reason", [(0, "the file is empty"), (50, "the image is damaged")])
def test_an_image_that_goes_bad_after_the_check_stops_the_run_by_name(tmp_path, image_folder, encoder, kept, reason):
    # Another image in its place would change what the run learns without a word.
    data = load(write_json(tmp_path / "memes.json", [make_record("a")]), image_folder, encoder).dataset
    path = image_folder / "red.png"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=rf"memes\.json record 0 \(id 'a'\): .*red\.png: {reason}"):
        data[0]


def test_a_batch_decodes_an_image_once_however_many_records_show_it(tmp_path, image_folder, encoder, monkeypatch):
    values = [
        make_record("a"),
        make_record("b", image=["blue.png", "red.png"], conversations=[human("<image><image>"), gpt()]),
        make_record("c"),
    ]
    data = load(write_json(tmp_path / "memes.json", values), image_folder, encoder).dataset
    alone = [data[index] for index in (2, 1, 0)]
    decoded = []
    read = dataset_module.read_pixels
    monkeypatch.setattr(
        dataset_module, "read_pixels", lambda path, *rest: decoded.append(path.name) or read(path, *rest)
    )
    batch = data.__getitems__([2, 1, 0])
    assert sorted(decoded) == ["blue.png", "red.png"]
    assert [item["record_id"] for item in batch] == ["c", "b", "a"]
    for item, expected in zip(batch, alone, strict=True):
        assert item["input_ids"].tolist() == expected["input_ids"].tolist()
        assert torch.stack(item["pixel_values"]).tolist() == torch.stack(expected["pixel_values"]).tolist()


# ---- The order of training ----


@pytest.fixture
def five(tmp_path, image_folder, encoder) -> MemeDataset:
    values = [{"id": f"r{index}", "conversations": [human("你好"), gpt()]} for index in range(5)]
    return load(write_json(tmp_path / "memes.json", values), image_folder, encoder).dataset


def order_training(dataset: MemeDataset, steps: int, global_batch_size: int, seed: int, **changes) -> TrainingOrder:
    settings = {"device_batch_size": global_batch_size, "processes": 1, "shared_images": False, **changes}
    shape = BatchShape(global_batch_size, settings.pop("device_batch_size"), settings.pop("processes"))
    return TrainingOrder(dataset, steps, shape, seed, **settings)


def test_the_order_of_training_is_the_one_runs_were_trained_in(five):
    # Written down from a run: a NumPy or a code that shuffles otherwise would silently change what a resumed run sees.
    assert order_training(five, 3, 4, seed=42).order.tolist() == [4, 2, 3, 1, 0, 4, 0, 1, 2, 3, 0, 3]
    assert order_training(five, 1, 5, seed=7).order.tolist() == [2, 0, 4, 1, 3]


def test_every_pass_shows_every_record_once_and_the_last_step_is_filled_from_the_next_pass(five):
    # 2 passes of 5 records in steps of 4 make 3 steps: 12 examples, 2 of them from a third pass.
    examples = order_training(five, 3, 4, seed=0)
    assert len(examples) == 12
    passes = [examples.order[start : start + 5].tolist() for start in (0, 5, 10)]
    assert sorted(passes[0]) == sorted(passes[1]) == [0, 1, 2, 3, 4]
    assert len(passes[2]) == len(set(passes[2])) == 2
    assert passes[0] != passes[1]
    assert [examples[position]["record_id"] for position in range(12)] == [f"r{index}" for index in examples.order]


def test_the_order_depends_on_seed_and_position_alone(five):
    longest = order_training(five, 53, 1, seed=3).order.tolist()
    # However long the run is: one that is prolonged, or cut short, goes through the same records.
    for length in (1, 4, 5, 6, 10, 52):
        assert order_training(five, 1, length, seed=3).order.tolist() == longest[:length]
    # However it is read: a position keeps its record, whichever positions were asked for before.
    examples = order_training(five, 53, 1, seed=3)
    backwards = [examples[position]["record_id"] for position in range(52, -1, -1)]
    assert backwards[::-1] == [f"r{index}" for index in longest]
    assert [item["record_id"] for item in examples.__getitems__([52, 7])] == [f"r{longest[52]}", f"r{longest[7]}"]
    assert order_training(five, 53, 1, seed=4).order.tolist() != longest


def test_a_batch_counts_what_its_records_share_once(tmp_path, image_folder, encoder):
    # Two images with two records each; 'c' and 'd' differ in their question already, 'a' and 'b' in the answer.
    values = [
        make_record("a", conversations=[human("<image>\n好？"), gpt("好好好")]),
        make_record("c", image="blue.png", conversations=[human("<image>\n好？"), gpt("好")]),
        make_record("b", conversations=[human("<image>\n好？"), gpt("耶")]),
        make_record("d", image="blue.png", conversations=[human("<image>\n耶？"), gpt("好")]),
    ]
    data = load(write_json(tmp_path / "memes.json", values), image_folder, encoder).dataset
    a, c, b, d = data.lengths.tolist()
    prompt = len(encoder.encode_prompt([Turn("user", "<image>\n好？")]))
    question = len(encoder.encode_prompt([Turn("user", "<image>\n")])) - len(encoder.encode_prompt([Turn("user", "")]))
    start = len(encoder.encode_prompt([])) - len(encoder.encode_text("assistant")) + len(encoder.encode_text("user"))
    whole = order_training(data, 1, 4, seed=0, shared_images=True)
    assert whole.count_batch_positions().tolist() == [[[a + b - prompt + c + d - (start + question)]]]
    halves = order_training(data, 1, 4, seed=0, shared_images=True, device_batch_size=2)
    assert [sorted(halves.order[:2].tolist()), sorted(halves.order[2:].tolist())] in (
        [[0, 2], [1, 3]],
        [[1, 3], [0, 2]],
    )
    assert sorted(halves.count_batch_positions().ravel().tolist()) == sorted(
        [a + b - prompt, c + d - (start + question)]
    )
    apart = order_training(data, 1, 4, seed=0, device_batch_size=2, processes=2)
    assert apart.count_batch_positions().shape == (1, 1, 2)
    assert apart.count_batch_positions().sum() == a + b + c + d


def test_records_share_the_same_without_a_record_that_is_left_out(tmp_path, image_folder, encoder):
    answers = ["写着“好耶”。", "写着“好”。", "图里写了什么？"]
    good = [make_record(answer, conversations=[human(), gpt(answer)]) for answer in answers]
    values = [make_record("bad", "gone.png"), *good]
    whole = load(write_json(tmp_path / "memes.json", values), image_folder, encoder, "quarantine").dataset
    alone = load(write_json(tmp_path / "usable.json", good), image_folder, encoder).dataset
    assert len(whole) == len(alone) == 3
    assert whole.sharing.order.tolist() == alone.sharing.order.tolist()
    assert whole.sharing.prefix_lengths.tolist() == alone.sharing.prefix_lengths.tolist()


@pytest.mark.parametrize("shared_images", [True, False])
@pytest.mark.parametrize("has_text_record, global_batch_size", [(True, 9), (False, 12)])
def test_a_batch_takes_the_positions_that_were_planned(
    tmp_path, image_folder, encoder, has_text_record, global_batch_size, shared_images
):
    # Plan and packed row are made by different code. In steps of 12, some of the 8 records come twice.
    values = [
        make_record(f"{q}{a}", conversations=[human(f"<image>{q}"), gpt(a)]) for q in "好耶" for a in ("好", "好耶")
    ]
    values += [make_record(a, "blue.png", [human("<image>好"), gpt(a)]) for a in ("好", "写", "写着")]
    values += [make_record("two", ["red.png", "blue.png"], [human("<image><image>"), gpt("写")])]
    values += [without_image([human("你好"), gpt("好耶")])] * has_text_record
    data = load(write_json(tmp_path / "memes.json", values), image_folder, encoder).dataset
    size = global_batch_size // 3
    examples = order_training(data, 4, global_batch_size, seed=0, device_batch_size=size, shared_images=shared_images)
    collator = PackingCollator(encoder.image_token_id, TOKENS_PER_IMAGE, POLICY.size, shared_images=shared_images)
    rows = [collator(examples.__getitems__(range(start, start + size))) for start in range(0, len(examples), size)]
    assert examples.count_batch_positions().ravel().tolist() == [row["input_ids"].shape[1] for row in rows]


# ---- Real data ----


def need(name: str) -> Path:
    if not (SHARED_DATA / name).exists():
        pytest.skip(f"needs the real data in {SHARED_DATA / name}")
    return SHARED_DATA / name


def test_a_thousand_real_records_load_without_a_problem(encoder):
    folder = need("memes_dev")
    loaded = load(folder / "train.json", folder, encoder, "error", max_length=512)
    assert len(loaded.dataset) == 1414
    assert list_bad(loaded) == [] and loaded.cut_records == []
    assert loaded.dataset.image_counts.tolist() == [1] * 1414


def test_caption_files_of_another_format_are_refused_line_by_line(encoder):
    folder = need("captions")
    annotations = folder / "ChineseBQB_picked_yivision.jsonl"
    with pytest.raises(UserError) as caught:
        load(annotations, folder, encoder)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{annotations}: 4,231 of 4,231 records cannot be trained on:"
    assert lines[1] == "  4,231 records: the record does not have the form of data/README.md [malformed], e.g."
    assert lines[2] == (
        "    ChineseBQB_picked_yivision.jsonl line 1 (id '?'): has no list 'conversations' (keys: picName, "
        "description). A line of a caption file: python data/prepare.py captions turns those into records. [malformed]"
    )
    assert len(lines) == 6
