"""Mixing and splitting: how often a record is taken, who stays together, and that nothing leaks."""

import json
import random
import shutil

import numpy as np
import prepare  # noqa: E402
import pytest
from conftest import SHARED_DATA
from PIL import Image

from meme_llava.prepare.mixing import draw_groups
from meme_llava.prepare.splitting import hash_images


def make_record(record_id, image=None, **more):
    images = [] if image is None else [image] if isinstance(image, str) else image
    record = {"id": record_id, **({} if image is None else {"image": image}), **more}
    question = "<image>" * len(images) + "问"
    return {**record, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "答"}]}


def write(path, records):
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def mix(folder, *flags):
    prepare.main(["mix", "--output", str(folder / "mix.json"), "--overwrite", *map(str, flags)])
    return read(folder / "mix.json")


@pytest.fixture
def files(tmp_path):
    write(tmp_path / "a.json", [make_record("1", "x.png"), make_record("2", "y.png"), make_record("3", "x.png")])
    write(tmp_path / "b.json", [make_record("1", "y.png"), make_record("b", "z.png"), make_record("t")])
    return tmp_path


def test_records_of_an_image_are_adjacent_and_ids_told_apart(files):
    records = mix(files, "--annotations", files / "a.json", files / "b.json")
    assert [(record["id"], record.get("image")) for record in records] == [
        ("a_1", "x.png"),
        ("3", "x.png"),
        ("2", "y.png"),
        ("b_1", "y.png"),
        ("b", "z.png"),
        ("t", None),
    ]
    assert records[0]["sources"] == [{"set": "a", "file": "a.json", "row": 0}]
    noted = read(files / "mix.manifest.json")["counts"]["noted"]
    assert noted["ids that stood in several files, now with the file's name in front"] == 2


def test_null_for_an_id_or_for_sources_is_as_good_as_none(tmp_path):
    path = write(tmp_path / "a.json", [make_record(None, "x.png", sources=None), make_record(None, "y.png", task=None)])
    records = mix(tmp_path, "--annotations", path)
    assert [record["id"] for record in records] == ["a_0", "a_1"], "both were called None"
    assert records[0]["sources"] == [{"set": "a", "file": "a.json", "row": 0}]


def test_a_mixture_without_end_is_refused_before_it_is_copied(files, capsys):
    with pytest.raises(SystemExit):
        mix(files, "--annotations", files / "a.json", files / "b.json", "--weights", 1, 1e9)
    assert "--weights ask for 3,000,000,003 records, expected at most 10,000,000; lower" in capsys.readouterr().err


def test_weight_two_takes_every_record_twice_with_marked_copies(files):
    records = mix(files, "--annotations", files / "b.json", "--weights", 2)
    assert [(record["id"], record.get("repeat")) for record in records] == [
        ("1", None),
        ("1#2", 2),
        ("b", None),
        ("b#2", 2),
        ("t", None),
        ("t#2", 2),
    ]


def test_weight_zero_leaves_a_file_out_and_says_so(files, capsys):
    records = mix(files, "--annotations", files / "a.json", files / "b.json", "--weights", 0, 1)
    assert [record["id"] for record in records] == ["b_1", "b", "t"]
    assert "records of a.json (weight 0 of 3, left out)" in capsys.readouterr().out


def test_broken_weights_draw_whole_images(tmp_path):
    records = [make_record(f"{image}{caption}", f"{image}.png") for image in range(50) for caption in "ab"]
    write(tmp_path / "a.json", records)
    flags = ("--annotations", tmp_path / "a.json", "--weights")
    drawn = mix(tmp_path, *flags, 0.3)
    assert len(drawn) == 30
    assert all(sum(other["image"] == record["image"] for other in drawn) == 2 for record in drawn)
    assert mix(tmp_path, *flags, 0.3) == drawn
    assert mix(tmp_path, *flags, 0.3, "--seed", 1) != drawn
    more = mix(tmp_path, *flags, 1.3)
    assert len(more) == 130 and sum(record.get("repeat") == 2 for record in more) == 30


