"""What every test runs under: one torch thread per worker, and nothing that reaches out of the machine."""

import os
from pathlib import Path

# Before torch is imported: workers run side by side and would fight over the cores otherwise.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch
from hypothesis import settings

# no limit on the time of an example: a busy machine is no failure
settings.register_profile("mmgen", deadline=None)
settings.load_profile("mmgen")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--imm-vectors",
        metavar="PATH",
        type=Path,
        default=Path(__file__).parent / "data" / "imm_vectors.npz",
        help="the reference values that tests/conformance holds IMM to (default: tests/data/imm_vectors.npz)",
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.option.imm_vectors
    if not path.is_file():
        raise pytest.UsageError(f"--imm-vectors {path}: no such file")


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
