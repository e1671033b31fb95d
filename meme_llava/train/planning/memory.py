"""Memory of one training step, part by part, before anything is loaded. Nothing about time.

Activations are counted by running the model's own code (trace.py), the rest follows from what learns and from how
devices divide it. Layers of a tower are alike: models of two and three layers are run, and the rest is extrapolated.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import starmap

import numpy as np
from torch import nn
from transformers import LlavaConfig

from meme_llava.dataset.images import ImagePolicy
from meme_llava.distributed.environment import DDP, DEEPSPEED, FSDP, SINGLE, Engine, choose_engine
from meme_llava.model.four_bit import count_four_bit_bytes
from meme_llava.model.llava import LANGUAGE_MODEL, list_linears
from meme_llava.model.trainable import CheckpointedLayers, count_layers, recompute_layers
from meme_llava.train.planning.trace import Precision, outline_model, set_depths, trace_step
from meme_llava.train.settings import TrainArguments

FEW = 2  # layers of the smallest model that is run
# DeepSpeed's own values where a file of configs/deepspeed leaves them out, in elements.
BUCKET_SIZE = 500_000_000
LIVE_PARAMETERS = 1_000_000_000
PREFETCHED_PARAMETERS = 50_000_000
MARGIN, ALLOWANCE = 0.08, 2**30  # of a device's memory, and bytes


def find_usable(memory: int) -> int:
    """Bytes of a device's memory that a plan may fill: the rest is for fragments, kernels and their libraries."""
    return int(memory * (1 - MARGIN)) - ALLOWANCE


@dataclass(frozen=True)
class StepMemory:
    """Bytes that one device holds when a training step holds most, by part.

    Args:
        weights: frozen and learning.
        gradients: of what learns.
        optimizer: Adam's two moments, and float32 masters where the engine keeps them.
        activations: what the forward pass keeps for the backward pass.
        logits: what the LM head and the loss add while they run.
        temporaries: what else the largest moment adds.
        communication: buckets and gathered weights of several devices.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    temporaries: int
    communication: int

    @property
    def state(self) -> int:
        """What a step holds whatever it computes on."""
        return self.weights + self.gradients + self.optimizer + self.communication

    @property
    def total(self) -> int:
        return self.state + self.activations + self.logits + self.temporaries


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a step on one device under one choice of recomputed layers, in bytes."""

    recomputed: CheckpointedLayers
    memory: StepMemory
    usable: int

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.usable


