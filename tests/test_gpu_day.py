"""The GPU day: no row stops another, nothing that was measured is lost, and the rows themselves run on a CPU."""

import json
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_day  # noqa: E402
from gpu_day_batches import make_batch  # noqa: E402
from gpu_day_kernels import attend, draw_inputs, measure_error  # noqa: E402
from gpu_day_ladder import OURS, PUBLISHED, report  # noqa: E402
from gpu_day_model import StepBench, name_kind  # noqa: E402
from gpu_day_results import FAIL, NOT_RUN, PASS, read_results  # noqa: E402
from gpu_day_variants import half_lora, keep, stock_lora, stock_norms, without_dropout  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402
from throughput_devices import Platform  # noqa: E402
from throughput_models import SHAPES  # noqa: E402
from throughput_rounds import Turn  # noqa: E402

from meme_llava.model.packed_attention import attend_with_matmul, attend_with_sdpa  # noqa: E402

ROW_SCRIPTS = {
    "good.py": "Result('captions', figures={'ms': 12.34, 'losses': [1.0]}).print()",
    "bad.py": """
with reporting("a sum") as result:
    raise ValueError("no | such luck")
with reporting("the next one"):
    pass
""",
    "crashing.py": "Result('half of it').print(); sys.exit('the rest is missing')",
    "hanging.py": "Result('before').print(); subprocess.Popen(['sleep', '600']).wait()",
}
HEAD = f"import subprocess, sys\nsys.path.insert(0, {str(ROOT / 'benchmarks')!r})\nfrom gpu_day_results import *\n"


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Rows of our own in place of the day's."""
    for name, code in ROW_SCRIPTS.items():
        (tmp_path / name).write_text(HEAD + code)
    made = [
        gpu_day.Row(name.removesuffix(".py"), f"row {name}", str(tmp_path / name), least=1, most=4)
        for name in ROW_SCRIPTS
    ]
    late = gpu_day.Row("late", "row late", str(tmp_path / "good.py"), least=1000, most=1000)
    monkeypatch.setattr(gpu_day, "STAGES", ((made[0],), tuple(made[1:]), (late,)))
    monkeypatch.setattr(gpu_day, "ROWS", {row.name: row for row in (*made, late)})


def test_no_row_stops_another_and_every_result_is_kept(rows, tmp_path):
    output = tmp_path / "results"
    code = gpu_day.main(["--output", str(output), "--scale", "tiny", "--device", "cpu", "--minutes", "0.5"])
    assert code == 1
    found = json.loads((output / "gpu_day.json").read_text())["rows"]
    results = {name: [(one["row"], one["status"]) for one in row["results"]] for name, row in found.items()}
    assert results == {
        "good": [("captions", PASS)],
        "bad": [("a sum", FAIL), ("the next one", PASS)],
        "crashing": [("half of it", PASS), ("what followed", FAIL)],
        "hanging": [("before", PASS), ("what followed", FAIL)],
        "late": [("row late", NOT_RUN)],
    }
    assert found["bad"]["results"][0]["note"] == "ValueError: no | such luck"
    assert "the rest is missing" in found["crashing"]["results"][1]["note"]
    assert found["hanging"]["results"][1]["note"].startswith("ended after 4 s")
    table = (output / "gpu_day.md").read_text()
    assert "| captions | pass | ms 12.3 |  |" in table
    assert r"| a sum | fail |  | ValueError: no \| such luck |" in table
    assert not (output / "work").exists()
    header = json.loads((output / "gpu_day.json").read_text())
    assert "CPU cores" in header["machine"]
    flags = "--minutes 0.5 --scale tiny --device cpu --only good bad crashing hanging late"
    assert header["command"] == f"bash benchmarks/gpu_day.sh {flags}"


def test_an_interruption_ends_what_runs_and_keeps_what_was_measured(rows, tmp_path, monkeypatch):
    output = tmp_path / "results"
    starts = time.monotonic()
    original = gpu_day.RowProcess.is_over

    def interrupt(self):
        if self._row.name == "hanging" and self.seconds > 1:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(gpu_day.RowProcess, "is_over", interrupt)
    with pytest.raises(KeyboardInterrupt):
        gpu_day.main(["--output", str(output), "--scale", "tiny", "--device", "cpu", "--only", "good", "hanging"])
    assert "good" in json.loads((output / "gpu_day.json").read_text())["rows"]
    assert time.monotonic() - starts < 60


