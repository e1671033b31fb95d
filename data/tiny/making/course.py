"""Course: everything that learns, and the steps of its stages."""

import argparse
import json
import math
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from drawn import DrawnMemes
from layout import SHARES
from lessons import Lesson, Teacher
from networks import LanguageModel, PatchReader, ProjectorPool, Sizes, SpelledPatches, VisionTower, make_lookup
from optimizer import Optimizer
from safetensors.torch import save_file
from studio import Batch, Studio
from torch import nn

CAPTIONS = (0.1, 0.9, 0.0, 0.0, 0.0)  # shares of layout.KINDS
CROWDED = (0.05, 0.25, 0.15, 0.05, 0.5)
# What is answered about: from pages full of letters come most of the tokens, and little that a meme needs.
ANSWERED = (0.1, 0.6, 0.2, 0.1, 0.0)
DIFFICULTIES = 3
READY = 0.6  # of the letters named: then the next pages are more difficult, and so they are in time in any case
FIELD_EVERY = 8  # one step in so many asks for fields
KEPT = 48  # batches that may be used again
DRAWN_SHARE, GROUP_SHARE = 0.25, 0.08


class Course:
    """Everything that learns, with the steps of every stage."""

    def __init__(self, settings: argparse.Namespace, sizes: Sizes, studio: Studio, teacher: Teacher):
        self.settings, self.sizes, self.studio, self.teacher = settings, sizes, studio, teacher
        self.device = settings.device
        torch.manual_seed(settings.seed)
        self.modules = nn.ModuleDict(
            {
                "vision": VisionTower(sizes),
                "reader": PatchReader(sizes, len(teacher.tokens) - 1),
                "language": LanguageModel(sizes),
                "spelled": SpelledPatches(sizes),
            }
        ).to(self.device)
        if self.device == "cpu":
            # The fused attention takes three times as long to go back through, at these lengths.
            for name in ("vision", "language"):
                self.modules[name].model.set_attn_implementation("eager")
        self.pool = ProjectorPool(
            sizes, settings.projectors, settings.life, settings.projector_rate, 1000 + settings.seed
        )
        self.pool.to(self.device)
        self.pool.moments = [[tensor.to(self.device) for tensor in moment] for moment in self.pool.moments]
        self.scale = 1.0  # of features, so that they are about 1 for the projectors
        self.memes: DrawnMemes | None = None
        # Of both kinds of steps, for answers and for fields.
        self.kept, self.drawn = [deque(maxlen=KEPT), deque(maxlen=KEPT // 8)], [0, 0]
        self.difficulty = 0.0  # of the vision tower's pages, up to DIFFICULTIES
        self.figures: dict[str, list[float]] = {}

    def autocast(self):
        return torch.autocast(self.device, torch.bfloat16, enabled=self.settings.bf16)

    def note(self, **figures: torch.Tensor) -> None:
        for name, value in figures.items():
            self.figures.setdefault(name, []).append(value.detach())

    # ---- Stages: one step each, to the gradients ----

    def vision_step(self, progress: float) -> None:
        # What is easy comes first: plain letters that fill a patch each, then such letters anywhere, then plain pages
        # of every kind. From what is difficult alone, a tower learns nothing for a long time.
        self.difficulty = max(self.difficulty, DIFFICULTIES * min(1.0, (progress - 0.15) / 0.4))
        loose, other, worn = (min(1.0, max(0.0, self.difficulty - number)) for number in range(DIFFICULTIES))
        # Pages full of letters teach what letters look like; as soon as all pages are worn, shares are the usual ones.
        shares = CROWDED if self.settings.crowded and self.difficulty < DIFFICULTIES else SHARES
        aligned = (0.9 * (1 - other), loose)
        groups = max(1, int(self.settings.batch * GROUP_SHARE))
        batch = self.draw_or_reuse(
            lambda: [
                self.studio.draw_pages(self.settings.batch, shares, 0.9 * (1 - worn), aligned),
                self.studio.draw_groups(groups),
            ]
        )
        with self.autocast():
            features = self.modules["vision"](batch.images)
            losses = self.modules["reader"].losses(features, batch.slots, batch.places, batch.placed)
        self.weigh_reading(losses).backward()
        if losses["accuracy"] > READY:
            self.difficulty += DIFFICULTIES / 0.4 * (progress - self.last_progress)
        self.last_progress = progress
        self.note(**losses, difficulty=torch.tensor(self.difficulty))

    def language_step(self, progress: float) -> None:
        # Copying comes first, by itself: from a mixture it is learned late.
        is_copy = progress < 0.25
        is_field = not is_copy and self.count % FIELD_EVERY == 0
        if is_copy:
            batch = self.studio.spell_copies(self.settings.language_batch)
        else:
            batch = self.studio.spell_pages(self.settings.language_batch, CAPTIONS if progress < 0.5 else ANSWERED)
        lesson = self.make_lesson(batch, is_field)
        lesson.supervised &= batch.is_whole[:, None]
        slots = self.confuse(batch.slots) if progress >= 0.5 else batch.slots
        embeddings = self.modules["language"].embeddings
        letters = embeddings[self.teacher.tokens.clamp(min=0)]
        with self.autocast():
            patches = self.modules["spelled"](letters, slots, batch.places, batch.placed)
            loss, right = self.answer(patches, lesson, embeddings)
        loss.mean().backward()
        name = "field" if is_field else "answer"
        self.note(**{name: loss.mean(), f"{name} right": right.float().mean()})

    def read_step(self, progress: float) -> None:
        """Answers about images; in the joint stage the vision tower learns from it, too."""
        is_field = self.count % FIELD_EVERY == 0
        count = self.settings.joint_batch
        groups = max(1, int(count * (0.4 if is_field else GROUP_SHARE)))
        drawn = 0 if is_field or self.memes is None else int(count * DRAWN_SHARE)
        seen = count - drawn  # pages of which all labels are known
        batch = self.draw_or_reuse(
            lambda: [
                self.studio.draw_pages(seen - groups, ANSWERED),
                self.studio.draw_groups(groups),
                *([self.studio.pick_memes(self.memes, drawn)] if drawn else []),
            ],
            kind=is_field,
        )
        order = torch.randperm(count, generator=self.studio.dice.generator, device=self.device)
        with self.autocast():
            with torch.set_grad_enabled(self.stage == "joint"):
                features = self.modules["vision"](batch.images)
                losses = self.modules["reader"].losses(
                    features[:seen], batch.slots[:seen], batch.places[:seen], batch.placed[:seen]
                )
            patches = torch.empty_like(features[..., :1]).expand(-1, -1, self.sizes.width).clone()
            patches = patches.index_copy(0, order, self.pool(features[order] * self.scale).to(patches.dtype))
            lesson = self.make_lesson(batch, is_field)
            loss, right = self.answer(patches, lesson, self.modules["language"].embeddings)
        page = lesson.supervised.nonzero()[:, 0]  # of each answered token
        projector = torch.empty_like(order).index_copy(0, order, torch.arange(count, device=self.device))
        projector = projector * self.settings.projectors // count
        trust = self.pool.trust(order.device)[projector[page]]
        whole = (loss * trust).sum() / trust.sum() + self.settings.reading_weight * self.weigh_reading(losses)
        whole.backward()
        self.pool.step()
        old = trust >= 0.99
        old = old | ~old.any()  # at first all are young
        name = "field" if is_field else "answer"
        self.note(**{name: loss[old].mean(), f"{name} right": right[old].float().mean()})
        self.note(accuracy=losses["accuracy"], counted=losses["counted"])

    # ---- Parts of steps ----

    def draw_or_reuse(self, draw: Callable[[], list[Batch]], kind: bool = False) -> Batch:
        """A new batch every `uses` steps of this kind; in between one of the last, recoloured. Drawing costs time."""
        kept, self.drawn[kind] = self.kept[kind], self.drawn[kind] + 1
        if kept and self.drawn[kind] % self.settings.uses:
            return self.studio.recolour(kept[int(self.studio.dice.below(len(kept), 1))])
        batch = join(*draw())
        if self.settings.uses > 1:
            kept.append(batch)
        return batch

    def confuse(self, slots: torch.Tensor) -> torch.Tensor:
        """Slots in which up to half of a page's letters are others, as an eye that errs would see them.

        Who has only read what was seen perfectly finds his place by the letter said last, and loses it at every error.
        """
        dice = self.studio.dice
        share = dice.uniform(0, 0.5, len(slots), 1, 1)
        others = dice.below(len(self.teacher.tokens) - 1, *slots.shape) + 1
        return torch.where((slots > 0) & (dice.uniform(0, 1, *slots.shape) < share), others, slots)

    def make_lesson(self, batch: Batch, is_field: bool) -> Lesson:
        dice = self.studio.dice
        if is_field:
            return self.teacher.make_field_lesson(dice, batch.slots, batch.placed)
        tasks = dice.choose((0.55, 0.25, 0.2), len(batch.text))
        tasks = torch.where(batch.facts[:, 0] >= 0, tasks, 0)
        # Of a group, only the text is asked for, and there is none.
        tasks = torch.where((batch.placed[..., 0] >= 0).sum(1) > 1, 0, tasks)
        return self.teacher.make_lesson(dice, tasks, batch.text, batch.facts)

    def answer(
        self, patches: torch.Tensor, lesson: Lesson, embeddings: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every supervised token (tokens,): the loss, and whether it is the likeliest."""
        ids = lesson.ids
        if self.stage != "language":
            with torch.no_grad():
                ids = self.say(ids, lesson.supervised, self.foretell(patches, ids, embeddings), embeddings)
        chosen = self.foretell(patches, ids, embeddings)[lesson.supervised]
        scores = (chosen @ embeddings.T.to(chosen.dtype)).float()
        wanted = lesson.ids[lesson.supervised]
        return F.cross_entropy(scores, wanted, reduction="none"), scores.argmax(-1) == wanted

    def foretell(self, patches: torch.Tensor, ids: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """States (B, T, width) that foretell each of the ids (B, T) behind the patches."""
        prefix = embeddings[self.teacher.prefix].expand(len(patches), -1, -1)
        states = torch.cat([prefix.to(patches.dtype), patches, embeddings[ids].to(patches.dtype)], dim=1)
        return self.modules["language"](states)[:, prefix.shape[1] + patches.shape[1] - 1 : -1]

    def say(
        self, ids: torch.Tensor, supervised: torch.Tensor, hidden: torch.Tensor, embeddings: torch.Tensor
    ) -> torch.Tensor:
        """Answers in which some tokens, of some pages all, are what the language model says in their place.

        Who only ever continues true answers loses his place behind his own errors (parallel scheduled sampling,
        Duckworth et al. 2019).
        """
        said = (hidden @ embeddings.T.to(hidden.dtype)).argmax(-1)  # (B, T)
        share = self.studio.dice.uniform(0, 1, len(ids), 1)
        swapped = supervised & (said != self.teacher.end) & (self.studio.dice.uniform(0, 1, *ids.shape) < share)
        return torch.where(swapped, said, ids)

    def weigh_reading(self, losses: dict) -> torch.Tensor:
        """One loss of all that the heads tell."""
        whole = losses["character"] + 0.5 * losses["count"] + 0.5 * losses["place"]
        if self.stage != "vision":
            whole = whole + 2 * losses["missed"]
        return whole + 0.2 * losses.get("facts", 0)

    # ---- State ----

    @property
    def stages(self) -> dict[str, tuple]:
        """Name: steps, what learns, peak rates of Muon and AdamW, the step."""
        settings = self.settings
        return {
            "vision": (settings.vision_steps, ("vision", "reader"), 2e-2, 2e-3, self.vision_step),
            "lookup": (settings.lookup_steps, ("vision", "reader"), 5e-3, 5e-4, self.vision_step),
            "language": (settings.language_steps, ("language", "spelled"), 1e-2, 2e-3, self.language_step),
            "read": (settings.read_steps, ("language",), 4e-3, 8e-4, self.read_step),
            "joint": (settings.joint_steps, ("vision", "reader", "language"), 1e-3, 2e-4, self.read_step),
        }

    def begin(self, stage: str) -> None:
        """What has to be done between stages."""
        self.stage, self.count, self.spent, self.last_progress = stage, 0, 0.0, 0.0
        for kept in self.kept:
            kept.clear()  # a stage has its own kinds of pages, and its own number of them
        self.steps, names, muon_rate, rate, self.step = self.stages[stage]
        if stage == "lookup":
            layer = self.modules["vision"].model.encoder.layers[-1]
            make_lookup(layer, self.modules["reader"], self.measure_features())
        if stage == "language":
            with torch.no_grad():
                codes = F.normalize(self.modules["reader"].codes[1:], dim=-1)
                self.modules["language"].codes[self.teacher.tokens[1:]] = codes
        if stage == "read":
            self.scale = 1 / self.measure_features()
        dtype = torch.bfloat16 if self.settings.bf16 else torch.float32
        self.optimizer = Optimizer(self.modules, names, muon_rate, rate, dtype)

    @torch.no_grad()
    def measure_features(self) -> float:
        """The standard deviation of the vision tower's features."""
        with self.autocast():
            return float(self.modules["vision"](self.studio.draw_pages(32).images).float().std())

    @property
    def progress(self) -> float:
        """How much of the stage is done, by steps, or by time where its seconds are given."""
        if self.settings.stage_seconds:
            seconds = self.settings.stage_seconds[list(self.stages).index(self.stage)]
            return self.spent / seconds if seconds else 1.0
        return self.count / self.steps if self.steps else 1.0

    def share(self, progress: float) -> float:
        """Of the peak rates: a short rise, then half a cosine. Projectors learn alone while all are young."""
        rise = progress / 0.03
        if self.stage == "read":
            alone = max(self.settings.life // 4, 1)  # steps, and as many for the rise
            rise = max(0, self.count / alone - 1)
        return min(1, rise) * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)

    def state(self) -> dict:
        return {
            "stage": self.stage,
            "count": self.count,
            "spent": self.spent,
            "difficulty": self.difficulty,
            "modules": self.modules.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pool": (
                self.pool.state_dict(),
                {name: getattr(self.pool, name) for name in ("moments", "ages", "lives", "next_seed")},
            ),
            "scale": self.scale,
            "dice": self.studio.dice.generator.get_state().cpu(),
        }

    def restore(self, state: dict) -> None:
        self.begin(state["stage"])
        for name in ("count", "spent", "scale", "difficulty"):
            setattr(self, name, state[name])
        self.last_progress = self.progress
        self.modules.load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])
        weights, others = state["pool"]
        self.pool.load_state_dict(weights)
        vars(self.pool).update(others)
        self.studio.dice.generator.set_state(state["dice"].cpu())

    def export(self, folder: Path) -> None:
        """Weights in float16, small files."""
        folder.mkdir(parents=True, exist_ok=True)
        language = {name: weight for name, weight in self.modules["language"].model.state_dict().items()}
        language["embed_tokens.weight"] = self.modules["language"].embeddings
        parts = {
            "vision": self.modules["vision"].model.state_dict(),
            "language": language,
            "reader": self.modules["reader"].state_dict(),
            "projectors": self.pool.state_dict(),
        }
        for name, weights in parts.items():
            save_file(
                {key: weight.detach().half().cpu().contiguous() for key, weight in weights.items()},
                folder / f"{name}.safetensors",
            )
        facts = {"scale": self.scale, "sizes": asdict(self.sizes), "stage": self.stage, "step": self.count}
        (folder / "facts.json").write_text(json.dumps(facts | {"ages": self.pool.ages}, indent=1) + "\n")


def join(*batches: Batch) -> Batch:
    """Batches as one, texts padded to the same length."""
    longest = max(batch.text.shape[1] for batch in batches)
    fields = {name: [getattr(batch, name) for batch in batches] for name in vars(batches[0])}
    fields["text"] = [F.pad(text, (0, longest - text.shape[1])) for text in fields["text"]]
    fields["places"] = [places.expand(-1, -1, -1, 2) for places in fields["places"]]
    return Batch(**{name: torch.cat(parts) for name, parts in fields.items()})
