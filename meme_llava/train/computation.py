"""How this machine computes a run's steps: which attention kernel, and which layers are recomputed to save memory."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import psutil
import torch
from transformers import LlavaConfig

from meme_llava.dataset.images import ImagePolicy
from meme_llava.model.packed_attention import NAMES, choose_attention
from meme_llava.model.trainable import CheckpointedLayers, count_layers
from meme_llava.train.settings import TrainArguments

GIB = 2**30
# Float32 numbers that a layer keeps for each position, at most, as multiples of its width and of its MLP's.
KEPT_WIDTHS, KEPT_MLP_WIDTHS = 40, 20
# Weights, gradients, two moments of Adam and temporaries, at most, as a multiple of the float32 weights.
STATE_COPIES = 6


@dataclass(frozen=True)
class Computation:
    """How steps are computed; it changes memory and time, and results by no more than rounding.

    Args:
        attention: name of the language model's attention, from `choose_attention`.
        recomputed: layers that compute their activations again in the backward pass.
        largest: positions of the longest device batch.
        memory: bytes of the step with that batch; None where it was not estimated, because it was not asked for, or
            because it cannot come near the machine's memory.
        usable: bytes that a step may take, where that was estimated.
    """

    attention: str
    recomputed: CheckpointedLayers
    largest: int
    memory: int | None = None
    usable: int = 0

    @property
    def attention_setting(self) -> str:
        """The attention by the name that --attention has for it."""
        return next(setting for setting, name in NAMES.items() if name == self.attention)

    def to_record(self) -> dict:
        """What the run record keeps."""
        estimate = {} if self.memory is None else {"estimated_step_bytes": self.memory}
        return {"attention": self.attention_setting, "recomputed_layers": asdict(self.recomputed), **estimate}

    def describe(self) -> str:
        """One line for a person, and a second one if the step may not fit."""
        layers = "no layer computed twice"
        if self.recomputed != CheckpointedLayers():
            layers = f"{self.recomputed.language} language and {self.recomputed.vision} vision layers computed twice"
        line = f"attention {self.attention_setting}; {layers}"
        if self.memory is None:
            return line
        line += f"; the largest batch, {self.largest:,} positions, takes about {self.memory / GIB:.1f} GiB"
        if self.memory > self.usable:
            line += (
                f"\nwarning: only {self.usable / GIB:.1f} GiB can be used, so the run may stop for lack of memory when "
                "it comes to that batch; --plan shows what would fit"
            )
        return line


def plan_computation(
    arguments: TrainArguments,
    image_policy: ImagePolicy,
    largest_batch: Mapping,
    device: torch.device,
    uses_bf16: bool,
    processes: int,
) -> Computation:
    """Choose what the settings leave open, before the model is loaded.

    Args:
        largest_batch: the device batch with the most positions of the run.

    Raises:
        UserError: the attention asked for cannot run here.
    """
    attention = choose_attention(arguments.attention, device, uses_bf16)
    config = LlavaConfig.from_pretrained(arguments.model, local_files_only=True)
    largest, memory = largest_batch["input_ids"].numel(), measure_memory(device, processes)
    setting, on_gpu = arguments.gradient_checkpointing, device.type == "cuda"
    if setting != "auto" or (not on_gpu and bound_memory(arguments, config, largest_batch) <= memory // 2):
        most = count_layers(config, vision_trainable=arguments.vision_tower_training != "frozen")
        return Computation(attention, most if setting == "full" else CheckpointedLayers(), largest)
    from meme_llava.train.planning.memory import ShardingPlan, StepEstimator, find_usable

    engine = ShardingPlan.of_run(arguments, processes, on_gpu)
    estimator = StepEstimator(config, image_policy, arguments, engine, largest_batch)
    recomputed = estimator.choose_recomputed(setting, memory)
    return Computation(attention, recomputed, largest, estimator.estimate(recomputed).total, find_usable(memory))


def measure_memory(device: torch.device, processes: int) -> int:
    """Bytes that a process can have on this machine at most; the processes of a CPU run share its memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total // processes


def bound_memory(arguments: TrainArguments, config: LlavaConfig, batch: Mapping) -> int:
    """More bytes than a step in float32 can take, counted roughly. Saves small runs the seconds of an exact count."""
    text, vision = config.text_config, config.vision_config
    positions = batch["input_ids"].numel()
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    stored = sum(path.stat().st_size for path in arguments.model.glob("*.safetensors"))
    kept = positions * text.num_hidden_layers * _count_kept(text)
    kept += len(batch["pixel_values"]) * patches * vision.num_hidden_layers * _count_kept(vision)
    # Every segment's mask over its path, in every layer.
    masks = batch["max_seqlen_q"] * len(batch["kv_index"]) * text.num_hidden_layers
    logits = 4 * len(batch["loss_positions"]) * text.vocab_size
    return 2 * STATE_COPIES * stored + 4 * (kept + logits) + masks


def _count_kept(config) -> int:
    return KEPT_WIDTHS * config.hidden_size + KEPT_MLP_WIDTHS * config.intermediate_size
