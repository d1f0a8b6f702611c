"""What glibc is told: checked in a process of its own, since there is no taking it back."""

import subprocess
import sys

import pytest

# A step's worth of tensors, freed together: by default that much goes back to the system, to fault in again.
COUNT_FAULTS = """
import resource, sys
import torch
from mmgen.training.host import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()


def step():
    kept = [torch.ones(2**21) for _ in range(20)]


for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_tensors_are_used_again_without_page_faults():
    faults = {
        mode: int(
            subprocess.run(
                [sys.executable, "-c", COUNT_FAULTS, mode], capture_output=True, text=True, check=True
            ).stdout
        )
        for mode in ("keep", "default")
    }
    assert faults["keep"] < faults["default"] / 4
