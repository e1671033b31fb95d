"""Which images are asked about, what is said of the others, and of those that were trained on."""

import json

import pytest
from PIL import Image

from meme_llava.dataset.check import check_records
from meme_llava.dataset.findings import RecordPolicy
from meme_llava.errors import UserError
from meme_llava.inference.questions import Question, check_images, list_file_questions, warn_of_trained


def test_a_folder_gives_its_images_and_says_what_it_leaves_out(tmp_path, capsys):
    for name in ("b.jpg", "小朋友天天做饭", "._mac.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, "JPEG")
    (tmp_path / "b.avif").write_bytes(b"\0\0\0\x20ftypavif" + bytes(40))
    asked = list_file_questions([tmp_path], "写了什么？")
    assert [question.image.name for question in asked] == ["b.jpg", "小朋友天天做饭"]
    said = capsys.readouterr().err
    assert said == f"left out of {tmp_path}: 1 hidden, e.g. ._mac.jpg; 1 in AVIF format, to be converted, e.g. b.avif\n"


def test_a_folder_without_an_image_says_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("好")
    with pytest.raises(UserError, match=r"holds no image \(1 not an image, e.g. notes.txt\)"):
        list_file_questions([tmp_path], "写了什么？")
    (tmp_path / "notes.txt").unlink()
    with pytest.raises(UserError, match=r"holds no image \(nothing\)"):
        list_file_questions([tmp_path], "写了什么？")


def test_an_image_that_is_too_large_to_be_shown_stops_before_a_model_is_loaded(tmp_path, monkeypatch):
    Image.new("RGB", (100, 80)).save(tmp_path / "a.png")
    monkeypatch.setattr("meme_llava.inference.questions.MAX_PIXELS", 7_999)
    with pytest.raises(UserError, match=r"a.png: 100x80 pixels, more than the limit of 7,999; scale it down"):
        check_images([Question(tmp_path / "a.png", "写了什么？")], tmp_path / "val.json", tmp_path)


def test_a_name_that_is_spelt_nearly_so_is_shown(tmp_path):
    (tmp_path / "A.PNG").touch()
    near = r"; there is 'A.PNG', which differs in case"
    with pytest.raises(UserError, match=f"a.png: no such file or folder{near}"):
        list_file_questions([tmp_path / "a.png"], "写了什么？")
    with pytest.raises(UserError, match=f"a.png: No such file or directory{near}"):
        check_images([Question(tmp_path / "a.png", "写了什么？")], tmp_path / "val.json", tmp_path)


def test_images_that_cannot_be_read_are_listed_by_cause(tmp_path):
    (tmp_path / "page.jpg").write_text("<html>")
    questions = [Question(tmp_path / name, "写了什么？") for name in ("1.jpg", "2.jpg", "page.jpg", "3.jpg", "4.jpg")]
    with pytest.raises(UserError) as caught:
        check_images(questions, tmp_path / "val.json", tmp_path)
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'val.json'}: 5 of 5 images cannot be read:",
        "  4 images: there is no such file [missing_image], e.g.",
        *(f"    {tmp_path / name}: No such file or directory" for name in ("1.jpg", "2.jpg", "3.jpg")),
        f"  {tmp_path / 'page.jpg'}: not a JPEG/PNG/GIF/WEBP/BMP image but a web page: a failed download",
        f"Fix them or leave out their records, or give the right --image_folder ({tmp_path}; EVAL_IMAGE_FOLDER in "
        "run.sh).",
    ]


def test_images_and_answers_that_are_trained_on_are_counted_by_their_contents(tmp_path, capsys):
    for name, colour in (("a", "red"), ("moved", "red"), ("b", "blue"), ("refused", "green"), ("new", "white")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    records = [
        {"id": name, "image": f"{name}.png", "conversations": [{"from": "human", "value": "<image>\n这是什么？"}, turn]}
        for name, turn in (
            ("a", {"from": "gpt", "value": "写着“好耶”。"}),
            ("b", {"from": "gpt", "value": "小朋友"}),
            ("refused", {"from": "gpt", "value": "抱歉，我无法回答。"}),  # not trained on
        )
    ]
    (tmp_path / "train.json").write_text(json.dumps(records))
    training = check_records(tmp_path / "train.json", tmp_path, RecordPolicy(bad_records="quarantine"))
    asked = [
        Question(tmp_path / f"{name}.png", "这是什么？", reference)
        for name, reference in (
            ("moved", "写着好耶"),
            ("moved", "写着别的"),
            ("b", "写着“好耶”。"),
            ("new", "小朋友"),
            ("refused", "抱歉，我无法回答。"),
        )
    ]
    annotations = tmp_path / "val.json"
    facts = check_images(asked, annotations, tmp_path)
    counts = warn_of_trained(annotations, asked, facts, training)
    assert counts == {"images_trained_on": 2, "answers_trained_on": 1}
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"warning: 2 of 4 images of {annotations} are trained on, 1 of 5 answers too; leave these records out of one "
        "of both files, or the scores after training say too much"
    )
    assert warn_of_trained(annotations, asked[3:], facts, training) == {}
    assert capsys.readouterr().err == ""
