"""The throughput benchmark: its ways compute the same loss, its data is like the published, and it runs anywhere."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import throughput  # noqa: E402
import torch
from conftest import ROOT
from throughput_data import LengthScale, assign_images, draw_caption_lengths  # noqa: E402
from throughput_devices import LiveTensors, Platform  # noqa: E402
from throughput_models import SHAPES, make_models, measure_proportions  # noqa: E402
from throughput_rounds import Bench  # noqa: E402
from throughput_ways import LADDER, PUBLISHED, Training  # noqa: E402

from meme_llava.dataset.sampling import BatchShape  # noqa: E402
from meme_llava.errors import UserError  # noqa: E402
from meme_llava.model.flops import TrainingCosts  # noqa: E402

CPU = Platform(torch.device("cpu"), torch.float32)
STEPS = 3
FULL_SCALE = LengthScale(576)
# What a machine for the GPU form may lack.
OPTIONAL = ("deepspeed", "datasets", "matplotlib", "tensorboard", "flash_attn", "liger_kernel")
RUN_WITHOUT = """
import pathlib, sys
for name in {names}:
    sys.modules[name] = None
sys.path.insert(0, {folder!r})
import throughput
throughput.CAPTIONS = pathlib.Path("none")
throughput.main({argv})
"""


@pytest.fixture(scope="module")
def workload(tmp_path_factory):
    shape = BatchShape(global_batch_size=8, device_batch_size=4, processes=1)
    folder = tmp_path_factory.mktemp("images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "CAPTIONS", folder / "none")
        workload, source = throughput.make_workload(SHAPES["tiny"], shape, STEPS, folder, seed=0)
    assert source == "the built-in histogram"
    return workload


def test_every_way_gives_the_published_losses(workload):
    models = make_models(SHAPES["tiny"], CPU, seed=0)
    losses = [throughput.compute_losses(way, models, workload, CPU, STEPS) for way in LADDER]
    assert losses[0][0] != losses[0][1]
    for own in losses[1:]:
        assert own == pytest.approx(losses[0], abs=1e-5)


def make_bench(workload, platform):
    models = make_models(SHAPES["tiny"], platform, seed=0)
    return Bench(models, workload, platform, TrainingCosts.of_model(models.packed))


@pytest.mark.long
def test_the_gpu_form_computes_in_bf16_and_reports_every_step(workload):
    # The GPU form's code but for CUDA itself: frozen weights in bf16, autocast, learning parameters in float32.
    bench = make_bench(workload, Platform(torch.device("cpu"), torch.bfloat16))
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in bench.models.plain.parameters()}
    assert dtypes == {False: torch.bfloat16, True: torch.float32}
    bench.run_rounds(1)
    rows = bench.summarise()
    positions = [row["positions_per_caption"] for row in rows]
    assert positions[0] == round(2623 * 9 / 576)
    assert positions[0] > positions[1] == positions[2] > positions[3] == positions[4]
    for row, before in zip(rows, [rows[0], *rows], strict=False):
        assert row["captions_per_second"] > 0 and row["peak_gib"] > 0
        speeds = row["captions_per_second"] / before["captions_per_second"]
        assert row["times_step_before"] == pytest.approx(speeds)


def test_ways_that_do_not_compute_the_same_stop_the_benchmark(workload, monkeypatch):
    bench = make_bench(workload, CPU)
    plain = Training.sum_losses
    monkeypatch.setattr(Training, "sum_losses", lambda self, batch: plain(self, batch) * (1 + 0.01 * self.way.packs))
    with pytest.raises(UserError, match="do not compute the same loss"):
        bench.run_rounds(1)


def recomputes(model):
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.long
def test_a_way_that_does_not_fit_is_measured_with_gradient_checkpointing_and_says_so(workload, monkeypatch, capsys):
    bench = make_bench(workload, CPU)
    step = Training.step

    def run_out_of_memory(self, *arguments, **options):
        if self.way is PUBLISHED and not recomputes(self.models.plain):
            raise torch.OutOfMemoryError("simulated")
        assert not recomputes(self.models.packed)
        return step(self, *arguments, **options)

    monkeypatch.setattr(Training, "step", run_out_of_memory)
    bench.run_rounds(1)
    rows = bench.summarise()
    throughput.print_rows(rows, bench)
    assert [row["gradient_checkpointing"] for row in rows] == [True, False, False, False, False]
    assert "published: DID NOT FIT without gradient checkpointing" in capsys.readouterr().out


@pytest.mark.long
def test_a_machine_without_optional_packages_runs_it_and_gets_every_figure(tmp_path):
    file = tmp_path / "figures.json"
    argv = ["--shapes", "tiny", "--rounds", "1", "--json", str(file)]
    argv += ["--global_batch_size", "4", "--device_batch_size", "2"]
    code = RUN_WITHOUT.format(names=OPTIONAL, argv=argv, folder=str(ROOT / "benchmarks"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    figures = json.loads(file.read_text())
    assert [row["way"] for row in figures["ways"]] == [way.name for way in LADDER]
    assert len(figures["ways"][0]["turns"]) == len(figures["ceiling_teraflops"]) == 1
    assert "+ shared images" in result.stdout


def test_lengths_are_those_of_the_published_captions():
    lengths = draw_caption_lengths(19_138, FULL_SCALE, np.random.default_rng(0))
    # The end token counts too.
    assert lengths.mean() == pytest.approx(107.25, abs=0.5)
    assert np.percentile(lengths, 95) == pytest.approx(191, abs=6)
    # Two captions had more than 2,000 tokens; beside prompt and image that is more than the padded length holds.
    assert lengths.max() == 2623 - 576 - 29


def test_shrunk_lengths_keep_their_proportion():
    scale = LengthScale(49)
    lengths = draw_caption_lengths(5_000, scale, np.random.default_rng(0))
    assert lengths.mean() == pytest.approx(107.25 * 49 / 576, rel=0.02)
    assert scale.padded_length == 223


def test_images_have_as_many_captions_as_the_published():
    images = assign_images(24_332, np.random.default_rng(0))
    counts = np.bincount(images)
    assert len(counts) == pytest.approx(10_835, abs=2)
    assert np.bincount(counts[:-1]).tolist() == pytest.approx([0, 1_595, 4_983, 4_257], abs=2)


def test_the_scaled_model_costs_what_the_real_one_costs_part_by_part():
    real = measure_proportions(SHAPES["full"], 2623, 136.25)
    own = measure_proportions(SHAPES["scaled"], 223, 136.25 * 49 / 576)
    assert own == pytest.approx(real, rel=0.1)
    assert real["vocabulary for one of the width"] == pytest.approx(152_064 / 3_584)
    # 545 million weights of the LM head beside 6.525 billion of the layers.
    assert real["LM head"] == pytest.approx(0.0835, abs=0.0001)


def test_live_tensors_count_what_is_held_at_a_time():
    weights = torch.zeros(10_000)
    with LiveTensors([weights]) as live:
        one = torch.zeros(1_000)  # 4,000 bytes
        two = one + 1
        view = two[:10]
        del one, two
        three = torch.zeros(500)
        weights += 1
        # A view keeps the whole of what it looks at.
        assert (live.bytes, live.peak_bytes) == (6_000, 8_000)
        del view, three
    assert live.bytes == 0


def test_sizes_that_do_not_divide_are_refused(capsys):
    with pytest.raises(SystemExit):
        throughput.main(["--global_batch_size", "12", "--device_batch_size", "8"])
    assert "--global_batch_size 12 is not a multiple of --device_batch_size 8" in capsys.readouterr().err
