"""Sources become annotation files: what is written, what is left out and counted, and what stops the run."""

import csv
import errno
import hashlib
import json
import os
import shutil
import unicodedata
from pathlib import Path

import prepare  # noqa: E402
import pytest
from conftest import SHARED_DATA
from PIL import Image

from meme_llava.errors import UserError
from meme_llava.prepare import writer
from meme_llava.prepare.writer import DESCRIBE, READ, AnnotationWriter, OutputSettings, make_record


def draw(path, color=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 12), color).save(path, "PNG")


def write_lines(path, values):
    lines = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(command, folder, *flags, output="out.json"):
    """Run a command on folder/root as image folder; the records it wrote."""
    image_folder = () if command == "mix" else ("--image_folder", str(folder / "root"))
    prepare.main([command, *image_folder, "--output", str(folder / output), *map(str, flags)])
    return read(folder / output)


def read(path):
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def read_manifest(folder, name="out"):
    return json.loads((folder / f"{name}.manifest.json").read_text(encoding="utf-8"))


def fail(capsys, command, folder, *flags, output="out.json", code=2):
    """The message of a run that must stop; nothing may be left behind but what was there."""
    before = sorted(path.name for path in folder.iterdir())
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(command, folder, *flags, output=output)
    assert stop.value.code == code
    assert sorted(path.name for path in folder.iterdir()) == before
    return capsys.readouterr().err


@pytest.fixture
def world(tmp_path):
    """Two sets as they are unpacked, and the caption files of two annotators."""
    draw(tmp_path / "root/emo/0017383c-4a6d-4f1f-8aa4-8b19aa6c2283.jpg", (1, 2, 3))
    draw(tmp_path / "root/emo/b.png", (4, 5, 6))
    draw(tmp_path / "root/BQB/001Funny_滑稽大佬😏BQB/滑稽大佬00001-文字.jpg", (7, 8, 9))
    write_lines(
        tmp_path / "gpt.jsonl",
        [
            {"picName": "0017383c-4a6d-4f1f-8aa4-8b19aa6c2283.jpg", "description": " 一只小狗。\n"},
            {"picName": "滑稽大佬00001-文字.jpg", "description": "滑稽的脸。", "model": "any other key"},
        ],
    )
    write_lines(
        tmp_path / "yi.jsonl",
        [
            {"picName": "b.png", "description": "一只猫。"},
            {"picName": "0017383c-4a6d-4f1f-8aa4-8b19aa6c2283.jpg", "description": "狗捂着嘴。"},
        ],
    )
    return tmp_path


def captions_flags(world, *names):
    return ("--captions", *[world / name for name in names], "--images", "emo", "BQB")


# ---- captions ----


def test_captions_of_one_image_are_adjacent_and_know_their_source(world):
    records = run("captions", world, *captions_flags(world, "gpt.jsonl", "yi.jsonl"))
    for record in records:
        question = record["conversations"][0].pop("value")
        assert question.startswith("<image>\n") and question.removeprefix("<image>\n") in DESCRIBE
    dog, face = "emo/0017383c-4a6d-4f1f-8aa4-8b19aa6c2283.jpg", "BQB/001Funny_滑稽大佬😏BQB/滑稽大佬00001-文字.jpg"
    assert records == [
        {
            "id": "0017383c-4a6d-4f1f-8aa4-8b19aa6c2283_gpt",
            "image": dog,
            "conversations": [{"from": "human"}, {"from": "gpt", "value": "一只小狗。"}],
            "sources": [{"set": "emo", "annotator": "gpt", "file": "gpt.jsonl", "line": 1}],
        },
        {
            "id": "0017383c-4a6d-4f1f-8aa4-8b19aa6c2283_yi",
            "image": dog,
            "conversations": [{"from": "human"}, {"from": "gpt", "value": "狗捂着嘴。"}],
            "sources": [{"set": "emo", "annotator": "yi", "file": "yi.jsonl", "line": 2}],
        },
        {
            "id": "滑稽大佬00001-文字_gpt",
            "image": face,
            "conversations": [{"from": "human"}, {"from": "gpt", "value": "滑稽的脸。"}],
            "sources": [{"set": "BQB", "annotator": "gpt", "file": "gpt.jsonl", "line": 2}],
            "text": "文字",
        },
        {
            "id": "b_yi",
            "image": "emo/b.png",
            "conversations": [{"from": "human"}, {"from": "gpt", "value": "一只猫。"}],
            "sources": [{"set": "emo", "annotator": "yi", "file": "yi.jsonl", "line": 1}],
        },
    ]