def test_two_files_of_one_name_draw_and_label_apart(tmp_path):
    for folder in ("p", "q"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "train.json", [make_record("1", f"{folder}.png")])
    records = mix(tmp_path, "--annotations", tmp_path / "p/train.json", tmp_path / "q/train.json")
    assert [record["id"] for record in records] == ["train_1", "train_2_1"]


def test_records_without_id_get_one(tmp_path):
    record = make_record("x", "a.png")
    del record["id"]
    write(tmp_path / "a.json", [record])
    assert [item["id"] for item in mix(tmp_path, "--annotations", tmp_path / "a.json", "--weights", 2)] == [
        "a_0",
        "a_0#2",
    ]


def test_mix_stops_at_records_that_are_none(files, capsys):
    write(files / "c.json", [make_record("1", "x.png"), {"id": "2", "image": "y.png"}])
    with pytest.raises(SystemExit):
        mix(files, "--annotations", files / "c.json")
    assert "c.json row 1: has no list 'conversations'" in capsys.readouterr().err
    assert len(mix(files, "--annotations", files / "c.json", "--bad_records", "quarantine")) == 1


def test_drawing_never_overshoots_and_comes_near():
    for seed in range(50):
        generator = random.Random(seed)
        sizes = [generator.randint(1, 6) for _ in range(generator.randint(1, 20))]
        target = generator.randint(0, sum(sizes))
        fitting = draw_groups(sizes, target, random.Random(seed))
        count = sum(sizes[index] for index in fitting)
        assert count <= target and len(set(fitting)) == len(fitting)
        others = [size for index, size in enumerate(sizes) if index not in fitting]
        assert all(count + size > target for size in others)
        nearest = sum(sizes[index] for index in draw_groups(sizes, target, random.Random(seed), nearest=True))
        assert abs(nearest - target) <= target - count


# ---- splitting ----


def draw(path, seed, **save):
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    small.resize((96, 96), Image.Resampling.BICUBIC).save(path, **save)


@pytest.fixture
def images(tmp_path):
    """Twenty images: 1 is 0 recompressed, 3 has the bytes of 2, record 4 has the images 4 and 5."""
    for number in range(20):
        draw(tmp_path / f"root/{number}.png", number)
    (tmp_path / "root/1.png").unlink()
    draw(tmp_path / "root/1.jpg", 0, quality=70)
    shutil.copy(tmp_path / "root/2.png", tmp_path / "root/3.png")
    records = [
        make_record(f"{number}{caption}", f"{number}.png" if number != 1 else "1.jpg")
        for number in range(20)
        for caption in "ab"
    ]
    records.append(make_record("both", ["4.png", "5.png"]))
    records += [make_record(f"text{number}") for number in range(5)]
    write(tmp_path / "all.json", records)
    return tmp_path


def split(folder, *flags):
    prepare.main(
        [
            *("split", "--annotations", str(folder / "all.json"), "--image_folder", str(folder / "root")),
            *("--output", str(folder / "train.json"), "--validation_output", str(folder / "val.json")),
            *("--overwrite", *map(str, flags)),
        ]
    )
    return read(folder / "train.json"), read(folder / "val.json")


def list_images(records):
    images = [record.get("image", []) for record in records]
    return {image for entry in images for image in ([entry] if isinstance(entry, str) else entry)}


@pytest.mark.parametrize("seed", range(8))
def test_images_and_their_near_duplicates_stay_on_one_side(images, seed):
    training, validation = split(images, "--validation", 0.3, "--seed", seed)
    everything = read(images / "all.json")
    assert sorted(record["id"] for record in training + validation) == sorted(record["id"] for record in everything)
    assert 0 < len(validation) <= 0.3 * len(everything)
    assert [record for record in everything if record in validation] == validation, "the order stays"
    held_out = list_images(validation)
    assert not held_out & list_images(training)
    for group in ({"0.png", "1.jpg"}, {"2.png", "3.png"}, {"4.png", "5.png"}):
        assert group <= held_out or not group & held_out
    for one in held_out:
        for other in list_images(training):
            first, second = hash_images([images / "root" / name for name in (one, other)])
            assert first.sha256 != second.sha256 and (first.perceptual ^ second.perceptual).bit_count() > 6


