"""The chain from towers to an answer under several releases of transformers, in an environment of their own each."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, read_losses

# The oldest and the newest that requirements.txt allows, and one between; with what each needs instead of ours.
RELEASES = {
    "5.17.0": ["transformers==5.17.0", "huggingface_hub>=1.5,<2"],
    "5.20.2": ["transformers==5.20.2"],
    "5.24.0": ["transformers==5.24.0"],
}
DATA = ["--annotations", "data/annotations.json", "--image_folder", "data"]
RECIPE = [
    "--train_type",
    "lora",
    "--num_train_epochs",
    "1",
    "--max_steps",
    "3",
    "--high_lr",
    "2e-3",
    "--low_lr",
    "5e-4",
]
RECIPE += ["--warmup_ratio", "0", "--lora_r", "8", "--lora_alpha", "16", "--model_max_length", "512"]
RECIPE += ["--global_batch_size", "8", "--device_batch_size", "8", "--report_to", "none"]


def run_chain(folder, packages=None) -> tuple[list[float], str]:
    """Losses and answers of the embedded towers, with the packages of a folder before those of this environment."""
    before = [] if packages is None else [str(packages)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*before, str(ROOT)]), "HF_HUB_OFFLINE": "1"}
    towers = ["--language_model", "data/tiny/language_model", "--vision_model", "data/tiny/vision_tower"]
    commands = [
        ["build_base_model.py", *towers, "--image_policy", "squash", "--output_dir", folder / "base"],
        ["train.py", "--model", folder / "base", *DATA, "--output_dir", folder / "train", *RECIPE],
        ["merge_lora.py", "--adapter", folder / "train", "--output_dir", folder / "merged"],
        ["infer.py", "--model", folder / "merged", *DATA, "--limit", "4"],
    ]
    for command in commands:
        words = [sys.executable, *map(str, command)]
        result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
        assert result.returncode == 0, result.stdout + result.stderr
    return read_losses(folder / "train"), result.stdout


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return run_chain(tmp_path_factory.mktemp("ours"))


@pytest.mark.long
@pytest.mark.parametrize("release", RELEASES)
def test_other_releases_train_merge_and_answer_the_same(ours, tmp_path, release):
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "packages")]
    result = subprocess.run([sys.executable, *install, *RELEASES[release]], capture_output=True, text=True)
    if result.returncode != 0:
        pytest.skip(f"transformers {release} cannot be downloaded: {result.stderr.splitlines()[-1]}")
    losses, answers = run_chain(tmp_path, tmp_path / "packages")
    assert losses == pytest.approx(ours[0], abs=1e-5)
    assert answers == ours[1]