def test_manifest_tells_inputs_counts_and_environment(world):
    run("captions", world, *captions_flags(world, "gpt.jsonl", "yi.jsonl"))
    manifest = read_manifest(world)
    assert manifest["counts"] == {
        "records": 4,
        "images": 3,
        "left_out": {},
        "problems": 0,
        "noted": {},
        "records_by_source": {"emo / gpt": 1, "emo / yi": 2, "BQB / gpt": 1},
    }
    assert [(Path(entry["file"]).name, entry["rows"]) for entry in manifest["inputs"]] == [
        ("gpt.jsonl", 2),
        ("yi.jsonl", 2),
    ]
    assert manifest["output"]["sha256"] == sha256(world / "out.json")
    assert manifest["inputs"][0]["sha256"] == sha256(world / "gpt.jsonl")
    assert manifest["settings"]["images"] == ["emo", "BQB"]
    assert manifest["environment"]["python"]
    assert not (world / "out.left_out.jsonl").exists()


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_same_output_every_time_and_other_questions_for_another_seed(world):
    flags = captions_flags(world, "gpt.jsonl", "yi.jsonl")
    first = run("captions", world, *flags, output="a.json")
    assert run("captions", world, *flags, output="b.json") == first
    questions = {
        tuple(
            record["conversations"][0]["value"]
            for record in run("captions", world, *flags, "--seed", seed, output=f"s{seed}.json")
        )
        for seed in range(3)
    }
    assert len(questions) == 3


def test_another_file_changes_no_other_record(world):
    few = run("captions", world, *captions_flags(world, "gpt.jsonl"), output="few.jsonl")
    many = run("captions", world, *captions_flags(world, "gpt.jsonl", "yi.jsonl"), output="many.jsonl")
    assert [record for record in many if record["id"].endswith("_gpt")] == few


def test_equal_captions_of_an_image_become_one_record_with_both_sources(world):
    write_lines(world / "copy.jsonl", [{"picName": "b.png", "description": "一只 猫！"}])
    records = run("captions", world, *captions_flags(world, "yi.jsonl", "copy.jsonl"))
    cat = next(record for record in records if record["image"] == "emo/b.png")
    assert len(records) == 2 and cat["conversations"][1]["value"] == "一只猫。"
    assert cat["sources"] == [
        {"set": "emo", "annotator": "yi", "file": "yi.jsonl", "line": 1},
        {"set": "emo", "annotator": "copy", "file": "copy.jsonl", "line": 1},
    ]
    assert list(read_manifest(world)["counts"]["noted"].values()) == [1]


def test_captions_of_emoji_alone_are_not_all_equal(world):
    write_lines(world / "e.jsonl", [{"picName": "b.png", "description": text} for text in ("😀", "😭", "😀")])
    records = run("captions", world, *captions_flags(world, "e.jsonl"))
    assert [(record["id"], len(record["sources"])) for record in records] == [("b_e", 2), ("b_e_2", 1)]


def test_names_match_in_either_unicode_form(world):
    decomposed = unicodedata.normalize("NFD", "café がく.png")
    draw(world / "root/emo" / decomposed)
    write_lines(world / "n.jsonl", [{"picName": unicodedata.normalize("NFC", decomposed), "description": "咖啡"}])
    assert run("captions", world, *captions_flags(world, "n.jsonl"))[0]["image"] == f"emo/{decomposed}"


