"""The step as a GPU runs it, on a GPU without contents: all of it stays there, and in how many kernels."""

import json
import subprocess
import sys

from conftest import ROOT

# In a process of its own: the GPU without contents becomes that process's accelerator.
SCRIPT = """
import json, sys
sys.path[:0] = ["benchmarks", "."]
import torch
import fake_gpu, step_traffic
from throughput_models import SHAPES
found = []
shapes = SHAPES["tiny"]
for has_images in (True, False):
    batch = step_traffic.make_batch(shapes, has_images=has_images)
    for recomputes in (True, False) if has_images else (False,):
        # Torch's autocast for devices written in Python ends the process where layers are computed again.
        for autocast in (False,) if recomputes else (True, False):
            model, mode = step_traffic.make_model(shapes, 2, 2, 0.05, recomputes, None if autocast else torch.bfloat16)
            traffic, constants = fake_gpu.run_step(model, batch, mode, autocast)
            evaluated = fake_gpu.evaluate_step(model, batch, mode, autocast)
            found.append({
                "constants": constants,
                "in_main_memory": sorted(traffic.in_main_memory | evaluated.in_main_memory),
                "kernels": sum(traffic.kernels.values()),
                "elementwise_bytes": traffic.bytes["elementwise"],
                "is_plain": has_images and not recomputes and not autocast,
            })
print(json.dumps(found))
"""


def test_the_step_stays_on_the_gpu_and_waits_for_nothing():
    result = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    cases = json.loads(result.stdout.splitlines()[-1])
    assert len(cases) == 5
    assert {case["constants"] for case in cases} == {0}
    assert [case["in_main_memory"] for case in cases] == [[]] * 5
    (plain,) = [case for case in cases if case["is_plain"]]
    assert plain["kernels"] <= 600
    assert plain["elementwise_bytes"] <= 75_000_000
