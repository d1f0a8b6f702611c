"""What the host's allocator is told before a training on the CPU."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc takes no larger one
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tells glibc to keep what is freed for the next allocation; returns whether it was told (elsewhere: no glibc).

    By default what a step frees goes back to the system once it is more than twice the largest tensor, and the next
    step pays for the page faults of fresh, zeroed pages.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
