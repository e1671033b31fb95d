"""The first batch as a person reads it (train.py --show_batch)."""

from itertools import pairwise

import torch
from rich.console import Console
from rich.text import Text

from meme_llava.dataset.conversation import IGNORED_LABEL
from meme_llava.model.llava import Processing

SUPERVISED_STYLE = "bold green"
IMAGE_STYLE = "magenta"
# Real control tokens; text that merely looks like one keeps the colour of text.
CONTROL_STYLE = "cyan"


def print_batch(batch: dict[str, torch.Tensor], processing: Processing, console: Console | None = None) -> None:
    """Print a packed batch as a person reads it: supervised tokens in green and brackets, real control tokens in
    cyan, an image as one word; of a record that shares its beginning with one above, only what it adds.

    Args:
        batch: what `PackingCollator` returns.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    ids, segments, paths = (batch[name].tolist() for name in ("input_ids", "cu_seqlens_q", "cu_seqlens_k"))
    ids, kv_index = ids[0], batch["kv_index"].tolist()
    images, supervised = len(set(batch["image_runs"].tolist())), len(batch["loss_targets"])
    console.print(f"one packed row of {len(ids)} positions, {images} images, {supervised} supervised positions")
    learnt = set(zip(batch["loss_positions"].tolist(), batch["loss_targets"].tolist(), strict=True))
    for (start, end), (path_start, path_end) in zip(pairwise(segments), pairwise(paths), strict=True):
        path = kv_index[path_start:path_end]
        shared = len(path) - (end - start)
        # What comes before a position on its path predicts it.
        before = {after: position for position, after in pairwise(path)}
        labels = [
            ids[position] if (before.get(position), ids[position]) in learnt else IGNORED_LABEL
            for position in range(start, end)
        ]
        count = sum(label != IGNORED_LABEL for label in labels)
        where = f", continues after position {path[shared - 1]}, sharing {shared} positions" if shared else ""
        console.print(f"\n[bold]positions {start} to {end - 1}[/bold]: {count} supervised{where}")
        console.print(_describe_tokens(ids[start:end], labels, processing, start))


def _describe_tokens(ids: list[int], labels: list[int], processing: Processing, first_position: int) -> Text:
    controls = {processing.encoder.turn_start_id, processing.encoder.turn_end_id}
    kinds = [(_kind(token, label, processing), token in controls) for token, label in zip(ids, labels, strict=True)]
    text, start = Text(), 0
    for end in range(1, len(ids) + 1):
        if end < len(ids) and kinds[end] == kinds[start]:
            continue
        (kind, is_control), follows = kinds[start], kinds[end][0] if end < len(ids) else None
        if kind == "image":
            # Images that stand side by side are one run of tokens.
            count = (end - start) // processing.tokens_per_image
            name = "image" if count == 1 else f"{count} images"
            text.append(f"<{name}: {end - start} tokens at {first_position + start}>", style=IMAGE_STYLE)
        else:
            is_supervised = kind == "supervised"
            words = processing.tokenizer.decode(ids[start:end], skip_special_tokens=False)
            opens = is_supervised and (start == 0 or kinds[start - 1][0] != kind)
            style = CONTROL_STYLE if is_control else SUPERVISED_STYLE if is_supervised else ""
            text.append("【" * opens + words, style)
            text.append("】" if is_supervised and follows != kind else "", SUPERVISED_STYLE)
        start = end
    return text


def _kind(token: int, label: int, processing: Processing) -> str:
    if token == processing.encoder.image_token_id:
        return "image"
    return "supervised" if label != IGNORED_LABEL else "prompt"
