"""Samples -> documents: which parts of a sample stand in which order, and what is left out of the condition.

A task is a sequence of modality names ("text image": a caption, then its picture). Conditions are dropped here, when
the document is built, and nowhere else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mmgen.modalities import Modality, Place, Text
from mmgen.rng import draw_index
from mmgen.sequence import Document, Sample, Span

INTERLEAVED = "interleaved"


@dataclass(frozen=True)
class ComposeConfig:
    tasks: Mapping[str, float] = field(
        default_factory=lambda: {"text image": 0.8, "image text": 0.1, "text": 0.1}
    )
    """how often each order of a sample's parts is drawn; `interleaved` takes the sample's own"""
    drop_condition: float = 0.1
    """how often everything before a document's last, continuous part is left out (for guidance)"""

    def __post_init__(self) -> None:
        if not self.tasks or min(self.tasks.values()) < 0 or sum(self.tasks.values()) <= 0:
            raise ValueError(f"tasks {dict(self.tasks)} must be weights >= 0 that do not sum to 0")
        if not 0 <= self.drop_condition <= 1:
            raise ValueError(f"drop_condition {self.drop_condition} must be in [0, 1]")


def check_tasks(config: ComposeConfig, modalities: Mapping[str, Modality]) -> None:
    """Raises ValueError where a task names a modality that the run lacks."""
    for task in config.tasks:
        unknown = [part for part in task.split() if part not in modalities and part != INTERLEAVED]
        if unknown or not task.split():
            raise ValueError(f"task {task!r} names {unknown}; the run's modalities are {sorted(modalities)}")


def compose(
    sample: Sample, config: ComposeConfig, modalities: Mapping[str, Modality], draw: np.random.Generator
) -> Document:
    """One document of the sample, its task drawn by weight. Raises MissingPart where the sample lacks a part."""
    tasks = list(config.tasks)
    names = tasks[draw_index([config.tasks[task] for task in tasks], draw)].split()
    parts = [(name, sample) for name in names]
    if names == [INTERLEAVED]:
        parts = _interleaved_parts(sample)
    if modalities[parts[-1][0]].channels and len(parts) > 1 and draw.random() < config.drop_condition:
        parts = parts[-1:]
    text = modalities["text"]
    assert isinstance(text, Text)
    spans: list[Span] = [text.begin()]
    for index, (name, part) in enumerate(parts):
        place = Place(spans[-1].next_position, first=index == 0, last=index == len(parts) - 1)
        spans += modalities[name].encode(part, place, draw)
    return Document(tuple(spans), sample.key)


def _interleaved_parts(sample: Sample) -> list[tuple[str, Sample]]:
    """Texts and pictures in the sample's own order, each as a sample of one part."""
    if not sample.parts:
        return [("text", sample)] if sample.picture is None else [("text", sample), ("image", sample)]
    return [
        ("text", Sample(f"{sample.key}/{i}", sample.shard, captions={"text": part}))
        if isinstance(part, str)
        else ("image", Sample(f"{sample.key}/{i}", sample.shard, picture=part))
        for i, part in enumerate(sample.parts)
    ]
