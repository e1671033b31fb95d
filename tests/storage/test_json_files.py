"""Files of JSON that are damaged, and fields of another kind: each is one whole sentence."""

import pytest

from meme_llava.errors import CheckpointError, UserError
from meme_llava.storage.json_files import check_fields, check_json_files, read_json

ADVICE = "Download, copy or make it again."
WHOLE = '{"name": "好", "step": 3}'


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (WHOLE.encode()[:9], "ends in the middle"),
        (WHOLE.encode()[:-1], "ends in the middle"),
        (b'{"name": "ab', "ends in the middle"),
        (WHOLE.encode("utf-8-sig"), "begins with a byte order mark, expected UTF-8 without one"),
        (WHOLE.encode("utf-16"), "is in UTF-16, expected UTF-8"),
        (WHOLE.encode("gbk"), "is not UTF-8 (invalid start byte)"),
        (b'{\n"a": one}', "is not JSON (line 2, column 6: Expecting value)"),
        (WHOLE.encode() * 2, "is not JSON (line 1, column 25: Extra data)"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
        (b'{"b": {"a": 1, "a": 2}}', "the key 'a' stands twice"),
        (b"[" * 100_000, "is nested too deep"),
        (b'{"a": ' + b"1" * 5000 + b"}", "holds a number of more than 4,300 digits"),
        (b"[1]", "holds a list, expected an object {…}"),
        (b"null", "holds null, expected an object {…}"),
        (b"3", "holds a whole number, expected an object {…}"),
    ],
)
def test_a_damaged_file_is_one_sentence(content, fault, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(path)
    assert str(caught.value) == f"{path}: {fault}. {ADVICE}"


def test_a_missing_file_is_one_sentence_of_the_kind_and_advice_that_is_asked_for(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        read_json(tmp_path / "a.json", advice="Copy it again.", error=CheckpointError)
    assert str(caught.value) == f"{tmp_path / 'a.json'}: no such file. Copy it again."


def test_a_whole_file_is_its_object(tmp_path):
    (tmp_path / "a.json").write_text(WHOLE)
    assert read_json(tmp_path / "a.json") == {"name": "好", "step": 3}


@pytest.mark.parametrize(
    ("value", "kinds", "fault"),
    [
        ({"base": {"folder": None}}, {"base.folder": str}, "base.folder is null, expected text"),
        ({"base": {}}, {"base.folder": str}, "has no base.folder"),
        ({"base": []}, {"base.folder": str}, "has no base.folder"),
        ({"base": []}, {"base": dict}, "base is a list, expected an object"),
        ({"step": True}, {"step": int}, "step is true, expected a whole number"),
        ({"step": "3"}, {"step": int}, 'step is "3", expected a whole number'),
        ({"step": 3.5}, {"step": int}, "step is 3.5, expected a whole number"),
        ({"alpha": float("nan")}, {"alpha": float}, "alpha is nan, expected a finite number"),
        ({"alpha": "32"}, {"alpha": float}, 'alpha is "32", expected a number'),
    ],
)
def test_a_field_of_another_kind_is_one_sentence(value, kinds, fault, tmp_path):
    path = tmp_path / "run_record.json"
    with pytest.raises(UserError) as caught:
        check_fields(path, value, kinds)
    assert str(caught.value) == f"{path}: {fault}. {ADVICE}"


def test_fields_of_the_right_kinds_pass(tmp_path):
    value = {"base": {"folder": "a"}, "step": 3, "alpha": 8, "rates": {}, "groups": [], "on": True}
    kinds = {"base.folder": str, "step": int, "alpha": float, "rates": dict, "groups": list, "on": bool}
    check_fields(tmp_path, value, kinds)


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors.index.json"])
def test_the_damaged_file_of_a_model_folder_is_found(name, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "modules.json").write_text("[]")  # of a library that reads no LLaVA
    check_json_files(tmp_path)
    (tmp_path / name).write_text('{"version"')
    with pytest.raises(UserError, match=f"{name}: ends in the middle"):
        check_json_files(tmp_path)
