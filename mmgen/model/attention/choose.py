"""Which backend a training takes: what `auto` means, and what is refused where it cannot run."""

from importlib.util import find_spec
from typing import Literal, NamedTuple, get_args

import torch

AttentionBackend = Literal["dense", "runs", "flex", "varlen", "flash2", "flash3", "xformers"]
AttentionChoice = Literal["auto", AttentionBackend]

PACKAGES = {
    "flex": ("triton", "comes with torch for CUDA"),
    "flash2": ("flash_attn", "pip install 'mmgen-pretrain[flash]'"),
    "flash3": ("flash_attn_interface", "install the folder hopper of github.com/Dao-AILab/flash-attention"),
    "xformers": ("xformers", "pip install 'mmgen-pretrain[xformers]'"),
}
FLASH = ("varlen", "flash2", "flash3")
FLEX_HEAD_DIM = 16  # the least that torch's kernel takes


class Choice(NamedTuple):
    backend: AttentionBackend
    why: str


def preferred(device: str, head_dim: int, precision: str) -> Choice:
    """What `auto` means for heads of `head_dim` on a kind of device ("cpu", "cuda") that has all packages."""
    if device == "cpu":
        return Choice("runs", "auto: a CPU computes what is read and no more, document by document")
    wanting = _shape_wanting("flex", head_dim, precision) if device == "cuda" else f"needs CUDA, not {device}"
    if wanting is None:
        return Choice("flex", "auto: skips what nobody reads")
    return Choice("dense", f"auto: flex {wanting}")


def choose_backend(asked: AttentionChoice, device: torch.device, head_dim: int, precision: str) -> Choice:
    """The backend that trains heads of `head_dim` in `precision` ("bf16", "float32", "float64") on `device`, and why.

    Raises ValueError where the one that is asked for cannot.
    """
    if asked == "auto":
        choice = preferred(device.type, head_dim, precision)
        wanting = _wanting(choice.backend, device, head_dim, precision)
        return choice if wanting is None else Choice("dense", f"auto: {choice.backend} {wanting}")
    wanting = _wanting(asked, device, head_dim, precision)
    if wanting is not None:
        able = [
            each for each in get_args(AttentionBackend) if _wanting(each, device, head_dim, precision) is None
        ]
        raise ValueError(f"train.attention {asked} {wanting}; here auto would do, or {', '.join(able)}")
    return Choice(asked, "as asked")


def _wanting(backend: AttentionBackend, device: torch.device, head_dim: int, precision: str) -> str | None:
    """What keeps a backend from training on a device."""
    if backend in ("dense", "runs"):
        return None
    if device.type != "cuda":
        return f"needs a CUDA device to train on, not {device.type}"
    if backend == "varlen" and torch.__version__ < "2.13":
        return f"needs torch 2.13 or later, not {torch.__version__}"
    package, source = PACKAGES.get(backend, ("torch", ""))
    if find_spec(package) is None:
        return f"needs the package {package}: {source}"
    if backend in FLASH:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0) or (backend == "flash3" and capability[0] != 9):
            generation = "Hopper (9.0)" if backend == "flash3" else "Ampere (8.0) or later"
            return f"needs a GPU of the generation {generation}, not {capability[0]}.{capability[1]}"
    return _shape_wanting(backend, head_dim, precision)


def _shape_wanting(backend: AttentionBackend, head_dim: int, precision: str) -> str | None:
    """What keeps a backend from computing heads of `head_dim` in `precision`."""
    if precision == "float64" or (backend in FLASH and precision != "bf16"):
        allowed = "bf16" if backend in FLASH else "bf16 or float32"
        return f"computes in train.precision {allowed}, not {precision}"
    if backend == "flex" and head_dim < FLEX_HEAD_DIM:
        return f"needs model.head_dim of at least {FLEX_HEAD_DIM}, not {head_dim}"
    if backend in FLASH and (head_dim % 8 or head_dim > 256):
        return f"needs model.head_dim to be a multiple of 8 up to 256, not {head_dim}"
    return None
