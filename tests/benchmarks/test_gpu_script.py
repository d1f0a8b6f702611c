"""The script that a GPU is measured with, where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"


def call(*arguments: str, quick: bool) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"QUICK": "1"} if quick else {}
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=environment)


def test_what_it_cannot_do_is_said():
    other = call("everything", quick=True)
    assert other.returncode == 2
    assert "part 'everything' must be one of: tests kernels train imm latency sample loader" in other.stderr
    without = call("train", quick=False)
    assert without.returncode == 2 and "no GPU here" in without.stderr


@pytest.mark.slow
def test_a_part_is_written_to_its_folder(tmp_path: Path):
    done = call("train", str(tmp_path), quick=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "train_smoke.json").read_text())["steps_timed"] == 2
