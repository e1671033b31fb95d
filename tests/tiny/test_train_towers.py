"""The course of the towers: lessons say what they should, projectors are renewed, a run ends in towers that build."""

import json
import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "data" / "tiny" / "making"))

import meme_fonts  # noqa: E402
import prepare_towers  # noqa: E402
import studio as studio_module  # noqa: E402
import train_towers  # noqa: E402
import write_towers  # noqa: E402
from course import Course  # noqa: E402
from draw_lessons import list_lesson_alphabet  # noqa: E402
from exam import distance  # noqa: E402
from glyphs import LEVELS, Atlas, read_characters  # noqa: E402
from layout import PATCHES, SIDE, Dice  # noqa: E402
from lessons import TASKS, Teacher, compact, place_facts  # noqa: E402
from networks import PatchReader, ProjectorPool, Sizes, VisionTower, make_lookup  # noqa: E402
from optimizer import orthogonalize  # noqa: E402
from scenery import FIGURE_NAMES, MOOD_NAMES, PROP_NAMES  # noqa: E402
from studio import Batch, MemeDrawer, Studio  # noqa: E402
from texts import Alphabet, RowWriter, read_words  # noqa: E402
from transformers import AutoTokenizer, ChineseCLIPVisionConfig, ChineseCLIPVisionModel, LlavaConfig  # noqa: E402

import build_base_model  # noqa: E402
from meme_llava.convert.build import _draw_projector  # noqa: E402
from meme_llava.model.llava import load_llava  # noqa: E402

SMALL = {"vision_width": 32, "vision_layers": 2, "vision_heads": 2, "vision_mlp": 32}
SMALL |= {"width": 96, "layers": 1, "heads": 2, "mlp": 32}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    prepare_towers.main(["--output_dir", str(folder), "--characters", "300"])
    return folder


@pytest.fixture(scope="module")
def teacher(start):
    return Teacher(start / "tables.json", "cpu")


@pytest.fixture(scope="module")
def tokenizer(start):
    return AutoTokenizer.from_pretrained(start)


def spell(start, text):
    known = (start / "characters.txt").read_text(encoding="utf-8").strip()
    return torch.tensor([[known.index(character) + 1 for character in text] + [0]])


def name_facts(mood, figure, prop):
    return torch.tensor([[MOOD_NAMES.index(mood), FIGURE_NAMES.index(figure), PROP_NAMES.index(prop)]])


def give_lesson(teacher, tokenizer, task, text, facts):
    """Question and answer in words; the answer ends with its end token."""
    lesson = teacher.make_lesson(Dice(0, "cpu"), torch.tensor([TASKS.index(task)]), text, facts)
    answer = tokenizer.decode(lesson.ids[lesson.supervised])
    assert answer.endswith("<|im_end|>")
    question = tokenizer.decode(lesson.ids[~lesson.supervised])
    assert question.startswith("\n") and question.endswith("<|im_end|>\n<|im_start|>assistant\n")
    return question.removeprefix("\n").split("<")[0], answer.removesuffix("<|im_end|>")


def test_every_character_of_the_sample_data_is_one_token(tokenizer):
    assert [character for character in list_lesson_alphabet() if len(tokenizer(character)["input_ids"]) != 1] == []
    # In a row, too: the hundred characters of a field take the hundred positions of the image tokens.
    field = "我OK6no哈哈哈太" * 10
    assert len(tokenizer(field)["input_ids"]) == 100


def test_a_text_is_answered_letter_by_letter(teacher, tokenizer, start):
    facts = torch.tensor([[-1, -1, -1]])
    _, answer = give_lesson(teacher, tokenizer, "text", spell(start, "我要奶茶OK！"), facts)
    assert answer == "我要奶茶OK！"
    _, answer = give_lesson(teacher, tokenizer, "text", torch.zeros(1, 3, dtype=torch.long), facts)
    assert answer == "图片里没有文字。"


def test_moods_and_descriptions_are_those_of_the_sample_memes(teacher, tokenizer, start):
    facts = name_facts("犯困", "熊猫", "戴着帽子")
    _, answer = give_lesson(teacher, tokenizer, "mood", spell(start, "早上好"), facts)
    assert answer == "犯困"
    question, answer = give_lesson(teacher, tokenizer, "description", spell(start, "早上好"), facts)
    expected = {
        "这张表情包写了什么，是什么意思？": "图中一只熊猫，戴着帽子，看起来很犯困，配文“早上好”，表达犯困的心情。",
        "请描述一下这张表情包。": "这是一张熊猫的表情包，戴着帽子，写着“早上好”，熊猫的表情是犯困。",
        "图里有什么文字？画的是谁？": "文字是“早上好”，画的是一只熊猫，戴着帽子，它很犯困。",
        "这张图想表达什么？": "熊猫很犯困，戴着帽子，它说“早上好”，适合在犯困的时候用。",
        "介绍一下这张图片。": "画面里有一只熊猫，戴着帽子，文字“早上好”和它的表情都透着犯困。",
    }
    assert answer == expected[question]


