"""Data sets with an image column: stored bytes become files once, rows become records, faults are named."""

import builtins
import hashlib
import io
import json
from types import SimpleNamespace

import prepare  # noqa: E402
import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from PIL import Image

from meme_llava.prepare.writer import DESCRIBE, READ  # noqa: E402

datasets = pytest.importorskip("datasets", reason="data/requirements.txt is not installed")
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402


def encode(color, image_format="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(buffer, image_format)
    return buffer.getvalue()


RED, GREEN, BLUE = encode((255, 0, 0)), encode((0, 255, 0), "JPEG"), encode((0, 0, 255), "GIF")


def write_parquet(path, rows, columns, image_feature=True, row_group_size=2):
    """Columns are {name: type of the values}; the column `image` holds the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {name: datasets.Value("string") for name in columns}
    image = datasets.Image() if image_feature else {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    schema = datasets.Features({"image": image, **features}).arrow_schema
    rows = [{**row, "image": {"bytes": row["image"], "path": row.get("path")}} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=row_group_size)
    return path


def run(folder, *flags, output="out.jsonl"):
    (folder / "root").mkdir(exist_ok=True)
    prepare.main(
        [
            *("parquet", "--image_folder", str(folder / "root"), "--images_to", "set/images"),
            *("--output", str(folder / output), *map(str, flags)),
        ]
    )
    text = (folder / output).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if output.endswith("l") else json.loads(text)


def fail(capsys, folder, *flags):
    with pytest.raises(SystemExit) as stop:
        run(folder, *flags)
    assert stop.value.code == 2 and not (folder / "out.jsonl").exists()
    return capsys.readouterr().err


def name_file(data, ending):
    return f"{hashlib.sha256(data).hexdigest()[:16]}.{ending}"


@pytest.fixture
def text_file(tmp_path):
    rows = [{"image": data, "text": text} for data, text in ((RED, "红"), (GREEN, " 绿 "), (BLUE, "蓝"), (RED, "赤"))]
    return write_parquet(tmp_path / "lines.parquet", rows, ["text"])


def test_transcriptions_become_reading_records_and_bytes_stay(tmp_path, text_file):
    records = run(tmp_path, "--dataset", text_file)
    images = [f"set/images/{name}" for name in (name_file(RED, "png"), name_file(GREEN, "jpg"), name_file(BLUE, "gif"))]
    assert [(record["id"], record["image"], record["text"]) for record in records] == [
        ("lines_000000", images[0], "红"),
        ("lines_000001", images[1], "绿"),
        ("lines_000002", images[2], "蓝"),
        ("lines_000003", images[0], "赤"),
    ]
    assert [(tmp_path / "root" / image).read_bytes() for image in images] == [RED, GREEN, BLUE]
    question, answer = records[1]["conversations"]
    assert question["value"].removeprefix("<image>\n") in READ and answer["value"] == "绿"
    assert records[1]["sources"] == [{"set": "lines", "row": 1}]
    manifest = json.loads((tmp_path / "out.manifest.json").read_text())
    assert manifest["counts"]["noted"] == {"images written": 3, "rows whose image was stored already": 1}
    assert manifest["inputs"][0] == {"dataset": "lines", "split": "train", "rows": 4}
    assert manifest["inputs"][1]["sha256"] == hashlib.sha256(text_file.read_bytes()).hexdigest()


def test_a_second_run_writes_no_image_again_and_fixes_a_damaged_one(tmp_path, text_file):
    first = run(tmp_path, "--dataset", text_file)
    folder = tmp_path / "root/set/images"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    damaged = folder / name_file(RED, "png")
    damaged.write_bytes(RED[:20])
    assert run(tmp_path, "--dataset", text_file, "--overwrite") == first
    assert {path.name for path in folder.iterdir()} == set(before)
    assert damaged.read_bytes() == RED
    assert (folder / name_file(GREEN, "jpg")).stat().st_mtime_ns == before[name_file(GREEN, "jpg")]


def test_several_files_a_folder_limit_and_an_array(tmp_path, text_file):
    other = write_parquet(tmp_path / "more/data/train-0.parquet", [{"image": RED, "text": "又"}], ["text"])
    records = run(tmp_path, "--dataset", text_file, other, "--limit", 5, output="array.json")
    assert [record["text"] for record in records] == ["红", "绿", "蓝", "赤", "又"]
    assert [record["text"] for record in run(tmp_path, "--dataset", tmp_path / "more")] == ["又"]
    assert len(run(tmp_path, "--dataset", text_file, "--limit", 2, output="limit.jsonl")) == 2


def test_plain_structs_and_plain_bytes_are_images_too(tmp_path):
    struct = write_parquet(tmp_path / "s.parquet", [{"image": RED, "text": "红"}], ["text"], image_feature=False)
    assert len(run(tmp_path, "--dataset", struct)) == 1
    pq.write_table(pa.table({"img": [RED], "label": ["红"]}), tmp_path / "b.parquet")
    assert run(tmp_path, "--dataset", tmp_path / "b.parquet", "--overwrite")[0]["text"] == "红"


def test_questions_and_answers_of_chinese_ocr_bench(tmp_path):
    rows = [
        {"image": RED, "question": "店名是什么？", "answers": "红店"},
        {"image": GREEN, "question": "", "answers": "x"},
    ]
    path = write_parquet(tmp_path / "q.parquet", rows, ["question", "answers"])
    records = run(tmp_path, "--dataset", path)
    assert records[0]["conversations"][0]["value"] == "<image>\n店名是什么？"
    assert records[0]["conversations"][1]["value"] == "红店" and "text" not in records[0]
    assert records[1]["conversations"][0]["value"].removeprefix("<image>\n") in DESCRIBE


def test_lists_of_answers_give_the_first_and_count_the_others(tmp_path):
    table = pa.table({"image": [RED], "answers": [["甲", "乙"]]})
    pq.write_table(table, tmp_path / "l.parquet")
    assert run(tmp_path, "--dataset", tmp_path / "l.parquet")[0]["conversations"][1]["value"] == "甲"
    noted = json.loads((tmp_path / "out.manifest.json").read_text())["counts"]["noted"]
    assert noted["rows with further answers, of which the first was taken"] == 1


def test_ground_truth_json_of_donut_sets(tmp_path):
    reference = json.dumps({"gt_parse": {"text_sequence": "一行字"}})
    path = write_parquet(tmp_path / "d.parquet", [{"image": RED, "ground_truth": reference}], ["ground_truth"])
    assert run(tmp_path, "--dataset", path)[0]["text"] == "一行字"


def test_named_columns_win(tmp_path):
    path = write_parquet(
        tmp_path / "n.parquet", [{"image": RED, "a": "答", "b": "字", "text": "x"}], ["a", "b", "text"]
    )
    (record,) = run(tmp_path, "--dataset", path, "--caption_column", "a", "--text_column", "b")
    assert record["text"] == "字" and record["conversations"][1]["value"] == "答"
    assert record["conversations"][0]["value"].removeprefix("<image>\n") in DESCRIBE


BAD_ROWS = {
    "no image": ({"image": None, "text": "x"}, "has no image"),
    "no text": ({"image": RED, "text": " "}, "text is empty"),
    "null text": ({"image": RED, "text": None}, "text is empty"),
    "HTML in place of an image": (
        {"image": b"<html>", "text": "x"},
        "is not a JPEG/PNG/GIF/WEBP/BMP image but a web page",
    ),
    "an empty image": ({"image": b"", "text": "x"}, "has no image"),
}


@pytest.mark.parametrize("row, reason", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_stop_the_run_or_are_quarantined(tmp_path, capsys, row, reason):
    path = write_parquet(tmp_path / "r.parquet", [{"image": RED, "text": "红"}, row], ["text"])
    message = fail(capsys, tmp_path, "--dataset", path)
    assert "1 problem, " in message and "r row 1: " in message and reason in message
    assert len(run(tmp_path, "--dataset", path, "--bad_records", "quarantine")) == 1
    (left_out,) = (tmp_path / "out.left_out.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(left_out)["place"] == "r row 1" and json.loads(left_out)["original"] == {"text": row["text"]}


def test_columns_that_cannot_be_told_are_listed(tmp_path, capsys):
    path = write_parquet(tmp_path / "c.parquet", [{"image": RED, "wörter": "x"}], ["wörter"])
    assert "it has image, wörter" in fail(capsys, tmp_path, "--dataset", path)
    assert "--text_column words" in fail(capsys, tmp_path, "--dataset", path, "--text_column", "words")


def test_caption_files_are_sent_to_the_captions_command(tmp_path, capsys):
    pq.write_table(pa.table({"picName": ["a.jpg"], "description": ["x"]}), tmp_path / "meme.parquet")
    assert "prepare.py captions" in fail(capsys, tmp_path, "--dataset", tmp_path / "meme.parquet")


PLACES = {
    "no such file": (["nowhere.parquet"], "no such file or folder. Give parquet files"),
    "two hub ids": (["a/b", "c/d"], "no such file or folder"),
    "one of several files": (["lines.parquet", "gone.parquet"], "Unable to find"),
    "an empty folder": (["empty"], "doesn't contain any data files"),
    "another form": (["text.csv"], "text.csv: cannot be read as parquet"),
    "no parquet inside": (["broken.parquet"], "cannot be read"),
}


@pytest.mark.parametrize("names, message", PLACES.values(), ids=PLACES)
def test_places_without_a_data_set(tmp_path, capsys, monkeypatch, text_file, names, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.csv").write_text("x")
    (tmp_path / "broken.parquet").write_text("x")
    assert message in fail(capsys, tmp_path, "--dataset", *names)


def test_without_a_connection_one_sentence_tells_what_to_do(tmp_path, capsys):
    # conftest sets HF_HUB_OFFLINE.
    message = fail(capsys, tmp_path, "--dataset", "SWHL/ChineseOCRBench")
    assert "SWHL/ChineseOCRBench: reading it" in message and "HF_ENDPOINT" in message
    assert "HF_HUB_OFFLINE is set" in message and "Traceback" not in message


def test_a_set_that_the_hub_lacks_or_keeps_for_itself_is_named(tmp_path, capsys, monkeypatch):
    def refuse(api, name):
        raise RepositoryNotFoundError("404 Client Error.", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    message = fail(capsys, tmp_path, "--dataset", "nobody/nothing")
    assert "nobody/nothing: no such data set, or it asks for a log-in (HF_TOKEN): 404 Client Error." in message


def test_images_stay_inside_the_image_folder(tmp_path, capsys, text_file):
    message = fail(capsys, tmp_path, "--dataset", text_file, "--images_to", "../elsewhere")
    assert "must lie inside --image_folder" in message


def test_without_datasets_the_package_is_named(tmp_path, capsys, monkeypatch, text_file):
    real_import = builtins.__import__

    def refuse(name, *arguments, **options):
        if name == "datasets":
            raise ImportError("No module named 'datasets'")
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert "pip install -r data/requirements.txt" in fail(capsys, tmp_path, "--dataset", text_file)


def test_a_row_cannot_name_a_file_of_this_machine(tmp_path, capsys):
    (tmp_path / "private.png").write_bytes(RED)
    rows = [{"image": None, "path": str(tmp_path / "private.png"), "text": "x"}]
    path = write_parquet(tmp_path / "r.parquet", rows, ["text"])
    with pytest.raises(SystemExit):
        run(tmp_path, "--dataset", path)
    assert "r row 0: has no image" in capsys.readouterr().err
    assert list((tmp_path / "root").rglob("*.png")) == []
