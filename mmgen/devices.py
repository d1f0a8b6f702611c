"""Published figures of accelerators: what a training loop divides by for its MFU, and what an estimate plans with.

Figures are the vendor's datasheets' (NVIDIA's, of A100, H100, H200, HGX B200 and L40S, and the Ada whitepaper for the
RTX 4090), never measured here. Peaks are DENSE: where a sheet names the sparse figure, half of it.
"""

import re
from dataclasses import dataclass

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Device:
    """One accelerator. Bandwidths are bytes a second; that of the link to its neighbours is of one direction."""

    name: str
    peak: float
    """dense operations a second of bfloat16 products with float32 sums"""
    memory: float
    """bytes; the sheet's GB are taken as 10^9, and drivers show up to 7 % more"""
    memory_bandwidth: float
    link_bandwidth: float
    """NVLink, or PCIe 4.0 x16 where there is none"""
    called: str
    """regular expression of the whole of what `torch.cuda.get_device_name` says"""


DEVICES = {
    device.name: device
    for device in (
        Device("a100-40", 312 * TERA, 40 * GIGA, 1555 * GIGA, 300 * GIGA, r"A100-(SXM4|PCIE)-40GB"),
        Device("a100-80", 312 * TERA, 80 * GIGA, 2039 * GIGA, 300 * GIGA, r"A100(-SXM4-80GB| 80GB PCIe)"),
        Device("h100", 989.4 * TERA, 80 * GIGA, 3350 * GIGA, 450 * GIGA, r"H100 80GB HBM3"),
        Device("h200", 989.4 * TERA, 141 * GIGA, 4800 * GIGA, 450 * GIGA, r"H200"),
        Device("b200", 2250 * TERA, 180 * GIGA, 8000 * GIGA, 900 * GIGA, r"B200"),
        Device("l40s", 362 * TERA, 48 * GIGA, 864 * GIGA, 32 * GIGA, r"L40S"),
        Device("rtx4090", 165.2 * TERA, 24 * GIGA, 1008 * GIGA, 32 * GIGA, r"GeForce RTX 4090"),
    )
}


def find_device(name: str) -> Device:
    """The device of a short name (`h200`). Raises ValueError for an unknown one."""
    if name not in DEVICES:
        raise ValueError(f"device {name!r} is not known; there are {', '.join(DEVICES)}")
    return DEVICES[name]


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 operations a second of what `torch.cuda.get_device_name` calls `device_name`.

    None for any other: a variant (PCIe, NVL, laptop, a MIG slice) has a peak of its own, and a wrong one would make
    the MFU wrong without a sign.
    """
    for device in DEVICES.values():
        if re.fullmatch(rf"(NVIDIA )?{device.called}", device_name.strip()):
            return device.peak
    return None