def test_a_field_names_what_stands_at_every_patch(teacher, tokenizer, start):
    slots = torch.zeros(1, PATCHES**2, 3, dtype=torch.long)
    slots[0, 3, 0], slots[0, 3, 1] = spell(start, "早上")[0, :2]
    facts = torch.full((1, PATCHES**2, 3), -1)
    facts[0, 99] = name_facts("开心", "小猫", None)[0]
    lesson = teacher.make_field_lesson(Dice(0, "cpu"), slots, facts)
    assert tokenizer.decode(lesson.ids[lesson.supervised]) == "□□□早" + "□" * 95 + "①<|im_end|>"


def test_the_end_of_a_text_that_is_cut_is_not_learned(teacher, start):
    text = spell(start, "我" * 70)
    lesson = teacher.make_lesson(Dice(0, "cpu"), torch.tensor([0]), text, torch.tensor([[-1, -1, -1]]))
    assert int(lesson.supervised.sum()) == 60


def test_pieces_are_joined_without_their_gaps():
    ids, sources = compact([torch.tensor([[5, -1], [6, 7]]), torch.tensor([[-1, 8], [-1, -1]])])
    assert ids.tolist() == [[5, 8], [6, 7]]
    assert sources.tolist() == [[0, 1], [0, 0]]


def test_facts_stand_at_the_patch_of_the_figures_middle():
    placed = place_facts(torch.tensor([[[1, 2, 3]]]), torch.tensor([[[24.0, 159.0]]]), SIDE)
    assert placed[0, 91].tolist() == [1, 2, 3]
    assert int((placed >= 0).sum()) == 3


def test_projectors_are_drawn_as_the_assembly_draws_them_and_renewed_when_old():
    pool = ProjectorPool(Sizes(**SMALL), 2, life=3, peak=1e-3, seed=1000)
    config = LlavaConfig(
        vision_config={"hidden_size": 32, "num_attention_heads": 2},
        text_config={"model_type": "qwen2", "hidden_size": 96},
    )
    config.text_config.initializer_range = 0.035
    drawn = _draw_projector(config, 1001)
    assert torch.equal(pool.weights[0][1], drawn["linear_1.weight"])
    assert torch.equal(pool.weights[2][1], drawn["linear_2.weight"])
    first = pool.weights[0].detach().clone()
    for _ in range(3):
        pool(torch.randn(4, PATCHES**2, 32)).square().mean().backward()
        pool.step()
    assert pool.ages == [0, 3]  # the second one lives longer the first time
    assert torch.equal(pool.weights[0][0], _draw_projector(config, 1002)["linear_1.weight"])
    assert 1e-4 < float((pool.weights[0].detach()[1] - first[1]).abs().max()) < 3e-3


def test_orthogonal_updates_change_all_directions_alike():
    matrices = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 1e3]).view(
        3, 1, 1
    )
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert 0.6 < float(values.min()) and float(values.max()) < 1.3


def test_a_tower_begins_with_where_its_patches_are():
    embeddings = VisionTower(Sizes(**SMALL)).model.embeddings
    positions = embeddings.position_embedding.weight  # (1 + 100, 32)
    # Patch (row 2, column 3), highest frequency: sin 2, cos 2, sin 3, cos 3.
    assert positions[1 + 23, [0, 8, 16, 24]].tolist() == pytest.approx([0.9093, -0.4161, 0.1411, -0.99], abs=1e-4)
    assert embeddings.patch_embedding.weight.std().item() == pytest.approx(0.02)


