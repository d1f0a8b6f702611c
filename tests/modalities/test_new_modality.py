"""A modality is one class and one entry in a config: nothing else of the package changes. Here, heartbeats."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from mmgen.config import from_mapping
from mmgen.data.shards import write_shards
from mmgen.modalities import Modality
from mmgen.modalities.base import text_positions
from mmgen.sequence import Sample, Span
from mmgen.tokenization.text import train_text
from mmgen.training.metrics import read_metrics
from mmgen.training.run import RunConfig, build
from mmgen.training.trainer import train
from tests.parts import TINY


@dataclass(frozen=True)
class PulseConfig:
    length: int = 6
    loss_weight: float = 0.5


class Pulse(Modality):
    """A series of numbers from the sample's metadata, two to a token."""

    Config = PulseConfig
    channels = 2

    def encode(self, sample, place, draw):
        values = torch.tensor(sample.metadata["pulse"]).float().view(-1, 2) * self.sigma_data
        committed = self.commit(values, draw) if not place.last else None
        positions = text_positions(place.start, len(values))
        return [Span(self.name, positions, None, values, committed, (len(values),), read=not place.last)]


@pytest.mark.slow
def test_a_modality_from_an_import_path_trains_in_both_directions(tmp_path: Path):
    samples = [
        Sample(
            f"s{i}",
            "",
            {"text": ["slow", "fast"][i % 2]},
            metadata={"pulse": [float((-1) ** (j * (i % 2))) for j in range(12)]},
        )
        for i in range(20)
    ]
    write_shards(tmp_path / "data", samples, lambda _: "train", "pulses")
    train_text(["slow fast slow", "fast"] * 5, 284, tmp_path / "tokenizer", max_size=8)
    config = from_mapping(
        {
            "run": str(tmp_path / "run"),
            "tokenizer": str(tmp_path / "tokenizer"),
            "modalities": {
                "text": {},
                "pulse": {"kind": "tests.modalities.test_new_modality:Pulse", "length": 12},
            },
            "data": {
                "sources": {"pulses": {"path": str(tmp_path / "data")}},
                "compose": {"tasks": {"text pulse": 0.7, "pulse text": 0.3}},
                "pack": {"rows": 2, "context_length": 128, "state_length": 128},
            },
            "optim": {"lr": 3e-3, "warmup_steps": 5},
            "train": {"steps": 60, "precision": "float32"},
            "log": {"every": 5},
        },
        RunConfig,
    )
    config = replace(config, model=TINY)
    assert build(config).modalities["pulse"].config == PulseConfig(12)
    train(config)
    losses = [row["pulse_loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert losses[-1] < 0.7 * losses[0]
