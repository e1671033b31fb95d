"""Knows how examples become one batch. Knows nothing about files or prompts.

The collator is the only place that decides a batch's layout, so another layout is another class with the same call.
"""

from dataclasses import dataclass

import torch

from meme_llava.conversation import IGNORED_LABEL


@dataclass(frozen=True)
class PaddingCollator:
    """Pads examples on the right to the longest of the batch.

    With two examples of 5 and 3 positions, the first with one picture of 2 image tokens (I), P the pad token:

        input_ids       [[ a  I  I  b  c ]      labels  [[ -100 -100 -100  b    c   ]
                         [ d  e  f  P  P ]]              [ -100  e    f   -100 -100 ]]
        attention_mask  [[ 1  1  1  1  1 ]      pixel_values  (1, 3, size, size)
                         [ 1  1  1  0  0 ]]

    A batch without any picture carries a blank one in its padding (mask 0, no loss): with several processes all of
    them must run the vision tower in every step, or the gradient exchange waits for ever.
    """

    pad_token_id: int
    image_token_id: int
    tokens_per_image: int
    image_size: int

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """Batch `MemeDataset` items: int64 (rows, longest) tensors, pixel_values float32 (images, 3, size, size)."""
        for example in examples:
            self._check_image_tokens(example)
        pixel_values = torch.cat([example["pixel_values"] for example in examples])
        longest = max(len(example["input_ids"]) for example in examples)
        needs_blank_image = len(pixel_values) == 0
        width = longest + self.tokens_per_image * needs_blank_image
        input_ids = torch.full((len(examples), width), self.pad_token_id)
        labels = torch.full((len(examples), width), IGNORED_LABEL)
        attention_mask = torch.zeros((len(examples), width), dtype=torch.long)
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            input_ids[row, :length] = example["input_ids"]
            labels[row, :length] = example["labels"]
            attention_mask[row, :length] = 1
        if needs_blank_image:
            input_ids[0, longest:] = self.image_token_id
            pixel_values = torch.zeros(1, 3, self.image_size, self.image_size)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "pixel_values": pixel_values,
        }

    def _check_image_tokens(self, example: dict) -> None:
        # LLaVA compares only the totals of a batch: two wrong rows can cancel out and swap their pictures.
        found = int((example["input_ids"] == self.image_token_id).sum())
        expected = len(example["pixel_values"]) * self.tokens_per_image
        if found != expected:
            raise ValueError(
                f"record {example['record_id']!r} has {found} image tokens for {len(example['pixel_values'])} "
                f"picture(s) of {self.tokens_per_image}"
            )
