"""A real run that the tests of several commands share."""

from pathlib import Path

import pytest

from mmgen.data.compose import ComposeConfig
from mmgen.data.loader import DataConfig
from mmgen.data.pack import PackConfig
from mmgen.data.shards import write_shards
from mmgen.data.source import SourceConfig
from mmgen.tokenization.text import train_text
from mmgen.training.run import CheckpointConfig, RunConfig, TrainConfig
from mmgen.training.trainer import train
from tests.parts import TINY, WORDS, sample


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    members = [sample(i) for i in range(24)]
    write_shards(folder / "data", members, lambda s: "test" if int(s.key[6:]) % 3 == 0 else "train", "test")
    train_text([" ".join(WORDS)] * 20, 300, folder / "tokenizer", max_size=8)
    config = RunConfig(
        run=str(folder / "run"),
        tokenizer=str(folder / "tokenizer"),
        size=(16, 16),
        modalities={"text": {}, "image": {"codec": "pixels", "patch": 4}},
        model=TINY,
        data=DataConfig(
            {"set": SourceConfig(str(folder / "data"))},
            ComposeConfig({"text image": 1.0}),
            PackConfig(1, 128, 128),
        ),
        train=TrainConfig(steps=1, precision="float32", workers=0),
        checkpoint=CheckpointConfig(every=1),
    )
    train(config)
    return folder / "run"
