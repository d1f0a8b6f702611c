"""The versions that a figure depends on."""

import platform
from collections.abc import Sequence
from importlib import metadata

import torch

KERNELS = ("torch", "triton", "flash-attn", "xformers")


def versions(packages: Sequence[str] = KERNELS) -> dict[str, str]:
    """Of Python, of those packages that are installed, and of the CUDA that torch was built for."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found if torch.version.cuda is None else {**found, "cuda": torch.version.cuda}