@torch.no_grad()
def test_the_last_layer_is_silent_until_it_looks_letters_up():
    sizes = Sizes(**{**SMALL, "vision_width": 96, "vision_mlp": 32})
    torch.manual_seed(0)
    layer = VisionTower(sizes).model.encoder.layers[-1]
    reader = PatchReader(sizes, 40)
    features = torch.randn(1, 100, 96)
    assert torch.equal(layer(features, None), features)
    reader.code.weight *= 8  # as far apart as scores are in training
    make_lookup(layer, reader, float(features.std()))
    codes = torch.nn.functional.normalize(reader.codes, dim=-1)
    scores = reader.code(reader.norm(features))[..., :80] @ codes.T  # (1, 100, 41)
    best = scores[..., 1:33].argmax(-1) + 1  # of those that have a neuron
    shown = layer(features, None)
    before, after = (
        torch.cosine_similarity(reader.code(reader.norm(states))[..., :80], codes[best], dim=-1)
        for states in (features, shown)
    )
    is_found = scores.gather(-1, best[..., None])[..., 0] > 12
    assert 3 < int(is_found.sum()) < 97
    assert float((after - before)[is_found].min()) > 0.1
    is_unlike = scores[..., 1:33].amax(-1) < 4
    assert torch.allclose(shown[is_unlike], features[is_unlike], atol=0.1)


