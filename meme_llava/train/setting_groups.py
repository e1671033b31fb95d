"""Settings of a training run that only this room uses: schedule, computation, checkpoints, tracking, evaluation, looks.

Without torch. `free=True` marks what may differ when a run continues (see meme_llava/cli.py).
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from meme_llava.cli import check_setting, describe
from meme_llava.distributed.engines import check_engine_name
from meme_llava.errors import UserError
from meme_llava.train.trackers import check_tracker_names


@dataclass(kw_only=True)
class RunFiles:
    """What trains, on what, and where the result goes. Contents are compared when a run continues, not paths."""

    model: Path = field(metadata=describe("LLaVA folder that build_base_model.py or merge_lora.py wrote"))
    annotations: Path = field(metadata=describe("annotation file, .json or .jsonl"))
    image_folder: Path = field(metadata=describe("folder that the records' image paths start from"))
    output_dir: Path = field(metadata=describe("where checkpoints and the final adapter go"))
    projector_from: Path | None = field(
        default=None,
        metadata=describe(
            "output_dir or checkpoint of an earlier run on the same base, with whose multi_modal_projector this one "
            "begins"
        ),
    )


@dataclass(kw_only=True)
class ScheduleSettings:
    """How long a run is, and how its learning rates rise and fall."""

    num_train_epochs: float = field(metadata=describe("passes over the records"))
    max_steps: int | None = field(default=None, metadata=describe("optimizer steps, in place of num_train_epochs"))
    warmup_ratio: float | None = field(
        default=None, metadata=describe("share of the steps in which the learning rates rise from 0")
    )
    warmup_steps: int | None = field(default=None, metadata=describe("warmup in steps, in place of warmup_ratio"))
    lr_scheduler_type: Literal["cosine", "linear"] = field(
        default="cosine", metadata=describe("how the learning rates fall to 0 after warmup")
    )
    max_grad_norm: float = field(default=1.0, metadata=describe("gradients are clipped to this norm"))

    def __post_init__(self) -> None:
        """Stop at values that cannot be meant."""
        check_setting(self, "num_train_epochs", self.num_train_epochs > 0, "greater than 0")
        check_setting(self, "max_steps", self.max_steps is None or self.max_steps > 0, "at least 1")
        if self.warmup_ratio is None and self.warmup_steps is None:
            raise UserError("give --warmup_ratio, a share of the steps, or --warmup_steps")
        has_share = self.warmup_ratio is None or 0 <= self.warmup_ratio < 1
        check_setting(self, "warmup_ratio", has_share, "between 0 and 1")
        check_setting(self, "warmup_steps", self.warmup_steps is None or self.warmup_steps >= 0, "0 or more")
        check_setting(self, "max_grad_norm", self.max_grad_norm >= 0, "0 or more")


@dataclass(kw_only=True)
class ComputationSettings:
    """How a step is computed, and by what."""

    precision: Literal["auto", "bf16", "tf32", "fp32"] = field(
        default="auto",
        metadata=describe("auto: bf16 on a GPU, fp32 on a CPU; tf32: fp32 with a GPU's shorter multiplications"),
    )
    attention: Literal["auto", "flash_attention_2", "varlen", "sdpa", "matmul"] = field(
        default="auto", metadata=describe("kernel of the language model; auto: the fastest one here", free=True)
    )
    gradient_checkpointing: Literal["auto", "none", "full"] = field(
        default="auto",
        metadata=describe("recompute layers to save memory; auto: as few as the device's memory asks for", free=True),
    )
    torch_compile: bool = field(
        default=False,
        metadata=describe("compile the layers that repeat; needs a C++ compiler or Triton", free=True),
    )
    engine: str = field(
        default="auto",
        metadata=describe(
            "what divides the work: single, ddp, or a file of configs/deepspeed or configs/fsdp, such as zero2; auto: "
            "single for one process, zero2 on several GPUs, ddp on several CPU processes",
            free=True,
        ),
    )
    hang_timeout: int = field(
        default=600,
        metadata=describe("seconds without progress in any process after which the run is ended", free=True),
    )
    dataloader_workers: int | None = field(
        default=None,
        metadata=describe("processes a device that decode images; else 2 a GPU, none on a CPU", free=True),
    )

    def __post_init__(self) -> None:
        """Stop at values that cannot be meant."""
        check_setting(self, "hang_timeout", self.hang_timeout > 0, "at least 1")
        workers = self.dataloader_workers
        check_setting(self, "dataloader_workers", workers is None or workers >= 0, "0 or more")
        check_engine_name(self.engine)


@dataclass(kw_only=True)
class CheckpointSettings:
    """When checkpoints are written, and which one a run continues."""

    save_steps: int = field(default=500, metadata=describe("steps between two checkpoints", free=True))
    save_total_limit: int = field(
        default=2, metadata=describe("checkpoints kept, at least 2; older ones are deleted", free=True)
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata=describe("a checkpoint folder, or latest for the newest whole one in output_dir", free=True),
    )
    allow_changes: bool = field(
        default=False,
        metadata=describe("continue a checkpoint although data, base, batch or recipe changed since", free=True),
    )

    def __post_init__(self) -> None:
        """Stop at values that contradict each other or cannot be meant."""
        check_setting(self, "save_steps", self.save_steps > 0, "at least 1")
        # With one alone, damage to it would cost the whole run.
        check_setting(self, "save_total_limit", self.save_total_limit >= 2, "at least 2")
        if self.allow_changes and self.resume_from_checkpoint is None:
            raise UserError("--allow_changes belongs to --resume_from_checkpoint, which is not there; add it")


@dataclass(kw_only=True)
class TrackingSettings:
    """What is logged of a run, and where."""

    logging_steps: int = field(default=1, metadata=describe("steps between two log lines", free=True))
    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"],
        metadata=describe("trackers: tensorboard, wandb, swanlab, mlflow; or none", free=True),
    )
    run_name: str | None = field(default=None, metadata=describe("the run's name in trackers", free=True))

    def __post_init__(self) -> None:
        """Stop at values that cannot be meant."""
        check_setting(self, "logging_steps", self.logging_steps > 0, "at least 1")
        check_tracker_names(self.report_to)


@dataclass(kw_only=True)
class EvaluationSettings:
    """What a model is evaluated on while it trains."""

    eval_every: int | None = field(
        default=None,
        metadata=describe("evaluate on other records every N steps and at the end; else not while training", free=True),
    )
    eval_annotations: Path | None = field(
        default=None, metadata=describe("with --eval_every: the records that are evaluated, not trained on", free=True)
    )
    eval_image_folder: Path | None = field(
        default=None, metadata=describe("with --eval_every: folder that their image paths start from", free=True)
    )
    eval_limit: int | None = field(
        default=None, metadata=describe("with --eval_every: only the first N of their records", free=True)
    )
    eval_images: int = field(
        default=4,
        metadata=describe("with --eval_every: images whose answers are shown, always the same ones", free=True),
    )
    eval_max_new_tokens: int = field(
        default=128, metadata=describe("with --eval_every: an answer stops here if not by itself", free=True)
    )

    def __post_init__(self) -> None:
        """Stop at values that contradict each other or cannot be meant."""
        check_setting(self, "eval_every", self.eval_every is None or self.eval_every > 0, "at least 1")
        check_setting(self, "eval_limit", self.eval_limit is None or self.eval_limit > 0, "at least 1")
        check_setting(self, "eval_images", self.eval_images >= 0, "0 or more")
        check_setting(self, "eval_max_new_tokens", self.eval_max_new_tokens > 0, "at least 1")
        for name in ("eval_annotations", "eval_image_folder"):
            if self.eval_every is not None and getattr(self, name) is None:
                raise UserError(
                    f"--eval_every needs --{name}, which is not there; add it, or leave --eval_every out (run.sh takes "
                    "EVAL_ANNOTATIONS and EVAL_IMAGE_FOLDER if neither flag is given)"
                )
        for setting in dataclasses.fields(EvaluationSettings):
            is_set = getattr(self, setting.name) != setting.default
            if self.eval_every is None and is_set:
                raise UserError(f"--{setting.name} belongs to --eval_every, which is not there; add it")


@dataclass(kw_only=True)
class LookSettings:
    """What train.py shows of a run without training."""

    show_batch: bool = field(
        default=False, metadata=describe("print the first batch as a person reads it, and stop", free=True)
    )
    plan: bool = field(
        default=False, metadata=describe("print what the run would take, in memory and time, and stop", free=True)
    )
    accelerator: str | None = field(
        default=None,
        metadata=describe("with --plan: the GPU to plan for, such as a800-80gb; else this one's device", free=True),
    )
    gpus: int | None = field(
        default=None,
        metadata=describe("with --plan: how many of them; else as many as the launcher started", free=True),
    )

    def __post_init__(self) -> None:
        """Stop at values that contradict each other or cannot be meant."""
        check_setting(self, "gpus", self.gpus is None or self.gpus > 0, "at least 1")
        if not self.plan and (self.accelerator is not None or self.gpus is not None):
            raise UserError("--accelerator and --gpus belong to --plan, which is not there; add it, or leave them out")
        if self.plan and self.show_batch:
            raise UserError("--plan and --show_batch print different things and stop; pass one of them")