def test_split_reports_groups_and_that_nothing_leaks(images, capsys):
    split(images, "--validation", 0.3)
    assert "Groups that stay together: 22, the largest of 5 records; " in capsys.readouterr().out
    for name, other in (("train", "validation_output"), ("val", "training_output")):
        manifest = read(images / f"{name}.manifest.json")
        assert manifest["division"] == {"validation": 0.3, "near_distance": 6, "seed": 0}
        assert manifest["groups"] == {"count": 22, "largest": 5, "near_duplicate_pairs": 2}
        assert manifest["between_the_sides"]["shared_images"] == 0
        assert manifest["between_the_sides"]["nearest_distance"] > 6
        assert other in manifest


def test_split_counts_copies_that_mixing_made(images, capsys):
    records = read(images / "all.json")
    copies = [{**record, "id": f"{record['id']}#2", "repeat": 2} for record in records[:3]]
    (images / "all.json").write_text(json.dumps([*records, *copies]))
    split(images, "--validation", 0.3)
    notes = read(images / "train.manifest.json")["counts"]["noted"]
    assert notes == {"copies made by mixing, which count in validation too (split before you mix)": 3}


def test_split_is_the_same_for_a_seed_and_another_for_another(images):
    first = split(images, "--validation", 0.3)
    assert split(images, "--validation", 0.3) == first
    assert split(images, "--validation", 0.3, "--seed", 5) != first


def test_unreadable_images_are_problems(images, capsys):
    (images / "root/7.png").write_bytes(b"no image")
    (images / "root/8.png").unlink()
    with pytest.raises(SystemExit):
        split(images)
    message = capsys.readouterr().err
    assert "4 problems" in message and "all.json row 14: " in message and "all.json row 16: " in message
    assert "\n  4 problems: image that cannot be used, e.g.\n" in message
    assert not (images / "train.json").exists() and not (images / "val.json").exists()
    training, validation = split(images, "--bad_records", "quarantine")
    assert len(training) + len(validation) == 42
    assert read(images / "train.manifest.json")["counts"]["left_out"] == {"image that cannot be used": 4}


@pytest.mark.parametrize("flags", [(), ("--bad_records", "quarantine")])
def test_where_every_record_is_bad_the_problems_are_listed(images, capsys, flags):
    write(images / "all.json", [make_record("1", "none.png"), make_record("2", "gone.png")])
    with pytest.raises(SystemExit):
        split(images, *flags)
    message = capsys.readouterr().err
    assert "all.json row 0: " in message and "all.json row 1: " in message and "--validation 0" not in message


def test_a_share_that_no_group_fits_is_an_error(images, capsys):
    with pytest.raises(SystemExit):
        split(images, "--validation", 0.01)
    assert "at most 0 may go there" in capsys.readouterr().err


def test_a_distance_that_joins_everything_is_an_error(images, capsys):
    write(images / "all.json", [make_record("1", "0.png"), make_record("2", "1.jpg")])
    with pytest.raises(SystemExit):
        split(images, "--validation", 0.5)
    assert "1 groups of at least 2" in capsys.readouterr().err


def test_an_existing_validation_file_is_not_replaced_unasked(images, capsys):
    (images / "val.json").write_text("[]")
    with pytest.raises(SystemExit):
        prepare.main(
            [
                *("split", "--annotations", str(images / "all.json"), "--image_folder", str(images / "root")),
                *("--output", str(images / "train.json"), "--validation_output", str(images / "val.json")),
            ]
        )
    assert "val.json: is there already" in capsys.readouterr().err


def test_real_memes_split_without_leak(tmp_path, capsys):
    memes = SHARED_DATA / "memes_dev"
    if not memes.is_dir():
        pytest.skip(f"{memes} is not there")
    prepare.main(
        [
            *("split", "--annotations", str(memes / "val.json"), "--image_folder", str(memes)),
            *("--output", str(tmp_path / "train.json"), "--validation_output", str(tmp_path / "val.json")),
            *("--validation", "0.2"),
        ]
    )
    training, validation = read(tmp_path / "train.json"), read(tmp_path / "val.json")
    assert len(training) + len(validation) == 348 and len(validation) in (68, 69)
    assert not list_images(training) & list_images(validation)