def test_a_scale_makes_the_features_smaller_and_nothing_else():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    tower = ChineseCLIPVisionModel(ChineseCLIPVisionConfig(image_size=32, patch_size=16, **sizes)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # As they are drawn, biases are zero and layers hardly change what they read.
        for parameter in tower.parameters():
            parameter.normal_(std=0.5, generator=generator)
        pixels = torch.rand(1, 3, 32, 32, generator=generator)
        whole = tower(pixels, output_hidden_states=True)
        write_towers.scale_features(tower, 0.25)
        scaled = tower(pixels, output_hidden_states=True)
    for hidden, hidden_scaled in zip(whole.hidden_states, scaled.hidden_states, strict=True):
        assert torch.allclose(hidden_scaled, hidden * 0.25, atol=1e-3)
    assert torch.allclose(scaled.pooler_output, whole.pooler_output, atol=1e-3)


@pytest.mark.parametrize(("first", "second", "wanted"), [([], [], 0), ([1, 2], [], 2), ([1, 2, 3], [2, 4], 2)])
def test_distance_counts_changes(first, second, wanted):
    assert distance(first, second) == wanted


def test_a_page_is_learned_from_several_times_in_other_colours():
    dice = Dice(0, "cpu")
    studio = SimpleNamespace(dice=dice, recolour=lambda batch: Studio.recolour(SimpleNamespace(dice=dice), batch))
    course = SimpleNamespace(settings=SimpleNamespace(uses=3), studio=studio, kept=[[], []], drawn=[0, 0])
    drawn = []

    def draw():
        images, slots = torch.rand(8, 3, 4, 4, generator=dice.generator), torch.full((8, 1, 3), len(drawn))
        nothing = torch.zeros(8, 1, 3)
        drawn.append(Batch(images, slots, slots[..., None], slots[:, 0], nothing, nothing, nothing))
        return [drawn[-1]]

    batches = [Course.draw_or_reuse(course, draw) for _ in range(7)]
    assert len(drawn) == 3
    repeated = [batches[number] for number in (1, 3, 4, 6)]
    for batch in repeated:
        source = drawn[int(batch.slots[0, 0, 0])].images
        for page, pixels in zip(batch.images, source, strict=True):
            either = {tuple(channel.flatten().tolist()) for channel in torch.cat([pixels, 1 - pixels])}
            assert {tuple(channel.flatten().tolist()) for channel in page} <= either
    assert sum(torch.equal(batch.images, first.images) for batch in repeated for first in drawn) == 0


def test_an_eye_that_errs_sees_other_letters_where_there_are_letters():
    course = SimpleNamespace(studio=SimpleNamespace(dice=Dice(0, "cpu")), teacher=SimpleNamespace(tokens=range(1001)))
    slots = torch.zeros(200, 100, 3, dtype=torch.long)
    slots[:, :50, 0] = 7
    seen = Course.confuse(course, slots)
    assert torch.equal(seen > 0, slots > 0) and int(seen.max()) <= 1000
    errors = (seen != slots)[:, :50, 0].float().mean(1)
    assert float(errors.min()) < 0.05 and 0.35 < float(errors.max()) < 0.75 and 0.2 < float(errors.mean()) < 0.3


def test_memes_that_are_drawn_are_kept(start, tmp_path, monkeypatch):
    if meme_fonts.list_missing((meme_fonts.FONT_FOLDER / meme_fonts.KNOWN_FONTS[0][0], 2), ["我"]):
        pytest.skip("no font with Chinese characters: apt install fonts-noto-cjk")
    monkeypatch.setattr(studio_module, "DRAWN_PARTS", 2)
    alphabet = Alphabet(read_characters(start / "characters.txt"))
    settings = SimpleNamespace(fonts=None, output_dir=tmp_path, memes=4, seed=0, processes=1)
    writer = RowWriter(alphabet, read_words(None, alphabet), 0)
    first = MemeDrawer(writer, settings).collect("cpu")
    assert first.pixels.shape == (4, 3, SIDE, SIDE) and first.facts.shape == (4, 3)
    again = MemeDrawer(writer, settings)
    assert again.parts == []
    assert torch.equal(again.collect("cpu").pixels, first.pixels)


def make_blocks(faces, characters, processes):
    """An atlas without fonts: every letter is a full cell."""
    sizes = [side * side for side in LEVELS]
    pixels = torch.cat([torch.cat([torch.zeros(size), torch.full((size,), 255.0)]) for size in sizes]).byte()
    starts = torch.tensor([2 * sum(sizes[:level]) for level in range(len(sizes))])
    cells = torch.ones(1, len(characters) + 1, dtype=torch.long)
    cells[0, 0] = 0
    return Atlas(pixels, starts, cells, torch.ones(1, len(characters) + 1))


def test_an_interrupted_course_goes_on_and_ends_in_towers_that_build(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(studio_module, "make_atlas", make_blocks)
    monkeypatch.setattr(studio_module, "find_faces", lambda folder: [])
    flags = ["--start", str(start), "--output_dir", str(tmp_path / "work"), "--memes", "0", "--device", "cpu"]
    flags += ["--rows", "400", "--images", "1", "--uses", "2"]
    flags += ["--batch", "6", "--language_batch", "2", "--joint_batch", "4"]
    flags += ["--read_steps", "3", "--joint_steps", "2"]
    flags += ["--vision_steps", "3", "--lookup_steps", "1", "--language_steps", "2", "--projectors", "2", "--life", "4"]
    flags += ["--note_every", "1", "--exam_pages", "2", "--processes", "1", "--sizes", json.dumps(SMALL)]
    take_step = Course.vision_step

    def stop_in_the_midst(course, progress):
        os.kill(os.getpid(), signal.SIGTERM)
        take_step(course, progress)

    with monkeypatch.context() as context:
        context.setattr(Course, "vision_step", stop_in_the_midst)
        train_towers.main(flags)
    assert "goes on from here" in capsys.readouterr().out
    state = torch.load(tmp_path / "work" / "checkpoint.pt", weights_only=True)
    assert (state["stage"], state["count"]) == ("vision", 1)
    begin, begun = Course.begin, {}

    def note_vision(course, stage):
        begun[stage] = {name: weight.clone() for name, weight in course.modules["vision"].state_dict().items()}
        begin(course, stage)

    monkeypatch.setattr(Course, "begin", note_vision)
    train_towers.main(flags)
    shown = capsys.readouterr().out
    assert "vision 3 (100%" in shown and "vision 1 (" not in shown
    assert "lookup 1 (100%" in shown and "read 3 (100%" in shown and "joint 2 (100%" in shown
    # Who learns to read behind the vision tower leaves it alone.
    assert all(torch.equal(weight, begun["joint"][name]) for name, weight in begun["read"].items())
    export, towers = tmp_path / "work" / "export", tmp_path / "towers"
    write_towers.main(["--start", str(start), "--export", str(export), "--output_dir", str(towers)])
    base = ["--language_model", str(towers / "language_model"), "--vision_model", str(towers / "vision_tower")]
    build_base_model.main([*base, "--output_dir", str(tmp_path / "base")])
    model = load_llava(tmp_path / "base", torch.float32)
    image = torch.rand(1, 3, SIDE, SIDE)
    course = torch.load(tmp_path / "work" / "checkpoint.pt", weights_only=True)
    assert any(not torch.equal(course["modules"][f"vision.{name}"], begun["joint"][name]) for name in begun["joint"])
    tower = VisionTower(Sizes(**{**SMALL}))
    tower.load_state_dict(
        {name[7:]: weight for name, weight in course["modules"].items() if name.startswith("vision.")}
    )
    with torch.no_grad():
        wanted = tower(image) * course["scale"]
        found = model.model.vision_tower((image - tower.mean) / tower.deviation, output_hidden_states=True)
    assert torch.allclose(found.hidden_states[-2][:, 1:], wanted, atol=0.02)
    embeddings = course["modules"]["language.codes"] @ course["modules"]["language.mix"]
    assert torch.allclose(model.lm_head.weight[: len(embeddings)], embeddings, atol=1e-3)
