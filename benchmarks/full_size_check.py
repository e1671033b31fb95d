"""Checks an assembled and a merged model of full_size.py bit for bit, with safetensors and plain arithmetic alone.

Nothing of the product is used here, names included: what is checked must not check itself.

    python benchmarks/full_size_check.py --language_model L --vision_model V --base B --adapter A --merged M

Prints the findings as JSON; exits 1 if a tensor differs.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import safe_open

# (in the assembled and merged files, in the adapter)
ADAPTER_PREFIXES = (
    ("language_model.model.", "base_model.model.model.language_model."),
    ("vision_tower.vision_model.", "base_model.model.model.vision_tower."),
    ("multi_modal_projector.", "base_model.model.model.multi_modal_projector."),
)


def open_tensors(folder: Path) -> dict:
    """Every tensor name of a folder with the open file that holds it."""
    files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
    return {name: file for file in files for name in file.keys()}


def is_same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether shape, dtype and every bit agree."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (found, expected)))


def check_assembled(language_folder: Path, vision_folder: Path, base_folder: Path) -> dict:
    """Compare every tensor of the base with its source; the fresh projector alone has none."""
    base = open_tensors(base_folder)
    language = open_tensors(language_folder)
    vision = torch.load(vision_folder / "pytorch_model.bin", mmap=True, weights_only=True)
    vision = {name: tensor for name, tensor in vision.items() if name.startswith("vision_model.")}
    sources = {f"language_model.{name}": lambda n=name: language[n].get_tensor(n) for name in language}
    sources |= {f"vision_tower.{name}": lambda n=name: vision[n] for name in vision}
    projector = {name for name in base if name.startswith("multi_modal_projector.")}
    problems = [f"{name} is in one of source and base only" for name in (set(base) - projector) ^ set(sources)]
    shared = sorted(set(base) & set(sources))
    problems += [
        f"{name} differs from its source"
        for name in shared
        if not is_same(base[name].get_tensor(name), sources[name]())
    ]
    return {"language_tensors": len(language), "vision_tensors": len(vision), "problems": problems}


def check_merged(base_folder: Path, adapter_folder: Path, merged_folder: Path) -> dict:
    """Compare tensors of every kind, in the first, middle and last layer, with a float32 merge rounded once."""
    base, merged, adapter = (open_tensors(folder) for folder in (base_folder, merged_folder, adapter_folder))
    config = json.loads((adapter_folder / "adapter_config.json").read_text(encoding="utf-8"))
    scale = config["lora_alpha"] / config["r"]
    problems = [f"{name} is in one of base and merged only" for name in set(base) ^ set(merged)]
    problems += [
        f"{name} is stored as {file.get_slice(name).get_dtype()}"
        for name, file in merged.items()
        if file.get_slice(name).get_dtype() != "F16"
    ]
    layers = defaultdict(list)
    for name in base:
        layer = re.search(r"\.layers\.(\d+)\.", name)
        layers[re.sub(r"\.layers\.\d+\.", ".layers.N.", name)].append((int(layer[1]) if layer else 0, name))
    kinds = {}
    for kind, places in sorted(layers.items()):
        places.sort()
        # Behind the last layer but one no vision layer learns, so its middle and last but one count as well.
        sampled = sorted({places[index] for index in (0, len(places) // 2, max(0, len(places) - 2), len(places) - 1)})
        learned = 0
        for _, name in sampled:
            expected, has_learned = merge_plainly(name, base, adapter, scale)
            learned += has_learned
            if name in merged and not is_same(merged[name].get_tensor(name), expected):
                problems.append(f"{name} differs from the float32 reference")
            if has_learned and is_same(base[name].get_tensor(name).to(torch.float16), expected):
                problems.append(f"{name}: training changed nothing, so this proves nothing")
        kinds[kind] = {"layers": [layer for layer, _ in sampled], "checked": len(sampled), "learned": learned}
    return {"tensors": len(merged), "checked": sum(k["checked"] for k in kinds.values()), "kinds": kinds} | {
        "problems": problems
    }


def merge_plainly(name: str, base: dict, adapter: dict, scale: float) -> tuple[torch.Tensor, bool]:
    """The float16 tensor that merging must give, and whether training reached it."""
    weight = base[name].get_tensor(name)
    for prefix, in_adapter in ADAPTER_PREFIXES:
        if name.startswith(prefix):
            trained = in_adapter + name.removeprefix(prefix)
            if trained in adapter:
                return adapter[trained].get_tensor(trained).to(torch.float16), True
            first, second = (f"{trained.removesuffix('.weight')}.lora_{half}.weight" for half in "AB")
            if first in adapter:
                a, b = adapter[first].get_tensor(first), adapter[second].get_tensor(second)
                return (weight.float() + (b.float() @ a.float()) * scale).to(torch.float16), True
    return weight.float().to(torch.float16), False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("language_model", "vision_model", "base", "adapter", "merged"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    findings = {
        "assembled": check_assembled(arguments.language_model, arguments.vision_model, arguments.base),
        "merged": check_merged(arguments.base, arguments.adapter, arguments.merged),
    }
    print(json.dumps(findings))
    sys.exit(1 if any(part["problems"] for part in findings.values()) else 0)


if __name__ == "__main__":
    main()