def test_equal_files_at_two_places_are_one_and_the_first_is_taken(world):
    (world / "root/BQB/000").mkdir()
    shutil.copy(world / "root/emo/b.png", world / "root/BQB/000/b.png")
    records = run("captions", world, *captions_flags(world, "yi.jsonl"))
    assert records[0]["image"] == "emo/b.png"
    assert read_manifest(world)["counts"]["noted"] == {"images that lie at several places with equal bytes": 1}


def test_a_picname_with_a_folder_tells_namesakes_apart(world):
    draw(world / "root/BQB/x/b.png", (99, 0, 0))
    write_lines(world / "p.jsonl", [{"picName": "x/b.png", "description": "红色"}])
    assert run("captions", world, *captions_flags(world, "p.jsonl"))[0]["image"] == "BQB/x/b.png"


BAD_CAPTION_LINES = {
    "broken JSON": ('{"picName": "b.png", "desc', "ends in the middle"),
    "an array": ("[1]", "is a list, expected an object with picName"),
    "no picName": ({"description": "x"}, "has no picName (keys: description)"),
    "picName is a number": ({"picName": 3, "description": "x"}, "the image is 3, expected a file name"),
    "no description": ({"picName": "b.png"}, "has no description (keys: picName)"),
    "null description": ({"picName": "b.png", "description": None}, "b.png: description is empty"),
    "blank description": ({"picName": "b.png", "description": " \n"}, "b.png: description is empty"),
    "description is a list": ({"picName": "b.png", "description": ["x"]}, "description is ['x'], expected text"),
    "half a character": ('{"picName": "b.png", "description": "\\ud83d"}', "holds half a character"),
    "missing image": ({"picName": "a.png", "description": "x"}, "no image 'a.png'"),
    "misspelt image": ({"picName": "bb.png", "description": "x"}, "the nearest name is 'b.png'"),
}


@pytest.mark.parametrize("line, reason", BAD_CAPTION_LINES.values(), ids=BAD_CAPTION_LINES)
def test_bad_caption_lines_stop_the_run_or_are_quarantined(world, capsys, line, reason):
    good = {"picName": "b.png", "description": "一只猫。"}
    write_lines(world / "bad.jsonl", [good, "", line, good | {"description": "另一只"}])
    flags = captions_flags(world, "bad.jsonl")
    message = fail(capsys, "captions", world, *flags)
    assert "1 problem, nothing was written" in message
    assert "bad.jsonl line 3: " in message and reason in message

    records = run("captions", world, *flags, "--bad_records", "quarantine")
    assert [record["conversations"][1]["value"] for record in records] == ["一只猫。", "另一只"]
    (left_out,) = read(world / "out.left_out.jsonl")
    assert left_out["place"] == "bad.jsonl line 3" and reason in left_out["reason"]
    if reason not in ("holds half a character", "ends in the middle"):
        assert left_out["original"] == (json.loads(line) if isinstance(line, str) else line)
    counts = read_manifest(world)["counts"]
    assert counts["records"] == 2 and counts["problems"] == 1 and sum(counts["left_out"].values()) == 1
    assert "left out: " in capsys.readouterr().out


def test_different_images_with_one_name_are_a_problem(world, capsys):
    draw(world / "root/BQB/x/b.png", (99, 0, 0))
    message = fail(capsys, "captions", world, *captions_flags(world, "yi.jsonl"))
    assert "several different images have that name: emo/b.png, BQB/x/b.png" in message


def test_set_aside_lines_are_counted_and_no_problem(world, capsys):
    write_lines(
        world / "d.jsonl", [{"picName": "b.png", "description": "猫"}, {"picName": "a", "set_aside": "refused 3 times"}]
    )
    assert len(run("captions", world, *captions_flags(world, "d.jsonl"))) == 1
    assert read_manifest(world)["counts"]["left_out"] == {"set aside by describe.py": 1}
    assert read_manifest(world)["counts"]["problems"] == 0
    assert read(world / "out.left_out.jsonl")[0]["reason"] == "a: refused 3 times"


