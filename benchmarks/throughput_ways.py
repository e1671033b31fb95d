"""The ways of training that throughput.py compares: the published one, and ours with one step after another.

A way is what becomes of the records of an optimizer step: how images are read, how records become batches, and how a
batch becomes a loss. Model, records and their order are the same for all.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from throughput_data import BenchmarkRecord, BenchmarkRecords, LengthScale
from throughput_devices import Platform
from throughput_models import Models
from torch.nn import functional
from torch.utils.data import DataLoader

from meme_llava.dataset.collator import PackingCollator
from meme_llava.dataset.conversation import IGNORED_LABEL
from meme_llava.dataset.images import ImagePolicy
from meme_llava.dataset.sampling import BatchShape, PrefixSharing, count_common_prefix, plan_shared_order
from meme_llava.model.flops import StepCounts, count_batch

WORKERS = 2  # of a GPU, as train.py has it; a CPU's cores compute the step themselves
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Way:
    """How a step trains; each of the ladder takes one step more than the one before."""

    name: str
    packs: bool = True
    loss_where_it_counts: bool = False
    shares_images: bool = False
    does_the_rest: bool = False


PUBLISHED = Way("published", packs=False)
LADDER = (
    PUBLISHED,
    Way("padding-free"),
    Way("+ loss where it counts", loss_where_it_counts=True),
    Way("+ shared images", loss_where_it_counts=True, shares_images=True),
    Way("+ the rest", loss_where_it_counts=True, shares_images=True, does_the_rest=True),
)


@dataclass(frozen=True)
class Workload:
    """The records of a run and in which order they train."""

    records: list[BenchmarkRecord]
    scale: LengthScale
    image_policy: ImagePolicy
    image_token_id: int
    shape: BatchShape
    order: np.ndarray  # int64 (steps, global_batch_size), the device batches of a step one after another

    @classmethod
    def plan(
        cls,
        records: list[BenchmarkRecord],
        scale: LengthScale,
        image_policy: ImagePolicy,
        image_token_id: int,
        shape: BatchShape,
        seed: int,
    ) -> "Workload":
        """Put the records in the order that train.py would choose; as many steps as they fill."""
        steps = len(records) // shape.global_batch_size
        positions = np.array([len(record.input_ids) for record in records])
        order = plan_shared_order(positions, _find_sharing(records), steps, shape, seed)
        return cls(records, scale, image_policy, image_token_id, shape, order.reshape(steps, -1))

    @property
    def steps(self) -> int:
        return len(self.order)

    def list_batches(self, way: Way, step: int) -> list[list[int]]:
        """The records of a step by device batch. Unless images are shared, in random order, as was published."""
        records = self.order[step]
        if not way.shares_images:
            records = np.random.default_rng(step).permutation(records)
        size = self.shape.device_batch_size if way.packs else 1
        return records.reshape(-1, size).tolist()

    def count_supervised(self, step: int) -> int:
        """Tokens that carry loss in a step."""
        return sum(self.records[record].supervised for record in self.order[step])

    def load(self, way: Way, batches: list[list[int]], platform: Platform) -> Iterator[dict]:
        """The device batches as a way loads them, from the main process or from workers that read ahead."""
        dataset = BenchmarkRecords(self.records, self.image_policy, not way.does_the_rest, way.shares_images)
        options = {}
        if way.does_the_rest and platform.is_gpu:
            options = {"num_workers": WORKERS, "pin_memory": True}
        loader = DataLoader(dataset, batch_sampler=batches, collate_fn=_Collator(way, self), **options)
        for batch in loader:
            yield {
                name: value.to(platform.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()
            }


def _find_sharing(records: list[BenchmarkRecord]) -> PrefixSharing:
    """What records about one image have in common, as train.py counts it."""
    numbers = {image: number for number, image in enumerate(dict.fromkeys(record.image for record in records))}
    families = np.array([numbers[record.image] for record in records])
    ids = [record.input_ids.numpy() for record in records]
    by_rank = sorted(range(len(records)), key=lambda record: (families[record], ids[record].tolist()))
    ranks, shared = np.empty(len(records), np.int64), np.zeros(len(records), np.int64)
    ranks[by_rank] = np.arange(len(records))
    for before, record in zip(by_rank, by_rank[1:], strict=False):
        if families[before] == families[record]:
            shared[record] = count_common_prefix(ids[before], ids[record])
    return PrefixSharing(families, ranks, shared)


@dataclass(frozen=True)
class _Collator:
    """Items to the batch of a way; a batch carries its `counts` for the benchmark."""

    way: Way
    workload: Workload

    def __call__(self, items: list[dict]) -> dict:
        if not self.way.packs:
            return self._pad(items)
        shares = self.way.shares_images
        batch = PackingCollator(
            self.workload.image_token_id,
            self.workload.scale.tokens_per_image,
            self.workload.image_policy.size,
            shared_images=shares,
        )(items)
        if not self.way.loss_where_it_counts:
            batch = _score_all_positions(batch)
        return {**batch, "counts": count_batch(batch)}

    def _pad(self, items: list[dict]) -> dict:
        width = self.workload.scale.padded_length
        input_ids = torch.zeros((len(items), width), dtype=torch.long)
        labels = torch.full((len(items), width), IGNORED_LABEL)
        attention_mask = torch.zeros((len(items), width), dtype=torch.long)
        for row, item in enumerate(items):
            length = len(item["input_ids"])
            input_ids[row, :length] = item["input_ids"]
            labels[row, :length] = item["labels"]
            attention_mask[row, :length] = 1
        pixel_values = torch.cat([torch.stack(item["pixel_values"]) for item in items])
        positions, images = len(items) * width, len(pixel_values)
        pairs = positions * (width + 1) // 2
        return {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": attention_mask,
            "pixel_values": pixel_values,
            "counts": StepCounts(positions, pairs, images, positions),
        }


def _score_all_positions(batch: dict) -> dict:
    """The same loss with a target at every position of the row; those that carried none weigh 0."""
    positions = batch["input_ids"].shape[1]
    targets, weights = torch.zeros(positions, dtype=torch.long), torch.zeros(positions)
    targets[batch["loss_positions"]] = batch["loss_targets"]
    weights[batch["loss_positions"]] = batch["loss_weights"]
    return {**batch, "loss_positions": torch.arange(positions), "loss_targets": targets, "loss_weights": weights}


@dataclass
class Training:
    """One way's optimizer at work on the models that all ways share."""

    way: Way
    models: Models
    platform: Platform
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        groups = [
            {"params": list(group.parameters), "lr": group.learning_rate, "weight_decay": group.weight_decay}
            for group in self.models.groups
        ]
        self.optimizer = torch.optim.AdamW(groups, fused=True if self.way.does_the_rest else None)

    def step(self, batches: Iterator[dict], count: int, tokens: int) -> tuple[torch.Tensor, StepCounts]:
        """One optimizer step over `count` device batches. Returns its mean loss, still on the device, and counts.

        Args:
            tokens: of the whole step that carry loss; every one of them weighs the same.
        """
        total, counts = torch.zeros((), device=self.platform.device), StepCounts()
        for _ in range(count):
            batch = next(batches)
            counts += batch.pop("counts")
            with self.platform.autocast():
                loss = self.sum_losses(batch) / tokens
            loss.backward()
            total += loss.detach()
        parameters = [parameter for group in self.models.groups for parameter in group.parameters]
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, counts

    def warm_up(self, batches: Iterator[dict]) -> None:
        """Go through one device batch and make the optimizer's state, and change nothing that is trained."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.step(batches, 1, tokens=1)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def sum_losses(self, batch: dict) -> torch.Tensor:
        """The sum of the cross entropies of a device batch, a float32 scalar."""
        if self.way.packs:
            self.models.head.makes_all_logits = not self.way.loss_where_it_counts
            return self.models.packed(**batch)["loss"]
        labels = batch.pop("labels")
        logits = self.models.plain(**batch).logits.float()  # (rows, positions, vocabulary)
        # As transformers shifts: the last position of a row predicts nothing.
        targets = functional.pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:]
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
