"""Memory of one training step, part by part, before anything is loaded. Nothing about time.

Activations are counted by running the model's own code (trace.py), the rest follows from what learns and from how
devices divide it. Layers of a tower are alike: models of two and three layers are run, and the rest is extrapolated.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

from torch import nn
from transformers import LlavaConfig

from meme_llava.dataset.images import ImagePolicy
from meme_llava.distributed.engines import DEEPSPEED, FSDP, choose_engine
from meme_llava.model.trainable import (
    CheckpointedLayers,
    choose_recomputed_layers,
    count_layers,
    is_vision_layer_matrix,
    recompute_layers,
)
from meme_llava.train.planning.trace import Precision, Trace, outline_model, set_depths, trace_step
from meme_llava.train.settings import TrainArguments

FEW, MORE = 2, 3  # layers of the models that are run
# DeepSpeed's own values where a file of configs/deepspeed leaves them out, in elements.
BUCKET_SIZE = 500_000_000
LIVE_PARAMETERS = 1_000_000_000
PREFETCHED_PARAMETERS = 50_000_000
MARGIN, ALLOWANCE = 0.08, 2**30  # of a device's memory, and bytes


@dataclass(frozen=True)
class ShardingPlan:
    """How the state of training is kept and divided.

    Args:
        processes: devices that train together.
        arithmetic: what each of them computes with.
        zero_stage: how much is divided, by DeepSpeed's ZeRO stage; None where nothing is.
        zero_options: the "zero_optimization" part of a file of configs/deepspeed.
        is_fsdp: FSDP2 divides as ZeRO-3 does, but trains its float32 weights themselves, without masters beside them.
    """

    processes: int
    arithmetic: Precision
    zero_stage: int | None = None
    zero_options: Mapping = field(default_factory=dict)
    is_fsdp: bool = False

    @classmethod
    def of_run(cls, arguments: TrainArguments, processes: int, on_gpu: bool) -> "ShardingPlan":
        """The division of the engine that the settings ask for."""
        engine = choose_engine(arguments.engine, processes, on_gpu)
        uses_bf16 = on_gpu and arguments.precision in ("auto", "bf16")
        if engine.kind == DEEPSPEED:
            arithmetic = Precision(on_gpu, uses_bf16, keeps_float32=not uses_bf16)
            return cls(processes, arithmetic, engine.zero_stage, engine.zero_options)
        stage = 3 if engine.kind == FSDP else None
        return cls(processes, Precision(on_gpu, uses_bf16, keeps_float32=True), stage, is_fsdp=engine.kind == FSDP)

    def with_zero(self, stage: int, processes: int) -> "ShardingPlan":
        """The same under another ZeRO stage, on that many devices."""
        arithmetic = replace(self.arithmetic, keeps_float32=not self.arithmetic.uses_bf16)
        return ShardingPlan(processes, arithmetic, stage, self.zero_options)

    @property
    def name(self) -> str:
        if self.is_fsdp:
            return "FSDP2"
        if self.zero_stage is not None:
            return f"ZeRO-{self.zero_stage}"
        return "one process" if self.processes == 1 else "DDP"

    def divides(self, stage: int) -> int:
        """Among how many devices the part that ZeRO divides from this stage on is divided."""
        return self.processes if (self.zero_stage or 0) >= stage else 1

    def read_option(self, name: str, default: int, automatic: int) -> int:
        """A number of elements of the ZeRO options; "auto" stands for what transformers fills in: `automatic`."""
        value = self.zero_options.get(name, default)
        return automatic if value == "auto" else int(value)

    def offloads(self, name: str) -> bool:
        """Whether "offload_optimizer" or "offload_param" takes that part off the device."""
        return self.zero_options.get(name, {}).get("device", "none") != "none"


@dataclass(frozen=True)
class StepMemory:
    """Bytes that one device holds when a training step holds most, by part.

    Args:
        weights: frozen and learning.
        gradients: of what learns.
        optimizer: Adam's two moments or Muon's one, and float32 masters where the engine keeps them.
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
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