def test_of_the_lines_that_describe_py_wrote_about_an_image_the_last_counts(world):
    lines = [
        {"picName": "b.png", "description": "旧图", "sha256": "1"},
        {"picName": "滑稽大佬00001-文字.jpg", "set_aside": "refusal", "sha256": "2"},
        {"picName": "b.png", "description": "新图", "sha256": "3"},
        {"picName": "滑稽大佬00001-文字.jpg", "description": "狗", "sha256": "2"},
    ]
    write_lines(world / "d.jsonl", lines)
    records = run("captions", world, *captions_flags(world, "d.jsonl"))
    assert [record["conversations"][1]["value"] for record in records] == ["新图", "狗"]
    assert read_manifest(world)["counts"]["left_out"] == {"described again later": 2}


def test_a_kind_of_problem_is_said_once_with_its_count_three_examples_and_a_hint(world, capsys):
    write_lines(world / "many.jsonl", ["{", *({"picName": f"{n}.png", "description": "x"} for n in range(70))])
    message = fail(capsys, "captions", world, *captions_flags(world, "many.jsonl"))
    assert message.splitlines()[0] == "error: 71 problems, nothing was written:"
    assert message.splitlines()[1] == "  many.jsonl line 1: ends in the middle"
    assert "\n  70 problems: missing or ambiguous image, e.g.\n    many.jsonl line 2: no image '0.png'" in message
    assert message.count("many.jsonl line") == 4
    assert "70 of 70 captions found no image among the 3" in message


SETTINGS_FAULTS = {
    "unknown command": ("captionz", "did you mean captions?"),
    "no command": ("", "say what to prepare first"),
    "unknown flag": ("captions --caption x", "did you mean --captions?"),
    "missing flag": ("mix", "--output"),
    "fewer annotators": (
        "captions --image_folder . --output o.json --captions a b --images . --annotators x",
        "--annotators has 1 name, --captions 2 files",
    ),
    "negative weight": ("mix --output o.json --annotations a --weights -0.5", "0 or more"),
    "infinite weight": ("mix --output o.json --annotations a --weights inf", "0 or more"),
    "fewer weights": ("mix --output o.json --annotations a b --weights 1", "--weights has 1"),
    "no share": (
        "split --image_folder . --output o.json --validation_output v.json --annotations a --validation 5",
        "a share greater than 0 and below 1",
    ),
    "one output for both sides": (
        "split --image_folder . --output o.json --validation_output o.json --annotations a",
        "is --output too",
    ),
    "limit": ("parquet --image_folder . --output o.json --dataset a --images_to p --limit 0", "at least 1"),
}


