"""Small real parts that tests share: a tokenizer, modalities on pixels, a model, samples and documents."""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Pictures

from mmgen.data.compose import ComposeConfig, compose
from mmgen.modalities import Modality, build_modalities
from mmgen.model.joint import JointConfig
from mmgen.model.model import Model
from mmgen.model.trunk import TrunkConfig
from mmgen.rng import keyed_numpy
from mmgen.sequence import Document, Sample
from mmgen.tokenization.text import TextTokenizer, train_text
from mmgen.training.checkpoint import latest_checkpoint, load_model_weights
from mmgen.training.metrics import read_metrics

WORDS = (
    "red",
    "green",
    "blue",
    "small",
    "large",
    "square",
    "circle",
    "on",
    "white",
    "a",
    "the",
    "picture",
    "of",
)
TINY = TrunkConfig(width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_width=48)


@cache
def tokenizer() -> TextTokenizer:
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS, 6)) for _ in range(200)]
    return train_text(texts, 300, Path(tempfile.mkdtemp()) / "tokenizer", max_size=8)


def modalities(**image: object) -> dict[str, Modality]:
    return build_modalities({"text": {}, "image": {"codec": "pixels", "patch": 4, **image}}, tokenizer())


def model(
    config: TrunkConfig = TINY,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    joint: JointConfig | None = None,
    **image: object,
) -> Model:
    """A model whose every parameter is random, so that nothing is hidden behind a zero."""
    torch.manual_seed(seed)
    built = Model(config, modalities(**image), tokenizer().vocab_size, joint).to(dtype)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def picture(seed: int, size: int = 16) -> Pictures.Image:
    draw = np.random.default_rng(seed)
    return Pictures.fromarray(draw.integers(0, 256, (size, size, 3), dtype=np.uint8))


def sample(seed: int, size: int = 16) -> Sample:
    draw = np.random.default_rng(seed)
    caption = " ".join(draw.choice(WORDS, int(draw.integers(2, 6))))
    return Sample(f"sample{seed}", "shard", {"text": caption}, picture(seed, size))


def documents(count: int, task: str = "text image", drop: float = 0.0, **image: object) -> list[Document]:
    config = ComposeConfig({task: 1.0}, drop)
    return [compose(sample(i), config, modalities(**image), keyed_numpy(i)) for i in range(count)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The averaged and the plain weights of the latest checkpoint."""
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    return {
        f"{which}.{name}": w
        for which in ("model", "ema")
        for name, w in load_model_weights(checkpoint, which).items()
    }


def rows(run: Path) -> list[dict]:
    """Metrics without the one thing that is allowed to differ."""
    return [
        {
            k: v
            for k, v in row.items()
            if not k.endswith("_per_second") and k not in ("data_wait", "memory_gb")
        }
        for row in read_metrics(run / "metrics.jsonl")
    ]