class StepEstimator:
    """Estimates the memory of a run's steps; a step's shapes are run once for each way of recomputing.

    Args:
        image_policy: of the model, for pixels become floating point numbers inside the step.
        batch: what `PackingCollator` returned; the largest of the run decides.
    """

    def __init__(
        self,
        config: LlavaConfig,
        image_policy: ImagePolicy,
        arguments: TrainArguments,
        engine: ShardingPlan,
        batch: Mapping,
    ):
        self.config, self.image_policy, self.arguments = config, image_policy, arguments
        self.engine, self.batch = engine, batch

    def with_engine(self, engine: ShardingPlan) -> "StepEstimator":
        """The same step under another engine. Shapes that have run need not run again where it computes alike."""
        other = copy.copy(self)
        other.engine = engine
        if engine.arithmetic != self.engine.arithmetic:
            for name in ("model", "_kept", "_recomputed"):
                other.__dict__.pop(name, None)
        return other

    @cached_property
    def model(self) -> nn.Module:
        """The whole model as train.py prepares it, its parameters without storage."""
        return outline_model(self.config, self.image_policy, self.arguments, self.engine.arithmetic)

    @cached_property
    def most(self) -> CheckpointedLayers:
        """All layers that can compute their activations again."""
        return count_layers(self.config, vision_trainable=self.arguments.vision_tower_training != "frozen")

    def estimate(self, recomputed: CheckpointedLayers) -> StepMemory:
        """The memory of a step in which these layers compute their activations again."""
        layers = self.most
        if recomputed == CheckpointedLayers():
            trace = self._kept.extrapolate(layers)
        elif recomputed == layers:
            trace = self._recomputed.extrapolate(layers)
        else:
            trace = self._mix(recomputed)
        return self._add_state(trace)

    def _mix(self, recomputed: CheckpointedLayers) -> Trace:
        """Some layers keep their activations, others do not."""
        layers, kept, saved = self.most, self._kept.extrapolate(self.most), self._recomputed.extrapolate(self.most)
        if recomputed.language == layers.language:
            per_layer = self._kept.per_vision_layer.activations - self._recomputed.per_vision_layer.activations
            return replace(saved, activations=saved.activations + (layers.vision - recomputed.vision) * per_layer)
        per_layer = self._kept.per_language_layer.activations - self._recomputed.per_language_layer.activations
        return Trace(
            activations=kept.activations - recomputed.language * per_layer,
            logits=max(kept.logits, saved.logits),
            # The first layers compute theirs again in the room that the last ones have freed.
            temporaries=kept.temporaries,
        )

    def choose_recomputed(self, setting: str, memory: int) -> CheckpointedLayers:
        """The layers to compute again under --gradient_checkpointing `setting` on a device of `memory` bytes."""
        return choose_recomputed_layers(
            setting, self.most, lambda recomputed: self.estimate(recomputed).total <= find_usable(memory)
        )

    @cached_property
    def _kept(self) -> "_TracedDepths":
        return self._trace_depths(recomputes=False)

    @cached_property
    def _recomputed(self) -> "_TracedDepths":
        return self._trace_depths(recomputes=True)

    def _trace_depths(self, recomputes: bool) -> "_TracedDepths":
        traces = []
        for language, vision in ((FEW, FEW), (MORE, FEW), (FEW, MORE)):
            if vision == MORE and not self.most.vision:
                traces.append(traces[0])
                continue
            config = set_depths(self.config, language, vision)
            model = outline_model(config, self.image_policy, self.arguments, self.engine.arithmetic)
            recompute_layers(model, CheckpointedLayers(language, vision) if recomputes else CheckpointedLayers())
            traces.append(trace_step(model, self.batch, self.engine.arithmetic))
        return _TracedDepths(*traces)

    def _add_state(self, trace: Trace) -> StepMemory:
        engine, parameters, arguments = self.engine, list(self.model.parameters()), self.arguments
        weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        trainable = sum(parameter.numel() for parameter in learning)
        gradients = sum(parameter.numel() * parameter.element_size() for parameter in learning)
        # Two float32 moments; DeepSpeed keeps float32 masters of its own.
        has_masters = engine.zero_stage is not None and not engine.is_fsdp
        optimizer = trainable * (12 if has_masters else 8) // engine.divides(1)
        if arguments.muon_lr is not None:
            named = self.model.named_parameters()
            optimizer -= 4 * sum(p.numel() for name, p in named if p.requires_grad and is_vision_layer_matrix(name, p))
        # While the optimizer runs: DeepSpeed's float32 gradients, or the two temporaries of Adam's largest tensor.
        updating = trainable * 4 // engine.divides(1)
        if not has_masters:
            updating = 0 if engine.arithmetic.on_gpu else 8 * max(parameter.numel() for parameter in learning)
        temporaries = max(trace.temporaries, updating - trace.activations - trace.logits)
        communication = self._count_communication(weights, gradients, max(p.nbytes for p in parameters))
        return StepMemory(
            weights=0 if engine.offloads("offload_param") else weights // engine.divides(3),
            gradients=gradients // engine.divides(2),
            optimizer=0 if engine.offloads("offload_optimizer") else optimizer,
            activations=trace.activations,
            logits=trace.logits,
            temporaries=temporaries,
            communication=communication,
        )

    def _count_communication(self, weights: int, gradients: int, largest: int) -> int:
        """Bytes that exist only because several devices train together."""
        engine, size = self.engine, 2 if self.engine.arithmetic.uses_bf16 else 4
        if engine.zero_stage is None:
            return gradients if engine.processes > 1 else 0  # DDP copies gradients into buckets
        if engine.is_fsdp:
            # Two layers whole, the one that runs and the next; embedding and LM head stay so.
            layers = self.config.text_config.num_hidden_layers
            return min(2 * weights // layers + 2 * largest, weights)
        buckets = 1 + bool(engine.zero_options.get("overlap_comm"))
        square = self.config.text_config.hidden_size**2
        communication = min(engine.read_option("reduce_bucket_size", BUCKET_SIZE, square) * size, gradients) * buckets
        if engine.zero_stage == 3:
            gathered = engine.read_option("stage3_max_live_parameters", LIVE_PARAMETERS, LIVE_PARAMETERS)
            gathered += engine.read_option("stage3_prefetch_bucket_size", PREFETCHED_PARAMETERS, square)
            communication += min(max(gathered * size, largest), weights)
        return communication


@dataclass(frozen=True)
class _TracedDepths:
    """The same step of three models: few layers, one language layer more, one vision layer more."""

    base: Trace
    deeper_language: Trace
    deeper_vision: Trace

    @property
    def per_language_layer(self) -> Trace:
        return self.deeper_language - self.base

    @property
    def per_vision_layer(self) -> Trace:
        return self.deeper_vision - self.base

    def extrapolate(self, layers: CheckpointedLayers) -> Trace:
        """The step of a model with the given layers; a frozen tower, which keeps nothing, counts none."""
        vision = layers.vision or FEW
        return self.base + self.per_language_layer * (layers.language - FEW) + self.per_vision_layer * (vision - FEW)


def find_usable(memory: int) -> int:
    """Bytes of a device's memory that a plan may fill: the rest is for fragments, kernels and their libraries."""
    return int(memory * (1 - MARGIN)) - ALLOWANCE