@pytest.mark.parametrize("words, message", SETTINGS_FAULTS.values(), ids=SETTINGS_FAULTS)
def test_settings_that_cannot_be_meant(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        prepare.main(words.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_help_lists_every_command(capsys):
    prepare.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"prepare.py {command} " in printed for command in prepare.COMMANDS)


def test_outputs_are_replaced_only_on_demand(world, capsys):
    flags = captions_flags(world, "yi.jsonl")
    run("captions", world, *flags)
    assert "--overwrite" in fail(capsys, "captions", world, *flags)
    write_lines(world / "yi.jsonl", ["no JSON", {"picName": "b.png", "description": "新"}])
    quarantine = (*flags, "--overwrite", "--bad_records", "quarantine")
    assert [record["conversations"][1]["value"] for record in run("captions", world, *quarantine)] == ["新"]
    assert (world / "out.left_out.jsonl").exists()
    write_lines(world / "yi.jsonl", [{"picName": "b.png", "description": "更新"}])
    run("captions", world, *flags, "--overwrite")
    assert not (world / "out.left_out.jsonl").exists(), "a list of an earlier run would be taken for this one's"


def test_a_failed_run_leaves_the_old_output_alone(world, capsys):
    run("captions", world, *captions_flags(world, "yi.jsonl"))
    before = (world / "out.json").read_bytes()
    write_lines(world / "yi.jsonl", ["no JSON"])
    fail(capsys, "captions", world, *captions_flags(world, "yi.jsonl"), "--overwrite")
    assert (world / "out.json").read_bytes() == before


PLACES = {
    "an input as output": (("--overwrite",), "yi.jsonl", "is an input too"),
    "a strange ending": ((), "out.txt", "expected a name that ends in .json or .jsonl"),
    "a folder": ((), "folder.json", "is a directory"),
    "another's manifest": ((), "other.json", "other.manifest.json belongs to other.jsonl"),
}


@pytest.mark.parametrize("flags, output, message", PLACES.values(), ids=PLACES)
def test_outputs_that_cannot_be_written(world, capsys, flags, output, message):
    (world / "folder.json").mkdir()
    (world / "other.jsonl").touch()
    (world / "other.manifest.json").touch()
    assert message in fail(capsys, "captions", world, *captions_flags(world, "yi.jsonl"), *flags, output=output)


@pytest.mark.parametrize(
    "images, message",
    [("nowhere", "no such folder"), ("../outside", "must be a folder inside --image_folder"), ("empty", "no image")],
)
def test_image_folders_that_cannot_be_used(world, capsys, images, message):
    (world / "root/empty").mkdir()
    flags = ("--captions", world / "yi.jsonl", "--images", images)
    assert message in fail(capsys, "captions", world, *flags)


def test_hidden_files_are_no_images(world, capsys):
    draw(world / "root/.git/c.png")
    draw(world / "root/emo/._d.png")
    write_lines(world / "h.jsonl", [{"picName": name, "description": "x"} for name in ("c.png", "._d.png")])
    message = fail(capsys, "captions", world, "--captions", world / "h.jsonl", "--images", ".")
    assert "2 problems" in message


def test_images_are_found_without_an_ending_and_what_is_left_out_is_counted(world):
    for name in ("names/小朋友天天做饭", "names/1.5倍快乐", "names/我太难了.png", "names/._我太难了.png"):
        draw(world / "root" / name)
    (world / "root/names/b.avif").write_bytes(b"\0\0\0\x20ftypavif" + bytes(40))
    records = run("file_names", world, "--images", "names")
    assert [record["text"] for record in records] == ["1.5倍快乐", "小朋友天天做饭", "我太难了"]
    assert read_manifest(world)["counts"]["noted"] == {
        "files left out of --images: hidden": 1,
        "files left out of --images: in AVIF format, to be converted": 1,
    }


def test_names_that_are_not_utf8_stop_the_run(world, capsys):
    draw(world / "root/names/a.png")
    name = os.fsdecode("00016鸽子-别骗我.jpg".encode("gbk"))
    shutil.copy(world / "root/names/a.png", world / "root/names" / name)
    message = fail(capsys, "file_names", world, "--images", "names")
    assert "root/names: 1 file name is not UTF-8" in message and "convmv -f gbk -t utf-8" in message


def test_two_runs_with_one_output_do_not_mix_their_lines(tmp_path):
    settings = OutputSettings(output=tmp_path / "out.json")
    with AnnotationWriter(settings) as first:
        with pytest.raises(UserError, match=r"/out\.json: is being written by another process"):
            AnnotationWriter(settings)
        first.add(make_record("a", "a.png", "好", {}, 0), "a.jsonl line 1")
        first.finish()
    assert [record["id"] for record in read(tmp_path / "out.json")] == ["a"]


def test_an_output_that_another_run_finishes_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    def finish_another(path, result):
        (tmp_path / "out.json").write_text("[]")
        return open_alone(path, result)

    open_alone = writer.open_alone
    monkeypatch.setattr(writer, "open_alone", finish_another)
    with pytest.raises(UserError, match="is there already"):
        AnnotationWriter(OutputSettings(output=tmp_path / "out.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_a_column_that_stands_twice_cannot_be_told_apart(world, capsys):
    (world / "t.csv").write_text("file,caption,caption,,\nb.png,x,y,,\n", encoding="utf-8")
    columns = ("--image_column", "file", "--caption_column", "caption")
    message = fail(capsys, "table", world, "--table", world / "t.csv", "--images", "emo", *columns)
    assert "t.csv: its first line has caption more than once; rename or delete the others" in message


def test_a_run_killed_before_the_last_rename_can_be_repeated(world, monkeypatch):
    """The annotations come last: as long as they are not there, nothing has to be overwritten."""
    replace = Path.replace

    def stop_at_output(path, target):
        if Path(target).name == "out.json":
            raise KeyboardInterrupt
        return replace(path, target)

    flags = captions_flags(world, "yi.jsonl")
    monkeypatch.setattr(Path, "replace", stop_at_output)
    with pytest.raises(SystemExit) as stop:
        run("captions", world, *flags)
    assert stop.value.code == 130
    assert (world / "out.manifest.json").exists() and not (world / "out.json").exists()
    monkeypatch.undo()
    assert len(run("captions", world, *flags)) == 2
    assert not list(world.glob(".*"))


def test_a_full_disk_is_one_sentence(world, capsys, monkeypatch):
    def fail_to_sync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail_to_sync)
    assert "the disk is full" in fail(capsys, "captions", world, *captions_flags(world, "yi.jsonl"), code=7)


def test_a_place_that_cannot_be_written_is_one_sentence(world, capsys):
    message = fail(capsys, "captions", world, *captions_flags(world, "yi.jsonl"), output="yi.jsonl/out.json")
    assert "cannot be written there" in message


# ---- emo-visual-data's own files ----


def test_emo_visual_reads_json_and_csv_alike(world):
    described = [
        {"filename": "0017383c-4a6d-4f1f-8aa4-8b19aa6c2283.jpg", "content": "狗，\n捂嘴"},
        {"filename": "b.png", "content": "猫, 两只"},
    ]
    (world / "data.json").write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
    (world / "data.csv").write_text(
        "0017383c-4a6d-4f1f-8aa4-8b19aa6c2283.jpg,狗，\\n捂嘴\nb.png,猫, 两只\n", encoding="utf-8"
    )
    from_json = run("emo_visual", world, "--data", world / "data.json", "--images", "emo", output="j.json")
    from_csv = run("emo_visual", world, "--data", world / "data.csv", "--images", "emo", output="c.json")
    assert [record["conversations"] for record in from_json] == [record["conversations"] for record in from_csv]
    assert [record["conversations"][1]["value"] for record in from_json] == ["狗，\n捂嘴", "猫, 两只"]
    annotator = "emo-visual-data data"
    assert from_json[1]["sources"] == [{"set": "emo", "annotator": annotator, "file": "data.json", "row": 1}]
    assert from_csv[1]["sources"] == [{"set": "emo", "annotator": annotator, "file": "data.csv", "line": 2}]


BAD_EMO = {
    "other keys": ('[{"picName": "b.png"}]', "data.json", "has no filename, content (keys: picName)"),
    "an object": ('{"b.png": "x"}', "data.json", "holds an object, expected an array"),
    "one cell": ("b.png\n", "data.csv", "has 1 cell"),
    "GBK": ("b.png,你好吗\n".encode("gbk"), "data.csv", "iconv -f GB18030 -t UTF-8"),
}


@pytest.mark.parametrize("content, name, message", BAD_EMO.values(), ids=BAD_EMO)
def test_emo_visual_faults(world, capsys, content, name, message):
    (world / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in fail(capsys, "emo_visual", world, "--data", world / name, "--images", "emo")


# ---- names that are the text ----


def test_chinese_bqb_names_become_reading_records(tmp_path, capsys):
    folder = tmp_path / "root/BQB/001"
    for index, name in enumerate(("00016鸽子-当鸽的怎么能骗你呢.jpg", "喷雾00014.gif", "力量.jpg")):
        draw(folder / name, (index, 0, 0))
    (record,) = run("chinese_bqb", tmp_path, "--images", "BQB")
    assert record["conversations"][0]["value"].removeprefix("<image>\n") in READ
    record["conversations"] = record["conversations"][1:]
    assert record == {
        "id": "00016鸽子-当鸽的怎么能骗你呢",
        "image": "BQB/001/00016鸽子-当鸽的怎么能骗你呢.jpg",
        "conversations": [{"from": "gpt", "value": "当鸽的怎么能骗你呢"}],
        "sources": [{"set": "BQB", "annotator": "file name", "file": "BQB/001/00016鸽子-当鸽的怎么能骗你呢.jpg"}],
        "text": "当鸽的怎么能骗你呢",
    }
    assert read_manifest(tmp_path)["counts"]["left_out"] == {"name without text": 2}
    assert "left out: name without text" in capsys.readouterr().out


def test_file_names_takes_equal_files_once_and_different_ones_both(tmp_path):
    draw(tmp_path / "root/a/好的.png", (1, 1, 1))
    draw(tmp_path / "root/b/好的.png", (1, 1, 1))
    draw(tmp_path / "root/a/不行.png", (2, 2, 2))
    draw(tmp_path / "root/b/不行.png", (3, 3, 3))
    draw(tmp_path / "root/b/IMG_1234.png", (4, 4, 4))
    records = run("file_names", tmp_path, "--images", ".")
    assert [(record["id"], record["image"], record["text"]) for record in records] == [
        ("不行", "a/不行.png", "不行"),
        ("不行_2", "b/不行.png", "不行"),
        ("好的", "a/好的.png", "好的"),
    ]


@pytest.mark.parametrize("command", ["file_names", "chinese_bqb", "emo_visual"])
def test_a_link_out_of_the_image_folder_is_a_problem_in_every_source(world, capsys, command):
    draw(world / "outside.png")
    link = world / "root/emo/汪蛋00024-磕头.png"
    link.symlink_to(world / "outside.png")
    (world / "data.json").write_text(json.dumps([{"filename": link.name, "content": "磕头"}]))
    flags = ["--images", "emo", *(["--data", world / "data.json"] if command == "emo_visual" else [])]
    message = fail(capsys, command, world, *flags)
    assert "1 problem, nothing was written" in message and "磕头.png' leaves the image folder" in message


def test_nothing_but_names_without_text_is_an_error(tmp_path, capsys):
    draw(tmp_path / "root/p/IMG_1234.png")
    assert "no record to write (1 name without text)" in fail(capsys, "file_names", tmp_path, "--images", "p")


# ---- tables ----


def test_table_with_text_and_question_columns(world):
    rows = [
        ["file", "caption", "words", "ask"],
        ["emo/b.png", " 猫，“喵” ", "喵", "这是什么？"],
        ["b.png", "白猫", "", ""],
    ]
    with (world / "t.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows(rows)
    columns = ("--image_column", "file", "--caption_column", "caption")
    extra = ("--text_column", "words", "--question_column", "ask", "--annotator", "me")
    records = run("table", world, "--table", world / "t.csv", "--images", "emo", *columns, *extra)
    assert [(record["text"], record["conversations"][1]["value"]) for record in records] == [
        ("喵", "猫，“喵”"),
        ("", "白猫"),
    ]
    assert records[0]["conversations"][0]["value"] == "<image>\n这是什么？"
    assert records[1]["conversations"][0]["value"].removeprefix("<image>\n") in DESCRIBE
    assert records[1]["sources"] == [{"set": "emo", "annotator": "me", "file": "t.csv", "line": 3}]


def test_table_of_transcriptions_asks_for_the_words(world):
    write_lines(world / "t.jsonl", [{"f": "b.png", "t": "喵喵"}])
    columns = ("--image_column", "f", "--caption_column", "t", "--text_column", "t")
    (record,) = run("table", world, "--table", world / "t.jsonl", "--images", "emo", *columns)
    assert record["conversations"][0]["value"].removeprefix("<image>\n") in READ and record["text"] == "喵喵"


BAD_TABLES = {
    "other columns": ("datei,caption\nb.png,x\n", "has no column file; its first line has datei, caption"),
    "a cell too many": ("file,caption\nb.png,x,y\n", "t.csv line 2: has 3 cells, the first line has 2"),
    "empty": ("", "its first line has nothing"),
    "GBK": ("file,caption\nb.png,你好吗\n".encode("gbk"), "iconv -f GB18030 -t UTF-8"),
    "a line break in a cell": ('file,caption\nb.png,"a\nb"\nx.png,c\n', "t.csv line 4: no image 'x.png'"),
}


@pytest.mark.parametrize("content, message", BAD_TABLES.values(), ids=BAD_TABLES)
def test_table_faults(world, capsys, content, message):
    (world / "t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    columns = ("--image_column", "file", "--caption_column", "caption")
    assert message in fail(capsys, "table", world, "--table", world / "t.csv", "--images", "emo", *columns)


# ---- LLaVA files ----


def llava_record(record_id="1", image="b.png", question="Describe.\n<image>"):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "a cat"}]
    return {"id": record_id, "image": image, "conversations": turns}


def test_llava_keeps_the_text_and_leads_paths_from_the_image_folder(world):
    (world / "blip.json").write_text(json.dumps([llava_record(), {**llava_record("2"), "model": "", "sources": None}]))
    records = run("llava", world, "--annotations", world / "blip.json", "--images", "emo")
    assert records == [
        {
            **llava_record(image="emo/b.png"),
            "sources": [{"set": "blip", "file": "blip.json", "row": 0}],
        },
        {
            **llava_record("2", image="emo/b.png"),
            "model": "",
            "sources": [{"set": "blip", "file": "blip.json", "row": 1}],
        },
    ]


BAD_LLAVA = {
    "no image tag": (llava_record(question="Describe."), "has 1 image but 0 <image>"),
    "no conversations": ({"id": "1", "image": "b.png"}, "no list 'conversations'"),
    "missing image": (llava_record(image="c.png"), "no image 'emo/c.png'"),
    "outside": (llava_record(image="../../c.png"), "leaves the image folder"),
    "no object": ("text", "is text, expected an object"),
    "sources are text": ({**llava_record(), "sources": "web"}, "'sources' is 'web', expected a list"),
}


@pytest.mark.parametrize("record, message", BAD_LLAVA.values(), ids=BAD_LLAVA)
def test_llava_faults(world, capsys, record, message):
    (world / "l.json").write_text(json.dumps([llava_record(), record]))
    flags = ("--annotations", world / "l.json", "--images", "emo")
    printed = fail(capsys, "llava", world, *flags)
    assert "l.json row 1: " in printed and message in printed
    assert len(run("llava", world, *flags, "--bad_records", "quarantine")) == 1
    assert read(world / "out.left_out.jsonl")[0]["original"] == record


# ---- the real files ----


def test_real_caption_files_convert_in_full(tmp_path):
    captions = SHARED_DATA / "captions"
    if not captions.is_dir():
        pytest.skip(f"{captions} is not there")
    path = captions / "ChineseBQB_picked_yivision.jsonl"
    names = [json.loads(line)["picName"] for line in path.read_text(encoding="utf-8").splitlines()]
    image = tmp_path / "image.png"
    draw(image)
    (tmp_path / "root/BQB").mkdir(parents=True)
    for name in names:
        (tmp_path / "root/BQB" / name).hardlink_to(image)
    flags = ("--captions", path, "--images", "BQB", "--bad_records", "quarantine")
    records = run("captions", tmp_path, *flags)
    assert len(records) == 4230 and len({record["id"] for record in records}) == 4230
    assert read_manifest(tmp_path)["counts"]["left_out"] == {"no caption": 1}
    assert sum("text" in record for record in records) > 4200