@dataclass(eq=False)
class StepEstimator:
    """Estimates the memory of a run's steps; a step's shapes are run once for each way of recomputing.

    Args:
        image_policy: of the model, for pixels become floating point numbers inside the step.
        batch: what `PackingCollator` returned; the largest of the run decides.
        processes: devices that train together.
        engine: the one of the settings, if it is not given.
    """

    config: LlavaConfig
    image_policy: ImagePolicy
    arguments: TrainArguments
    batch: Mapping
    processes: int
    on_gpu: bool
    engine: Engine | None = None

    def __post_init__(self) -> None:
        self.engine = self.engine or choose_engine(self.arguments.engine, self.processes, self.on_gpu)
        uses_bf16 = self.on_gpu and self.arguments.precision in ("auto", "bf16")
        self.precision = Precision(self.on_gpu, uses_bf16, not (uses_bf16 and self.engine.kind == DEEPSPEED))
        # FSDP2 divides as ZeRO-3 does, but trains its float32 weights themselves, without masters beside them.
        self.stage = 3 if self.engine.kind == FSDP else self.engine.zero_stage or 0
        self._traces: dict[bool, np.ndarray] = {}

    def with_changes(self, **changes) -> "StepEstimator":
        """The same step of another batch, engine or number of processes. What has run need not run again where it
        computes alike."""
        other = replace(self, **changes)
        if other.precision == self.precision and other.batch is self.batch:
            other.model, other._traces = self.model, self._traces
        return other

    @cached_property
    def model(self) -> nn.Module:
        """The whole model as train.py prepares it, its parameters without storage."""
        return outline_model(self.config, self.image_policy, self.arguments, self.precision)

    @cached_property
    def most(self) -> CheckpointedLayers:
        """All layers that can compute their activations again."""
        return count_layers(self.config, vision_trainable=self.arguments.vision_tower_training != "frozen")

    def choose_recomputed(self, setting: str, memory: int) -> CheckpointedLayers:
        """The layers to compute again under --gradient_checkpointing `setting` on a device of `memory` bytes; auto: the
        fewest with which a step fits, language layers before vision layers, and all of them where nothing fits."""
        most, usable = self.most, find_usable(memory)
        if setting != "auto":
            return most if setting == "full" else CheckpointedLayers()
        counts = [(count, 0) for count in range(most.language)]
        counts += [(most.language, count) for count in range(most.vision)]
        choices = starmap(CheckpointedLayers, counts)
        return next((layers for layers in choices if self.estimate(layers).total <= usable), most)

    def plan(self, setting: str, memory: int) -> MemoryPlan:
        """The memory of a step under --gradient_checkpointing `setting` on a device of `memory` bytes."""
        recomputed = self.choose_recomputed(setting, memory)
        return MemoryPlan(recomputed, self.estimate(recomputed), find_usable(memory))

    def estimate(self, recomputed: CheckpointedLayers) -> StepMemory:
        """The memory of a step in which these layers compute their activations again."""
        most, recomputes_all = self.most, recomputed.language == self.most.language
        # A frozen tower, which keeps nothing, has no layers in `most`.
        times = (1, most.language - FEW, (most.vision or FEW) - FEW)
        trace = times @ self._trace(recomputes_all)
        if recomputed not in (CheckpointedLayers(), most):
            kept, saved = self._trace(False), self._trace(True)
            _, per_language_layer, per_vision_layer = (kept - saved)[:, 0]
            if recomputes_all:
                trace[0] += (most.vision - recomputed.vision) * per_vision_layer
            else:
                # The first layers compute theirs again in the room that the last ones have freed.
                trace[0] -= recomputed.language * per_language_layer
                trace[1] = max(trace[1], (times @ saved)[1])
        return self._add_state(*(int(size) for size in trace))

    def _trace(self, recomputes: bool) -> np.ndarray:
        """Activations, logits and temporaries, in bytes, of the smallest model, of one more language layer, and of one
        more vision layer: int64 (3, 3)."""
        if recomputes not in self._traces:
            rows = []
            for language, vision in ((FEW, FEW), (FEW + 1, FEW), (FEW, FEW + 1)):
                if vision > FEW and not self.most.vision:
                    rows.append(rows[0])
                    continue
                config = set_depths(self.config, language, vision)
                model = outline_model(config, self.image_policy, self.arguments, self.precision)
                if recomputes:
                    recompute_layers(model, CheckpointedLayers(language, vision))
                rows.append(trace_step(model, self.batch, self.precision))
            base, *deeper = np.array(rows, np.int64)
            self._traces[recomputes] = np.array([base, *(row - base for row in deeper)])
        return self._traces[recomputes]

    def _divide(self, size: int, stage: int) -> int:
        """The share of a device in what ZeRO divides from this stage on."""
        return size // self.processes if self.stage >= stage else size

    def _offloads(self, name: str) -> bool:
        """Whether "offload_optimizer" or "offload_param" takes that part off the device."""
        return (self.engine.zero_options.get(name) or {}).get("device", "none") != "none"

    def _add_state(self, activations: int, logits: int, temporaries: int) -> StepMemory:
        parameters = list(self.model.parameters())
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        weights = sum(parameter.nbytes for parameter in parameters)
        if self.arguments.load_in_4bit:
            linears = list_linears(self.model, LANGUAGE_MODEL).values()
            frozen = [linear.weight for linear in linears if not linear.weight.requires_grad]
            weights += count_four_bit_bytes(one.numel() for one in frozen) - sum(one.nbytes for one in frozen)
            # While a layer runs, its weight stands beside in the precision of the step.
            temporaries += max(one.nbytes for one in frozen)
        adds_in_float32 = self.engine.config.get("data_types", {}).get("grad_accum_dtype") == "fp32"
        gradients = sum(4 * one.numel() if adds_in_float32 else one.nbytes for one in learning)
        trainable = sum(parameter.numel() for parameter in learning)
        # Two float32 moments; DeepSpeed keeps float32 masters of its own.
        has_masters = self.engine.kind == DEEPSPEED
        optimizer = self._divide(trainable * (12 if has_masters else 8), 1)
        # While the optimizer runs: DeepSpeed's float32 gradients, or the two temporaries of Adam's largest tensor.
        updating = self._divide(trainable * 4, 1)
        if not has_masters:
            updating = 0 if self.precision.on_gpu else 8 * max(parameter.numel() for parameter in learning)
        return StepMemory(
            weights=0 if self._offloads("offload_param") else self._divide(weights, 3),
            gradients=self._divide(gradients, 2),
            optimizer=0 if self._offloads("offload_optimizer") else optimizer,
            activations=activations,
            logits=logits,
            temporaries=max(temporaries, updating - activations - logits),
            communication=self._count_communication(weights, gradients, max(p.nbytes for p in parameters)),
        )

    def _count_communication(self, weights: int, gradients: int, largest: int) -> int:
        """Bytes that exist only because several devices train together."""
        text, options = self.config.text_config, self.engine.zero_options
        if self.engine.kind in (SINGLE, DDP):
            return gradients if self.processes > 1 else 0  # DDP copies gradients into buckets
        if self.engine.kind == FSDP:
            # Two layers whole, the one that runs and the next; embedding and LM head stay so.
            return min(2 * weights // text.num_hidden_layers + 2 * largest, weights)

        def read(name: str, default: int) -> int:
            """Bytes of a number of elements; "auto" stands for what accelerate is told, about the width's square."""
            value = options.get(name, default)
            return (text.hidden_size**2 if value == "auto" else int(value)) * (2 if self.precision.uses_bf16 else 4)

        buckets = 1 + bool(options.get("overlap_comm"))
        communication = min(read("reduce_bucket_size", BUCKET_SIZE), gradients) * buckets
        if self.stage == 3:
            gathered = read("stage3_max_live_parameters", LIVE_PARAMETERS)
            gathered += read("stage3_prefetch_bucket_size", PREFETCHED_PARAMETERS)
            communication += min(max(gathered, largest), weights)
        return communication