def test_full_scale_needs_a_gpu(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_day.main(["--output", str(tmp_path / "results")])
    assert "--scale tiny rehearses the day on a CPU" in capsys.readouterr().err


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("shared", [True, False])
def test_kernels_are_compared_forward_and_backward(shared, window):
    shapes = SHAPES["tiny"]
    batch = make_batch(shapes, shared_images=shared)
    inputs = draw_inputs(shapes, batch["input_ids"].shape[1])
    reference = attend(attend_with_sdpa, inputs, batch, shapes, window)
    own = attend(attend_with_matmul, inputs, batch, shapes, window)
    errors = [measure_error(*pair) for pair in zip(own, reference, strict=True)]
    assert len(errors) == 4 and max(errors) < 1e-5
    spoilt = attend(attend_with_matmul, [value * 1.01 for value in inputs], batch, shapes, window)
    assert min(measure_error(*pair) for pair in zip(spoilt, reference, strict=True)) > 5e-3


def test_a_device_batch_is_measured_and_its_variants_compute_the_same():
    bench, batch = StepBench.make("tiny", "cpu"), make_batch(SHAPES["tiny"])
    figures = bench.measure(batch)
    assert figures["positions"] == batch["input_ids"].numel() and figures["ms"] > 0
    kinds = bench.profile(batch)
    parts = sum(kinds[f"{kind}_ms"] for kind in ("gemm", "thin_gemm", "attention", "elementwise"))
    assert kinds["total_ms"] == pytest.approx(parts) and kinds["thin_gemm_ms"] > 0 and kinds["attention_ms"] > 0
    with torch.no_grad():
        for name, parameter in bench.models.packed.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    for module in bench.models.packed.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] = 1.7
    gradients = []
    for change in (keep, stock_lora, stock_norms, without_dropout):
        with change(bench):
            for parameter in bench.learning:
                parameter.grad = None
            bench.make_step(batch)()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in bench.learning]))
    assert gradients[0].norm() > 0
    for changed in gradients[1:]:
        assert measure_error(changed, gradients[0]) < 1e-4


def list_parts(bench):
    """What a variant may change of the model."""
    parts = [[kind.__name__ for kind in type(module).__mro__] for module in bench.models.packed.modules()]
    return parts, [parameter.dtype for parameter in bench.learning]


@pytest.mark.parametrize("change", [stock_lora, stock_norms, without_dropout, half_lora])
def test_a_variant_that_fails_leaves_the_model_as_it_was(change):
    bench = StepBench.make("tiny", "cpu")
    bench.platform = replace(bench.platform, dtype=torch.bfloat16)
    for module in bench.models.packed.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout["default"] = torch.nn.Dropout(0.05)
    before = list_parts(bench)
    with pytest.raises(RuntimeError), change(bench):
        assert list_parts(bench) != before
        raise RuntimeError("out of memory")
    assert list_parts(bench) == before


def test_the_ladder_is_reported_without_a_published_way_that_did_not_fit(capsys):
    bench, turn = SimpleNamespace(platform=Platform.choose("cpu")), Turn(1.0, 2.0, 10**12, 300, None)
    for turns, times in (({(OURS, False): [turn]}, None), ({(PUBLISHED, True): [turn], (OURS, False): [turn]}, 1)):
        report(bench, turns, ceiling=1e12, source="a histogram")
        results = read_results(capsys.readouterr().out)
        assert [result.status for result in results] == [PASS] * len(turns)
        assert results[-1].figures.get("times_published") == times


def test_products_with_loras_rank_are_thin():
    assert name_kind("aten::mm", [[3312, 3584], [3584, 32]]) == "thin_gemm"
    assert name_kind("aten::addmm_", [[3312, 3584], [3312, 32], [32, 3584]]) == "thin_gemm"
    assert name_kind("aten::addmm", [[1024], [2308, 1024], [1024, 4096]]) == "gemm"
    assert name_kind("aten::_flash_attention_backward", []) == "attention"
    assert name_kind("aten::mul", [[3312, 32], [3312, 32]]) == "elementwise"
