"""The peaks that utilization is measured against: the dense ones, of exactly the device that torch names."""

import pytest

from mmgen.devices import find_device, peak_flops


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("A100-SXM4-40GB", 312),  # older drivers
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_a_device_that_torch_names_has_its_dense_peak(name: str, tera: float) -> None:
    assert peak_flops(name) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H20",
        "NVIDIA H200 NVL",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GB200",
        "NVIDIA GH200 480GB",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "AMD Instinct MI300X",
        "cpu",
        "",
    ],
)
def test_a_near_namesake_has_none(name: str) -> None:
    assert peak_flops(name) is None


def test_an_unknown_device_is_one_line_that_lists_the_known() -> None:
    assert find_device("h200").memory == 141e9
    with pytest.raises(
        ValueError, match="device 'h300' is not known; there are a100-40, a100-80, h100, h200"
    ):
        find_device("h300")
