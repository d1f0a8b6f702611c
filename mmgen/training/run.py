"""A run: its whole configuration, the parts built from it, and a finished run loaded for sampling."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmgen.config import load_yaml, save_yaml
from mmgen.data.loader import DataConfig
from mmgen.data.streams import SourceConfig
from mmgen.modalities import Image, Modality, build_modalities
from mmgen.model.attention import AttentionChoice
from mmgen.model.joint import JointConfig
from mmgen.model.model import Model
from mmgen.model.trunk import Checkpointing, TrunkConfig
from mmgen.objectives import (
    FlowMatchingConfig,
    Objective,
    ObjectiveConfig,
    build_objective,
    check_modalities,
)
from mmgen.sampling.plan import Plan
from mmgen.sampling.sampler import Sampler, SamplingPrecision
from mmgen.tokenization.text import TextTokenizer, load_text_tokenizer, outline_text_tokenizer
from mmgen.training.checkpoint import latest_checkpoint, load_model_weights, save_checkpoint
from mmgen.training.metrics import LogConfig
from mmgen.training.optim import OptimConfig
from mmgen.training.ranks import default_device

CONFIG_NAME = "config.yaml"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class PreviewConfig:
    """Pictures drawn during training with the averaged weights: a row for each number of steps."""

    every: int = 0
    """steps between previews; 0 draws none"""
    prompts: tuple[str, ...] = ()
    steps: tuple[int, ...] = (1, 4)
    guidance: float = 2.0

    def __post_init__(self) -> None:
        if self.every and (not self.steps or min(self.steps) < 1):
            raise ValueError(f"steps {list(self.steps)} must be one or more numbers of at least 1")


@dataclass(frozen=True)
class ValidationConfig:
    """Losses on held-out sources with the averaged weights; the same draws every time."""

    every: int = 0
    """steps between validations; 0 makes none"""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    batches: int = 4
    pictures: int = 0
    """also draw so many held-out prompts, and report KID-lite0 of the pictures; 0 draws none"""
    steps: tuple[int, ...] = (1, 4)
    """refinement steps of these pictures, each a figure of its own; the rest is `plan`"""

    def __post_init__(self) -> None:
        if self.pictures < 0 or self.pictures == 1 or not self.steps or min(self.steps) < 1:
            raise ValueError(
                f"pictures {self.pictures} must be 0 or at least 2, steps {list(self.steps)} at least 1 each"
            )
        if self.every and (not self.sources or self.batches < 1):
            raise ValueError(
                "every is set, so sources must name at least one source, and batches be at least 1"
            )


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 1000
    """steps between checkpoints; there is always one at the end"""
    keep_last: int = 2
    milestones: int = 0
    """checkpoints at multiples of this many steps are kept for good; 0 keeps none"""
    background: bool = False
    """write them in a thread beside the next steps, from copies in the host's memory"""

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep_last < 1:
            raise ValueError(f"every {self.every} and keep_last {self.keep_last} must be at least 1")


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    precision: str = "bf16"
    """bf16 (autocast: matrix products in bfloat16, the rest in float32), float32 or float64"""
    attention: AttentionChoice = "auto"
    """how attention is computed; auto: runs on a CPU, flex on a GPU, and dense where flex cannot (docs/attention.md)"""
    compile: bool = False
    """torch.compile the trunk's block, once for all layers; needs dense or flex attention"""
    checkpointing: Checkpointing = "none"
    """what of a block is computed again in the backward pass: none, selective (all but the results of matrix products
    and attention) or full"""
    micro_batches: int = 1
    """packed batches of an optimizer step, shared by the ranks; where a rank has several, gradients accumulate"""
    replicas: int = 1
    """groups of ranks that each hold the weights once, sharded (HSDP); 1: all ranks are one (FSDP)"""
    workers: int = 1
    """processes beside a rank's step that make batches, 0: made between the steps; times the ranks it divides
    data.streams"""
    begin_from: str | None = None
    """a run, or one of its checkpoints: training begins with its averaged weights. A modality that it lacks begins
    anew; see `mmgen import` for the weights of a language model"""
    ema_decay: float = 0.999
    ema_also: tuple[float, ...] = ()
    """decays of further averages, kept as `ema-DECAY` beside `ema`"""
    skip_budget: int = 10
    """optimizer steps that may be left out because a loss or gradient was not finite"""

    def __post_init__(self) -> None:
        if self.precision not in ("bf16", "float32", "float64"):
            raise ValueError(f"precision {self.precision!r} must be bf16, float32 or float64")
        if self.steps < 1:
            raise ValueError(f"steps {self.steps} must be at least 1")
        if self.workers < 0:
            raise ValueError(f"workers {self.workers} must be at least 0")
        for name in ("micro_batches", "replicas"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if len(set(self.ema_also)) < len(self.ema_also):
            raise ValueError(f"ema_also {list(self.ema_also)} names a decay twice")

    def averages(self) -> dict[str, float]:
        """Decays of the averaged weights by the section of the checkpoint that keeps them."""
        return {"ema": self.ema_decay, **{f"ema-{decay:g}": decay for decay in self.ema_also}}


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on."""

    run: str = "runs/default"
    """the folder that the run writes"""
    seed: int = 0
    tokenizer: str = "tokenizers/emoji-text"
    size: tuple[int, int] = (64, 64)
    """height and width in pixels of a picture that is asked for without one"""
    modalities: dict[str, dict[str, Any]] = field(default_factory=lambda: {"text": {}, "image": {}})
    model: TrunkConfig = field(default_factory=TrunkConfig)
    objective: ObjectiveConfig = field(default_factory=FlowMatchingConfig)
    joint: JointConfig | None = None
    """a head that says several text tokens at once, null for none"""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    plan: Plan = field(default_factory=lambda: Plan(steps=4, guidance=2.0))
    """how this run is sampled where nothing else is asked for"""
    log: LogConfig = field(default_factory=LogConfig)


@dataclass(frozen=True)
class Parts:
    """What a configuration builds. The model's weights are drawn from torch's global generator: seed it first."""

    tokenizer: TextTokenizer
    modalities: dict[str, Modality]
    model: Model
    objective: Objective
    joint: JointConfig | None = None


def build(config: RunConfig, outline: bool = False, device: str = "cpu") -> Parts:
    """The parts of a run, weights on `device`. Raises ValueError where the configuration does not fit together.

    `outline`: of tokenizer and codecs only sizes are known, so that they may be yet to be made.
    """
    tokenizer = (outline_text_tokenizer if outline else load_text_tokenizer)(config.tokenizer)
    modalities = build_modalities(config.modalities, tokenizer, outline)
    objective = build_objective(config.objective)
    check_modalities(objective, modalities)
    with torch.device(device):
        model = Model(config.model, modalities, tokenizer.vocab_size, config.joint)
    return Parts(tokenizer, modalities, model, objective, config.joint)


def load(
    run: str | Path, which: str = "ema", precision: SamplingPrecision = "float32", graphs: bool = False
) -> Sampler:
    """A sampler of a run's latest checkpoint (`which`: its averaged weights, or the plain ones, "model").

    `run` is a run's folder or one of its checkpoints; `precision` and `graphs` are the sampler's. Raises ValueError
    where there is no such run or checkpoint.
    """
    checkpoint = find_checkpoint(run)
    config = load_run_config(checkpoint.parent.parent)
    parts = build(config)
    parts.model.load_state_dict(load_model_weights(checkpoint, which))
    device = default_device()
    if precision == "bf16":
        parts.model.trunk.narrow_weights()
    parts.model.to(device)
    for modality in parts.modalities.values():
        if isinstance(modality, Image):
            modality.codec.compute_on(device)
    return Sampler(
        parts.model, parts.modalities, parts.objective, config.size, config.plan, precision, graphs
    )


def write_weights(
    out: Path, config: RunConfig, step: int, weights: Mapping[str, Tensor], files: Sequence[Path] = ()
) -> None:
    """Writes the folder of a run that has averaged weights and copies of `files` alone; whole or not at all."""
    beside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        save_checkpoint(beside / CHECKPOINTS, step, {"ema": weights}, {"step": step})
        save_yaml(replace(config, run=str(out)), beside / CONFIG_NAME)
        for file in files:
            shutil.copyfile(file, beside / file.name)
        os.replace(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def run_folder(run: str | Path) -> Path:
    """The folder of a run, given it or one of its checkpoints."""
    folder = Path(run)
    return folder if (folder / CONFIG_NAME).is_file() else folder.parent.parent


def find_checkpoint(run: str | Path) -> Path:
    """A run's latest checkpoint; `run` may be one itself. Raises ValueError where there is none."""
    folder = Path(run)
    checkpoint = folder if (folder / "state.json").is_file() else latest_checkpoint(folder / CHECKPOINTS)
    if checkpoint is None:
        raise ValueError(
            f"{folder} holds no checkpoint: expected the folder of a run that `mmgen train` wrote"
        )
    return checkpoint


def load_run_config(folder: Path) -> RunConfig:
    """The resolved configuration that a run saved. Raises ValueError where there is none."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{folder} is not the folder of a run: it has no {CONFIG_NAME}")
    return load_yaml(path, RunConfig)
