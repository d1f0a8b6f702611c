"""What glibc is told: checked in a process of its own, since there is no taking it back."""

import ctypes
import subprocess
import sys

import pytest

# How much of 128 MiB of freed tensors the allocator still holds, by its own count (malloc.h, mallinfo2).
HELD = """
import ctypes, sys
import torch
from mmgen.training.host import keep_freed_memory


class Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo2
if sys.argv[1] == "keep":
    assert keep_freed_memory()
tensors = [torch.ones(2**22) for _ in range(8)]
before = libc.mallinfo2().fordblks
del tensors
print(libc.mallinfo2().fordblks - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="glibc's allocator, 2.33 or later",
)
def test_freed_tensors_stay_with_the_allocator():
    held = {
        mode: int(
            subprocess.run(
                [sys.executable, "-c", HELD, mode], capture_output=True, text=True, check=True
            ).stdout
        )
        for mode in ("keep", "default")
    }
    assert held["keep"] >= 8 * 2**24
    assert held["default"] < 2**24
