"""Studio: batches of pages, groups of figures and drawn memes with everything that is known about them."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from types import SimpleNamespace

import torch
from composer import compose, paint_ground, paint_image
from drawn import DrawnMemes, draw_part
from glyphs import Atlas, find_faces, make_atlas
from layout import PATCHES, SHARES, SIDE, SLOTS, Dice, label_pages, make_label_table, plan_layout
from lessons import place_facts
from meme_fonts import FontFace, list_missing, measure_weight
from scenery import Scenery, make_scenery
from texts import Alphabet, RowWriter, TextBank, make_text_bank
from wear import wear_out

DRAWN_PARTS = 64  # drawn memes come in so many portions, each when it is done


@dataclass
class Batch:
    """Pages and what they show.

    Args:
        images: (B, 3, SIDE, SIDE) or None where only the labels were wanted.
        slots: (B, patches, SLOTS); places: (B, patches, SLOTS, 2); text: (B, T); see layout.Labels.
        facts: (B, 3) of the page's figure; placed: (B, patches, 3) of all its figures, where they stand.
        is_whole: (B,) bool, whether the slots hold all of the text.
    """

    images: torch.Tensor | None
    slots: torch.Tensor
    places: torch.Tensor
    text: torch.Tensor
    facts: torch.Tensor
    placed: torch.Tensor
    is_whole: torch.Tensor


class Studio:
    """Draws what lessons are about, from prepared material; the same seed gives the same pages on the same device."""

    def __init__(self, alphabet: Alphabet, atlas: Atlas, bank: TextBank, scenery: Scenery, seed: int, device: str):
        self.atlas, self.bank, self.scenery = atlas, bank, scenery
        self.dice, self.table = Dice(seed, device), make_label_table(alphabet, device)

    @torch.no_grad()
    def draw_pages(
        self, count: int, shares: tuple[float, ...] = SHARES, plain: float = 0, aligned: tuple[float, float] = (0, 0)
    ) -> Batch:
        """Pages; see plan_layout and compose."""
        layout = plan_layout(self.dice, self.bank, self.atlas, count, shares, aligned)
        labels = label_pages(layout, self.table)
        images, facts, middles = compose(self.dice, layout, self.atlas, self.scenery, plain)
        placed = place_facts(facts[:, None], middles[:, None], SIDE)
        return Batch(images, labels.slots, labels.places, labels.text, facts, placed, is_whole(labels))

    @torch.no_grad()
    def recolour(self, batch: Batch) -> Batch:
        """The same pages in other colours: red, green and blue change places, and some are turned to their negative."""
        images = batch.images[:, torch.randperm(3, generator=self.dice.generator, device=self.dice.device)]
        negative = self.dice.happens(0.3, len(images), 1, 1, 1)
        return replace(batch, images=torch.where(negative, 1 - images, images))

    @torch.no_grad()
    def spell_pages(self, count: int, shares: tuple[float, ...] = SHARES) -> Batch:
        """Labels without images, some with a figure somewhere."""
        labels = label_pages(plan_layout(self.dice, self.bank, self.atlas, count, shares), self.table)
        number = self.dice.below(self.scenery.starts[1], count)
        facts = torch.where(self.dice.happens(0.35, count, 1), self.scenery.facts[number], -1)
        middles = self.dice.uniform(20, SIDE - 20, count, 1, 2)
        placed = place_facts(facts[:, None], middles, SIDE)
        return Batch(None, labels.slots, labels.places, labels.text, facts, placed, is_whole(labels))

    @torch.no_grad()
    def spell_copies(self, count: int) -> Batch:
        """Labels of one row each, a letter a patch from one patch to the next, and nothing else."""
        device, patches = self.dice.device, PATCHES**2
        answers = self.table[self.bank.rows[self.dice.below(self.bank.first_long, count)].long()]  # (B, ROW)
        has = answers > 0
        place = has.cumsum(1) - 1
        start = (self.dice.uniform(0, 1, count) * (patches - has.sum(1))).long()[:, None]
        slots = torch.zeros(count, patches + 1, SLOTS, dtype=torch.long, device=device)
        slots[..., 0].scatter_(1, torch.where(has, start + place, patches), answers)
        text = torch.zeros(count, answers.shape[1] + 1, dtype=torch.long, device=device)
        text.scatter_(1, torch.where(has, place, answers.shape[1]), answers)
        nothing = torch.full((count, patches, 3), -1, device=device)
        places = torch.zeros(count, patches, SLOTS, 2, device=device)
        whole = torch.ones(count, dtype=torch.bool, device=device)
        return Batch(None, slots[:, :-1], places, text[:, :-1], nothing[:, 0], nothing, whole)

    @torch.no_grad()
    def draw_groups(self, count: int) -> Batch:
        """Pages with 1, 4 or 9 figures and no text."""
        dice, device = self.dice, self.dice.device
        across = dice.below(3, count) + 1
        ground = 1 - 0.3 * dice.uniform(0, 1, count, 3) ** 2
        page = paint_ground(SimpleNamespace(ground=ground, shade=ground)).contiguous()
        all_facts, all_middles = [], []
        for cell in range(9):
            image = dice.below(self.scenery.starts[1], count)
            image = torch.where(cell < across**2, image, -1)
            left, top = (cell % across) * SIDE / across, (cell // across) * SIDE / across
            box = torch.stack([left, top, left + SIDE / across, top + SIDE / across], dim=1)
            full = torch.zeros(count, dtype=torch.bool, device=device)
            style = SimpleNamespace(image=image, full=full, box=box, flip=dice.happens(0.5, count))
            page, _ = paint_image(dice, page, style, self.scenery)
            all_facts.append(torch.where((image >= 0)[:, None], self.scenery.facts[image.clamp(min=0)], -1))
            all_middles.append((box[:, :2] + box[:, 2:]) / 2)
        facts, middles = torch.stack(all_facts, dim=1), torch.stack(all_middles, dim=1).clamp(0, SIDE - 1)
        # Those that are not there would overwrite others: a patch of their own is only read where the fact is -1.
        placed = torch.stack([place_facts(facts[:, [n]], middles[:, [n]], SIDE) for n in range(9)]).amax(0)
        nothing = torch.zeros(count, PATCHES**2, SLOTS, dtype=torch.long, device=device)
        text, whole = nothing[:, :, 0], torch.ones(count, dtype=torch.bool, device=device)
        return Batch(
            wear_out(dice, page),
            nothing,
            nothing[..., None].expand(-1, -1, -1, 2).float(),
            text,
            facts[:, 0],
            placed,
            whole,
        )

    def pick_memes(self, memes: DrawnMemes, count: int) -> Batch:
        """Some of the drawn memes; where their letters stand is not known."""
        chosen = self.dice.below(len(memes.texts), count)
        images = memes.pixels[chosen].float() / 255
        images = torch.where(self.dice.happens(0.3, count, 1, 1, 1), wear_out(self.dice, images), images)
        slots = torch.zeros(count, PATCHES**2, SLOTS, dtype=torch.long, device=self.dice.device)
        placed = torch.full((count, PATCHES**2, 3), -1, device=self.dice.device)
        whole = torch.ones(count, dtype=torch.bool, device=self.dice.device)
        return Batch(images, slots, slots[..., None].float(), memes.texts[chosen], memes.facts[chosen], placed, whole)


def is_whole(labels) -> torch.Tensor:
    """(B,) whether no letter is missing in the slots."""
    return (labels.slots > 0).flatten(1).sum(1) == labels.text_lengths


def to_device(record, device: str):
    """A dataclass with its tensors on that device."""
    moved = {name: value.to(device) if torch.is_tensor(value) else value for name, value in vars(record).items()}
    return type(record)(**moved)


@dataclass
class Material:
    """What a studio needs, and two text banks: one to learn from, one to be examined with."""

    atlas: Atlas
    bank: TextBank
    exam_bank: TextBank
    scenery: Scenery


def load_material(settings, writer: RowWriter) -> Material:
    """The material kept in the output folder, or made and kept there; `settings` are train_towers.py's."""
    path = settings.output_dir / "material.pt"
    if path.is_file():
        kept = torch.load(path, weights_only=True)
        return Material(**{part.name: part.type(**kept[part.name]) for part in fields(Material)})
    seed, processes = settings.seed, settings.processes
    material = Material(
        atlas=make_atlas(find_faces(settings.fonts), writer.alphabet.drawn, processes),
        bank=make_text_bank(writer, settings.rows, seed, processes),
        exam_bank=make_text_bank(writer, max(settings.rows // 50, 400), seed + 1, processes),
        scenery=make_scenery(settings.photos, (settings.images,) * 3, seed, processes),
    )
    torch.save({name: vars(part) for name, part in vars(material).items()}, path)
    return material


class MemeDrawer:
    """Draws memes in other processes while training goes on; each portion is kept in a file, and not drawn again."""

    def __init__(self, writer: RowWriter, settings):
        faces: list[FontFace] = [face for face in find_faces(settings.fonts) if not list_missing(face, writer.usual)]
        faces.sort(key=measure_weight, reverse=True)
        folder = settings.output_dir / "memes"
        folder.mkdir(exist_ok=True)
        draw = partial(draw_part, writer, faces, -(-settings.memes // DRAWN_PARTS))
        numbers = [settings.seed * DRAWN_PARTS + part for part in range(DRAWN_PARTS)]
        self.paths = [folder / f"{number}.pt" for number in numbers]
        self.pool = ProcessPoolExecutor(settings.processes)
        self.parts = [
            self.pool.submit(draw, number, path)
            for number, path in zip(numbers, self.paths, strict=True)
            if not path.is_file()
        ]

    def collect(self, device: str) -> DrawnMemes:
        """All memes, when the last of them is drawn."""
        for part in self.parts:
            part.result()
        self.pool.shutdown()
        images, texts, facts = (
            torch.cat(tensors) for tensors in zip(*(torch.load(p, weights_only=True) for p in self.paths), strict=True)
        )
        return DrawnMemes(images.to(device).permute(0, 3, 1, 2).contiguous(), texts.to(device), facts.to(device))
