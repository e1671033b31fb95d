"""Measures building and merging at full size beside `cp -r` of the same bytes, in one run, without a GPU or a hub.

The checkpoints are random, but of Qwen2-7B-Instruct's and Chinese-CLIP ViT-L/14-336's shapes, dtypes and files, with an
r=32 adapter for the model that they make. Every step is a process of its own. Measured are wall time, peak RSS, and
peak anonymous RSS: the memory that a step cannot share with the page cache, children counted.

    python benchmarks/full_size.py --work_dir FOLDER --output full_size.json
    python benchmarks/full_size.py --work_dir FOLDER --scale tiny        # every step in about two minutes

The assembly and the merge write without verification here; what verification costs is a row of its own. Our steps and
cp take turns, after a copy that is not counted: memory and disk blocks used for the first time can be slow. On a file
system whose copies share blocks (Btrfs, XFS) cp copies nothing, and its ratios say nothing.

Exits 1 if a merged or assembled tensor is not what plain arithmetic gives, or if verification or infer.py fails.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from full_size_runs import GB, TAIL, Bench, Run, read_kilobytes  # noqa: E402

from meme_llava.errors import UserError, stop_on_user_error  # noqa: E402

BENCHMARKS = ROOT / "benchmarks"
MEME = ROOT / "data" / "images" / "meme_000000.jpg"
OPTIONAL_STEPS = ("check", "infer", "verify", "peft")
SOURCES = ("language_model", "vision_tower")
MADE = (*SOURCES, "base", "adapter", "merged", "copy", "logs")
LIBRARIES = ("torch", "transformers", "peft", "safetensors")
OTHER_BYTES = GB  # adapter, projector, tokenizers, logs
ROWS = {
    "cp_sources": "`cp -r` of language model and vision tower",
    "cp_sources_sync": "`sync` of that copy",
    "assembly": "`build_base_model.py --no_verify`",
    "assembly_sync": "`sync` of the base",
    "cp_base": "`cp -r` of the base",
    "cp_base_sync": "`sync` of that copy",
    "merge": "`merge_lora.py --no_verify`, float16",
    "merge_sync": "`sync` of the merged model",
    "verify": "`merge_lora.py` with verification",
    "infer": "`infer.py`, one meme, 8 tokens, bfloat16",
    "peft": "peft: load in bfloat16, `merge_and_unload`, save",
}
COPIES = {"assembly": "cp_sources", "merge": "cp_base"}
# What we want to reach: (times cp, GB of anonymous memory).
BARS = {"assembly": (1.5, 1.5), "merge": (2.5, 2.0), "verify": (None, 8.0), "infer": (None, 18.0)}


@contextlib.contextmanager
def open_work_folder(work_dir: Path, keep: bool) -> Iterator[None]:
    """Make the folder if need be, and in the end remove what was not there before."""
    is_new = not work_dir.exists()
    work_dir.mkdir(parents=True, exist_ok=True)
    names = [name for name in MADE if not (work_dir / name).exists()]
    try:
        yield
    finally:
        for name in names:
            # Steps that are stopped leave a hidden folder behind.
            shutil.rmtree(work_dir / f".{name}.incomplete", ignore_errors=True)
            if not keep:
                shutil.rmtree(work_dir / name, ignore_errors=True)
        if is_new and not keep:
            with contextlib.suppress(OSError):
                work_dir.rmdir()


def check_work_folder(work_dir: Path, scale: str) -> None:
    """Stop where old results are in the way or the disk is too small; sources of an earlier run are used again."""
    if left := [name for name in MADE if name not in SOURCES and (work_dir / name).exists()]:
        raise UserError(f"{work_dir}: already holds {', '.join(left)}; delete them or choose another --work_dir")
    sizes_command = [sys.executable, BENCHMARKS / "full_size_models.py", "sizes", "--scale", scale]
    sizes = json.loads(subprocess.run(sizes_command, stdout=subprocess.PIPE, check=True).stdout)
    # The sources, the base, and either a copy or a merged model.
    needed = 2 * (sizes["language_model"] + sizes["vision_tower"]) + OTHER_BYTES
    for name in SOURCES:
        record = work_dir / name / "benchmark_scale.json"
        if record.is_file() and json.loads(record.read_text())["scale"] == scale:
            print(f"{name}: taken as it lies in {work_dir}, whatever --seed and --tokenizer say")
        elif record.parent.exists():
            raise UserError(f"{record.parent}: was not made for --scale {scale}; delete it or take another --work_dir")
        else:
            needed += sizes[name]
    existing = next(path for path in (work_dir.absolute(), *work_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    print(f"disk: about {needed / GB:.0f} GB more are needed, {free / GB:.0f} GB are free", flush=True)
    if free < needed:
        raise UserError(f"{work_dir}: needs about {needed / GB:.0f} GB, but only {free / GB:.0f} GB are free")


def measure(bench: Bench, arguments: argparse.Namespace) -> dict:
    """Make the models and run every step. Returns what the check found, empty if it is skipped."""
    names = (*SOURCES, "base", "adapter", "merged", "copy")
    language_model, vision_tower, base, adapter, merged, copy = (bench.work_dir / name for name in names)
    models, merge_script, seed = BENCHMARKS / "full_size_models.py", ROOT / "merge_lora.py", arguments.seed
    for folder in (language_model, vision_tower):
        if not folder.exists():
            flags = ["--folder", folder, "--scale", arguments.scale, "--seed", seed]
            if arguments.tokenizer is not None and folder == language_model:
                flags += ["--tokenizer", arguments.tokenizer]
            bench.run_script(f"make_{folder.name}", models, folder.name, *flags)

    sources = ("--language_model", language_model, "--vision_model", vision_tower)
    assembly = (ROOT / "build_base_model.py", *sources, "--no_verify")
    take_turns(bench, arguments.repeats, "assembly", assembly, base, [language_model, vision_tower])
    bench.run_script("make_adapter", models, "adapter", "--folder", adapter, "--base", base, "--seed", seed)
    trained = ("--base", base, "--adapter", adapter)
    if "peft" not in arguments.skip:
        script, limit = BENCHMARKS / "merge_with_peft.py", arguments.peft_memory_gb * GB
        bench.run_script("peft", script, *trained, "--output_dir", copy, memory_limit=limit, may_fail=True)
        bench.remove(copy)
    take_turns(bench, arguments.repeats, "merge", (merge_script, "--adapter", adapter, "--no_verify"), merged, [base])

    check = {}
    if "check" not in arguments.skip:
        flags = (*sources, *trained, "--merged", merged)
        check = read_findings(bench.run_script("check", BENCHMARKS / "full_size_check.py", *flags, may_fail=True))
    if "infer" not in arguments.skip:
        flags = ("--model", merged, "--dtype", "bfloat16", "--device", "cpu", "--image", MEME)
        bench.run_script("infer", ROOT / "infer.py", *flags, "--max_new_tokens", 8, "--json", may_fail=True)
    if "verify" not in arguments.skip:
        bench.remove(merged)
        bench.run_script("verify", merge_script, "--adapter", adapter, "--output_dir", merged, may_fail=True)
    return check


def take_turns(bench: Bench, repeats: int, step: str, script: tuple, output: Path, copied: list[Path]) -> None:
    """Measure cp and one of our steps by turns, after a copy that does not count; the last output stays."""
    copy = bench.work_dir / "copy"
    for turn in range(repeats + 1):
        cp_step = COPIES[step] if turn else "warm_up"
        # Gone from the page cache too, so that both find the same pages there.
        bench.remove(output)
        copy.mkdir()
        bench.run(cp_step, ["cp", "-r", *copied, copy])
        bench.sync(f"{cp_step}_sync", copy)
        bench.remove(copy)
        if turn:
            bench.run_script(step, *script, "--output_dir", output)
            bench.sync(f"{step}_sync", output)


def read_findings(run: Run) -> dict:
    """The JSON line of full_size_check.py."""
    lines = [line for line in run.output.splitlines() if line.startswith("{")]
    if not lines:
        raise UserError(f"check: {run.note}; its output ends with\n{run.output[-TAIL:]}")
    return json.loads(lines[-1])


def describe_machine(work_dir: Path) -> str:
    """CPU, memory, file system, date and versions, in one line."""
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "CPU")
    memory = read_kilobytes("/proc/meminfo", "MemTotal") / 1024**2
    kind = subprocess.run(["df", "--output=fstype", work_dir], capture_output=True, text=True).stdout.split()[-1]
    commit = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return (
        f"{cpu}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB RAM, {kind}, Linux {platform.release()}; "
        f"{datetime.now():%Y-%m-%d}; Python {platform.python_version()}, {libraries}; "
        f"commit {commit.stdout.strip() or 'unknown'}"
    )


def describe_table(bench: Bench) -> list[str]:
    """The results as a Markdown table: median times, largest peaks."""
    lines = [
        "| step | time | × cp | × cp, both with sync | peak RSS | peak anonymous RSS |",
        "|---|---|---|---|---|---|",
    ]
    for step, title in ROWS.items():
        if not (runs := bench.list_runs(step)):
            continue
        seconds = [run.seconds for run in runs]
        digits = 1 if max(seconds) >= 1 else 3
        time_cell = f"{statistics.median(seconds):.{digits}f} s"
        if len(seconds) > 1:
            time_cell += f" ({min(seconds):.{digits}f} to {max(seconds):.{digits}f})"
        ratios = [
            f"{bench.compare(step, COPIES[step], with_sync):.2f}" if step in COPIES else ""
            for with_sync in (False, True)
        ]
        peaks = [max(getattr(run, name) for run in runs) / GB for name in ("peak_rss", "peak_anonymous")]
        notes = "".join(f", {note}" for note in sorted({run.note for run in runs if run.note}))
        lines.append(f"| {title}{notes} | {time_cell} | {' | '.join(ratios)} | {peaks[0]:.2f} GB | {peaks[1]:.2f} GB |")
    return lines


def describe_bars(bench: Bench) -> list[str]:
    """For every bar, what was reached."""
    lines = []
    for step, (ratio_bar, memory_bar) in BARS.items():
        if not (runs := bench.list_runs(step)):
            continue
        if any(run.exit_code for run in runs):
            lines.append(f"- {step}: {runs[-1].note}")
            continue
        if ratio_bar is not None:
            plain, synced = (bench.compare(step, COPIES[step], with_sync) for with_sync in (False, True))
            verdicts = ["met" if ratio <= ratio_bar else "missed" for ratio in (plain, synced)]
            lines.append(
                f"- {step}, at most {ratio_bar:g} × cp: {plain:.2f}, {verdicts[0]}; "
                f"both with sync {synced:.2f}, {verdicts[1]}"
            )
        peak = max(run.peak_anonymous for run in runs) / GB
        verdict = "met" if peak <= memory_bar else "missed"
        lines.append(f"- {step}, at most {memory_bar:g} GB of anonymous memory: {peak:.2f} GB, {verdict}")
    return lines


def describe_check(check: dict) -> list[str]:
    """What was compared bit for bit, and what differs."""
    assembled, merged = check["assembled"], check["merged"]
    problems = assembled["problems"] + merged["problems"]
    learned = sum(kind["learned"] for kind in merged["kinds"].values())
    return [
        f"- assembled: all {assembled['language_tensors']} tensors of the language model and all "
        f"{assembled['vision_tensors']} of the vision tower compared byte for byte with their sources",
        f"- merged: {merged['checked']} of {merged['tensors']} tensors, of all {len(merged['kinds'])} kinds, {learned} "
        "of them trained, compared bit for bit with a float32 merge rounded once",
        *(f"- wrong: {problem}" for problem in problems[:20]),
        f"- {len(problems)} problems" if problems else "- no difference",
    ]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work_dir", type=Path, required=True, help="gets the models, about 50 GB at full scale")
    parser.add_argument("--scale", choices=("full", "tiny"), default="full", help="tiny tries all steps in minutes")
    parser.add_argument("--tokenizer", type=Path, help="folder with Qwen's tokenizer files; else a small one is made")
    parser.add_argument("--repeats", type=int, default=2, help="how often cp and our steps take turns (2)")
    parser.add_argument("--seed", type=int, default=0, help="draws all weights (0)")
    parser.add_argument("--skip", nargs="+", choices=OPTIONAL_STEPS, default=[], help="leave these steps out")
    memory = read_kilobytes("/proc/meminfo", "MemTotal") * 1024 / GB - 1
    parser.add_argument(
        "--peft_memory_gb", type=float, default=memory, help=f"peft is killed above it (RAM less 1: {memory:.1f})"
    )
    parser.add_argument("--keep", action="store_true", help="leave the models in --work_dir")
    parser.add_argument("--output", type=Path, help="JSON file for the table and all single figures")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        parser.error(f"--repeats is {arguments.repeats}, expected at least 1")
    if arguments.output is not None and not arguments.output.absolute().parent.is_dir():
        parser.error(f"--output {arguments.output}: its folder does not exist")
    return arguments


def stop_on_signal(*_) -> None:
    raise KeyboardInterrupt


@stop_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    signal.signal(signal.SIGTERM, stop_on_signal)
    check_work_folder(arguments.work_dir, arguments.scale)
    bench = Bench(arguments.work_dir.absolute())
    with open_work_folder(bench.work_dir, arguments.keep):
        machine = describe_machine(bench.work_dir)
        check = measure(bench, arguments)
    table = describe_table(bench)
    bars = describe_bars(bench) if arguments.scale == "full" else ["- they are for --scale full"]
    checked = describe_check(check) if check else ["- skipped"]
    report = [machine, "", *table, "", "Bars:", "", *bars, "", "Check:", "", *checked]
    print("\n".join(["", *report]))
    if arguments.output is not None:
        results = {
            "accelerator": machine,
            "settings": {name: str(v) if isinstance(v, Path) else v for name, v in vars(arguments).items()},
            "report": report,
            "check": check,
            "runs": [asdict(run) | {"output": run.output[-TAIL:]} for run in bench.runs],
        }
        arguments.output.write_text(json.dumps(results, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    problems = [problem for part in check.values() for problem in part["problems"]]
    failed = [run for step in ("verify", "infer") for run in bench.list_runs(step) if run.exit_code]
    for run in failed:
        print(f"{run.step}: {run.note}; its output ends with\n{run.output[-TAIL:]}", file=sys.stderr)
    if problems or failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
