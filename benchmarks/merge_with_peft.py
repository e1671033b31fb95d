"""Merges an adapter the way peft's documentation does it, whole models in memory; full_size.py compares with it.

python benchmarks/merge_with_peft.py --base BASE --adapter ADAPTER --output_dir MERGED
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from transformers import LlavaForConditionalGeneration

parser = argparse.ArgumentParser(
    description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
)
for name in ("base", "adapter", "output_dir"):
    parser.add_argument(f"--{name}", type=Path, required=True)
arguments = parser.parse_args()
model = LlavaForConditionalGeneration.from_pretrained(arguments.base, dtype=torch.bfloat16, local_files_only=True)
model = PeftModel.from_pretrained(model, arguments.adapter, local_files_only=True).merge_and_unload()
model.save_pretrained(arguments.output_dir, max_shard_size="5GB")
