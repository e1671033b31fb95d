"""A finished run's loss and learning rates, drawn."""

import itertools
from pathlib import Path

from meme_llava.storage.run_record import RATE_PREFIX


def draw_training_curves(log_history: list[dict], path: Path) -> None:
    """Write a PNG with the loss above and every role's learning rate below, over optimizer steps.

    Args:
        log_history: the training log's entries; those with a "loss" are drawn, and those with an "eval_loss".
    """
    # It takes a second to load, and one process needs it once.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = [entry for entry in log_history if "loss" in entry]
    evaluated = [entry for entry in log_history if "eval_loss" in entry]
    steps = [entry["step"] for entry in entries]
    roles = sorted({key for entry in entries for key in entry if key.startswith(RATE_PREFIX)})
    figure, (loss_axes, rate_axes) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(2, 1))
    loss_axes.plot(steps, [entry["loss"] for entry in entries], linewidth=1.2, label="training")
    if evaluated:
        losses = [entry["eval_loss"] for entry in evaluated]
        loss_axes.plot([entry["step"] for entry in evaluated], losses, "o-", linewidth=1.8, label="validation")
        loss_axes.legend()
    loss_axes.set_ylabel("loss" if evaluated else "training loss")
    loss_axes.set_ylim(bottom=0)
    # Roles often share a rate; dashes of different length on one line keep all of them visible.
    for role, style in zip(roles, itertools.cycle(["-", "--", ":"])):
        rates = [entry.get(role) for entry in entries]
        label = f"{role.removeprefix(RATE_PREFIX)} (peak {max(rates):.2g})"
        rate_axes.plot(steps, rates, style, label=label, linewidth=1.8)
    rate_axes.set_yscale("symlog", linthresh=1e-6)
    rate_axes.set_ylim(bottom=0)
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_xlabel("optimizer step")
    rate_axes.legend()
    for axes in (loss_axes, rate_axes):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
