"""data/check.py says what an annotation file amounts to, writes it down, and ends as its policy says."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, World
from PIL import Image

spec = importlib.util.spec_from_file_location("check_script", ROOT / "data" / "check.py")
check_script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_script)


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        image = Image.new("RGB", (100 + number, 80), (80 * number, 0, 0))
        image.putpixel((0, 0), (255, 255, 255))
        image.save(folder / f"p{number}.png")
    return folder


def make_records(count: int = 3) -> list[dict]:
    return [
        {
            "id": f"r{number}",
            "image": f"p{number}.png",
            "conversations": [
                {"from": "human", "value": "<image>\n图里写了什么？"},
                {"from": "gpt", "value": f"图里写着第{number}句话，很开心的样子。"},
            ],
        }
        for number in range(count)
    ]


def spoil(records: list[dict]) -> list:
    """A refusal, a missing image, no record at all."""
    records[0]["conversations"][1]["value"] = "抱歉，我无法回答。"
    records[2]["image"] = "gone.png"
    return [*records, "text"]


def run(folder: Path, records: list, *flags) -> Path:
    annotations = folder.parent / "memes.json"
    annotations.write_text(json.dumps(records), encoding="utf-8")
    output_dir = folder.parent / "out"
    check_script.main(
        [
            *("--annotations", str(annotations), "--image_folder", str(folder), "--output_dir", str(output_dir)),
            *map(str, flags),
        ]
    )
    return output_dir


def fail(capsys, folder: Path, records: list, *flags) -> str:
    with pytest.raises(SystemExit) as stop:
        run(folder, records, *flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_facts(output_dir: Path) -> dict[str, str]:
    return json.loads((output_dir / "run_record.json").read_text(encoding="utf-8"))["facts"]


# ---- What is written, and how it ends ----


def test_clean_data_end_well_and_write_a_report(folder, capsys):
    output_dir = run(folder, make_records())
    assert {path.name for path in output_dir.iterdir()} == {"report.html", "findings.jsonl", "run_record.json"}
    assert (output_dir / "findings.jsonl").read_bytes() == b""
    printed = capsys.readouterr().out
    assert "3 records can be trained on, none is bad" in printed
    assert f"report: {output_dir / 'report.html'}; all findings: {output_dir / 'findings.jsonl'}" in printed
    record = json.loads((output_dir / "run_record.json").read_text(encoding="utf-8"))
    assert record["stage"] == "check" and record["findings"] == {}
    assert record["settings"]["annotations"] == str(folder.parent / "memes.json")
    assert "r1" in (output_dir / "report.html").read_text(encoding="utf-8")


def test_captions_of_other_images_are_doubted(folder, capsys):
    records = make_records()
    for record in records[:2]:
        record["text"] = "别的图上的字"
    run(folder, records)
    doubt = "2 of 2 answers lack most of the words known to stand in their images; do the captions belong to these"
    assert doubt in capsys.readouterr().out
    records[0]["text"] = "图里写着"
    run(folder, records)
    assert "do the captions belong" not in capsys.readouterr().out


def test_a_wrong_image_folder_is_asked_about(folder, capsys):
    records = make_records()
    for record in records:
        record["image"] = f"elsewhere/{record['image']}"
    error = fail(capsys, folder, records)
    assert "holds no record that can be trained on, e.g. memes.json record 0 (id 'r0'): " in error
    assert "Images of 3 records are missing; is --image_folder (IMAGE_FOLDER of run.sh) the folder" in error


def test_without_a_model_neither_torch_nor_transformers_is_loaded():
    """They take ten times as long as the check of the samples."""
    script = "import sys, check; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT / "data", check=False).returncode == 0


def test_a_record_that_lacks_several_images_is_one_record(folder, capsys):
    records = make_records()
    records[0] |= {"image": ["1.png", "2.png", "3.png"]}
    records[0]["conversations"][0]["value"] = "<image><image><image>\n？"
    assert "Images of" not in fail(capsys, folder, records)


def test_bad_records_end_in_an_error_after_the_report_is_written(folder, capsys):
    error = fail(capsys, folder, spoil(make_records()))
    output_dir = folder.parent / "out"
    assert error.endswith(
        f"error: 3 of 4 records are bad; {output_dir / 'quarantine.jsonl'} holds them with the reasons. Fix them, or "
        "train without them: --bad_records quarantine\n"
    )
    assert {path.name for path in output_dir.iterdir()} == {
        *("report.html", "findings.jsonl", "run_record.json", "quarantine.jsonl"),
    }
    assert [
        (finding["place"], finding["record_id"], finding["kind"], finding["severity"])
        for finding in read_lines(output_dir / "findings.jsonl")
    ] == [
        ("memes.json record 0", "r0", "refusal", "bad"),
        ("memes.json record 2", "r2", "missing_image", "bad"),
        ("memes.json record 3", "?", "malformed", "bad"),
    ]
    assert [line["record"] for line in read_lines(output_dir / "quarantine.jsonl")] == [
        record for index, record in enumerate(spoil(make_records())) if index != 1
    ]


def test_a_report_replaces_a_report_and_no_other_result(folder, capsys):
    output_dir = run(folder, make_records())
    (output_dir / "report.html").write_text("earlier")
    run(folder, make_records())
    assert "r1" in (output_dir / "report.html").read_text(encoding="utf-8")
    (output_dir / "run_record.json").write_text('{"stage": "merge"}')
    (output_dir / "model.safetensors").write_text("trained for days")
    with pytest.raises(SystemExit):
        run(folder, make_records())
    assert "out: holds what 'merge' wrote (run_record.json), and only an earlier" in capsys.readouterr().err
    assert (output_dir / "model.safetensors").read_text() == "trained for days"


def test_under_quarantine_bad_records_are_no_error(folder, capsys):
    output_dir = run(folder, spoil(make_records()), "--bad_records", "quarantine")
    printed = capsys.readouterr().out
    assert f"3 of 4 records are bad; {output_dir / 'quarantine.jsonl'} holds them with the reasons. train.py" in printed
    assert len(read_lines(output_dir / "quarantine.jsonl")) == 3


@pytest.mark.parametrize("policy", ["error", "quarantine"])
@pytest.mark.parametrize("records", [[], ["text"]], ids=["empty", "all bad"])
def test_data_without_a_record_to_train_on_are_an_error_under_every_policy(folder, capsys, policy, records):
    error = fail(capsys, folder, records, "--bad_records", policy)
    assert "memes.json: holds no record that can be trained on" in error
    assert (folder.parent / "out" / "report.html").is_file()


def test_noted_findings_are_printed_and_make_nothing_bad(folder, capsys):
    (folder / "p1.png").rename(folder / "p1.jpg")
    records = make_records()
    records[1]["image"] = "p1.jpg"
    output_dir = run(folder, records)
    printed = capsys.readouterr().out
    assert "wrong_extension" in printed and "3 records can be trained on, none is bad" in printed
    assert [finding["severity"] for finding in read_lines(output_dir / "findings.jsonl")] == ["noted"]
    assert not (output_dir / "quarantine.jsonl").exists()


def test_allow_and_refuse_change_what_is_bad(folder, capsys):
    records = make_records()
    records[0]["conversations"][1]["value"] = "抱歉，我无法回答。"
    run(folder, records, "--allow", "refusal")
    assert "3 records can be trained on, none is bad" in capsys.readouterr().out
    (folder / "p1.png").rename(folder / "p1.jpg")
    records[1]["image"] = "p1.jpg"
    error = fail(capsys, folder, records, "--allow", "refusal", "--refuse", "wrong_extension")
    assert "1 of 3 records is bad" in error


def test_a_second_check_replaces_the_first(folder, capsys):
    fail(capsys, folder, spoil(make_records()[::-1]))
    run(folder, make_records())
    assert not (folder.parent / "out" / "quarantine.jsonl").exists()
    output_dir = run(folder, make_records())
    assert (output_dir / "findings.jsonl").read_bytes() == b""


def test_a_strangers_folder_is_left_alone(folder, capsys, monkeypatch):
    output_dir = folder.parent / "out"
    output_dir.mkdir()
    (output_dir / "thesis.txt").write_text("mine")
    monkeypatch.setattr(check_script, "check_data", lambda *_, **__: pytest.fail("it took minutes to say so"))
    error = fail(capsys, folder, make_records())
    assert f"{output_dir}: has no run_record.json, so it is not an output of ours" in error
    assert [path.name for path in output_dir.iterdir()] == ["thesis.txt"]


def test_text_that_is_no_unicode_ends_nowhere_in_a_crash(folder, capsys):
    """JSON can spell half a surrogate pair anywhere; only in what is trained on does it make a record bad."""
    half = "\ud83d"
    first, second, third = make_records()
    records = [{**first, "id": half}, {**second, "text": half, "sources": [{"set": half}]}, {half: half}, third]
    output_dir = run(folder, records, "--bad_records", "quarantine")
    assert [line["record"] for line in read_lines(output_dir / "quarantine.jsonl")] == [{half: half}]
    assert (output_dir / "report.html").read_bytes().decode("utf-8")


# ---- Numbers ----


def test_steps_and_limits_that_nobody_gave_are_not_made_up(folder):
    facts = read_facts(run(folder, make_records()))
    assert facts["steps"] == "unknown; give --global_batch_size and --num_train_epochs"
    assert "records a step" not in facts and "epochs" not in facts
    assert "length limit" not in facts


def test_facts_without_a_model_written_out(folder):
    (folder / "copy.png").write_bytes((folder / "p0.png").read_bytes())
    records = make_records()
    records.append({**make_records()[0], "id": "copy", "image": "copy.png"})
    records.append({**make_records()[0], "id": "bad", "image": "gone.png"})
    output_dir = run(
        folder, records, *("--bad_records", "quarantine", "--global_batch_size", 3, "--num_train_epochs", 2.5)
    )
    assert read_facts(output_dir) == {
        "annotations": str(folder.parent / "memes.json"),
        "image folder": str(folder),
        "records": "5",
        "usable records": "4",
        "bad records": "1",
        "images": "5",
        "different images": "3",
        "steps": "4",  # 4 x 2.5 = 10 records, 3 a step
        "records a step": "3",
        "epochs": "2.5",
        "positions": "unknown; give --model to tokenise the records",
    }


def test_lengths_and_steps_with_a_model_are_those_of_training(world: World, trained, tmp_path, capsys):
    flags = ("--model", world.base, "--allow", "duplicate_caption", "--num_train_epochs", 3, "--global_batch_size", 4)
    check_script.main(
        [
            *("--annotations", str(world.annotations), "--image_folder", str(world.image_folder)),
            *("--output_dir", str(tmp_path / "out"), *map(str, flags)),
        ]
    )
    # The eight records take 45, 64, 49, 34, 48, 44, 43 and 45 positions; 73 carry loss, 32 are those of 8 images.
    facts = read_facts(tmp_path / "out")
    assert {name: facts[name] for name in EXPECTED_FACTS} == EXPECTED_FACTS
    data = json.loads((trained / "run_record.json").read_text())["data"]
    assert (data["mean_positions"], data["longest"], data["mean_supervised"]) == (46.5, 64, 9.1)
    assert "Positions a record" in capsys.readouterr().out


EXPECTED_FACTS = {
    "steps": "6",  # 8 records 3 times, 4 a step
    "epochs": "3",
    "length limit": "unknown; give --model_max_length",
    "positions a record": "46.5 (median 45, 95 % under 58)",
    "longest record": "64 positions",
    "supervised positions": "19.6% of all",
    "image positions": "8.6% of all",
    "positions an epoch": "372",
}


def test_records_beyond_the_length_are_found_with_a_model(world: World, tmp_path, capsys):
    def run_with(length: int) -> dict:
        check_script.main(
            [
                *("--annotations", str(world.annotations), "--image_folder", str(world.image_folder)),
                *("--output_dir", str(tmp_path / "out"), "--model", str(world.base)),
                *("--model_max_length", str(length), "--bad_records", "quarantine"),
            ]
        )
        return json.loads((tmp_path / "out" / "run_record.json").read_text())["findings"]

    noted = run_with(2048)
    assert "cut_answer" not in run_with(64) and "too_long" not in noted
    assert run_with(63)["cut_answer"] == 1
    with pytest.raises(SystemExit):
        run_with(10)
    assert "holds no record that can be trained on" in capsys.readouterr().err


# ---- Settings ----


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--bad_record", "error"), "unknown setting --bad_record (did you mean --bad_records?)"),
        (("--bad_records", "drop"), "argument --bad_records: invalid choice: 'drop'"),
        (("--allow", "refusals"), "--allow refusals: no such kind of finding (did you mean refusal?)"),
        (("--allow", "malformed"), "--allow malformed: such a record cannot be trained on"),
        (("--refuse", "loop", "--allow", "loop"), "loop: both in --allow and in --refuse"),
        (("--max_pixels", "0"), "--max_pixels is 0, expected at least 1"),
        (("--workers", "0"), "--workers is 0, expected greater than 0"),
        (("--num_train_epochs", "nan"), "--num_train_epochs is nan, expected greater than 0"),
        (("--num_train_epochs", "inf"), "--num_train_epochs is inf, expected greater than 0"),
        (("--global_batch_size", "-1"), "--global_batch_size is -1, expected greater than 0"),
        (("--model_max_length", "0"), "--model_max_length is 0, expected greater than 0"),
        (("--report_records", "-1"), "--report_records is -1, expected 0 or more"),
        (("--model", "/nowhere"), "/nowhere: no such model folder"),
        (("--image_folder", "/nowhere"), "/nowhere: no such image folder"),
        (("--image_folder", __file__), f"{__file__}: is a file, expected the folder"),
        (("--output_dir", "."), ".: is not a name for a new directory"),
        (("--annotations", "/nowhere.json"), "/nowhere.json: No such file or directory"),
    ],
)
def test_settings_that_cannot_be_meant_stop_before_anything_is_written(folder, capsys, flags, message):
    assert message in fail(capsys, folder, make_records(), *flags)
    assert not (folder.parent / "out").exists()


def test_annotations_and_image_folder_must_be_given(capsys):
    with pytest.raises(SystemExit) as stop:
        check_script.main([])
    assert stop.value.code == 2
    assert "the following arguments are required: --annotations, --image_folder" in capsys.readouterr().err


@pytest.mark.parametrize("count", [0, 2])
def test_the_report_shows_as_many_records_as_asked(folder, count):
    output_dir = run(folder, spoil(make_records()), "--bad_records", "quarantine", "--report_records", count)
    assert (output_dir / "report.html").is_file()
    assert len(read_lines(output_dir / "findings.jsonl")) == 3
