"""Samples -> documents: which parts of a sample stand in which order, and what is left out of the condition.

A task is a sequence of modality names ("text image": a caption, then its picture); "text:name" is a caption of the
level of detail "name". Conditions are dropped here, when the document is built, and nowhere else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

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
    drop_text: float = 0.0
    """how often only its texts are left out of a condition that has more than texts (for guidance by each apart)"""

    def __post_init__(self) -> None:
        if not self.tasks or min(self.tasks.values()) < 0 or sum(self.tasks.values()) <= 0:
            raise ValueError(f"tasks {dict(self.tasks)} must be weights >= 0 that do not sum to 0")
        for name in ("drop_condition", "drop_text"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} must be in [0, 1]")


def check_tasks(config: ComposeConfig, modalities: Mapping[str, Modality]) -> None:
    """Raises ValueError where a task names a modality that the run lacks."""
    for task in config.tasks:
        parts = [part.partition(":") for part in task.split()]
        unknown = [name for name, _, _ in parts if name not in modalities and name != INTERLEAVED]
        if unknown or not parts:
            raise ValueError(f"task {task!r} names {unknown}; the run's modalities are {sorted(modalities)}")
        if wrong := [
            name + colon + level for name, colon, level in parts if colon and (name != "text" or not level)
        ]:
            raise ValueError(f"task {task!r}: {wrong[0]!r} must be text:LEVEL, such as text:name")


def compose(
    sample: Sample,
    config: ComposeConfig,
    modalities: Mapping[str, Modality],
    draw: np.random.Generator,
    source: str = "",
) -> Document:
    """One document of the sample, its task drawn by weight; `source` is the name of the sample's source of data.

    Raises MissingPart where the sample lacks a part.
    """
    tasks = list(config.tasks)
    task = tasks[draw_index([config.tasks[task] for task in tasks], draw)]
    if task == INTERLEAVED:
        parts = _interleaved_parts(sample)
    else:
        parts = [
            (name, level or None, sample) for name, _, level in (part.partition(":") for part in task.split())
        ]
    if modalities[parts[-1][0]].channels and len(parts) > 1:
        if draw.random() < config.drop_condition:
            parts = parts[-1:]
        elif config.drop_text and {name for name, _, _ in parts[:-1]} > {"text"}:
            if draw.random() < config.drop_text:
                parts = [part for part in parts if part[0] != "text"]
    text = modalities["text"]
    assert isinstance(text, Text)
    spans: list[Span] = [text.begin()]
    before = None
    for index, (name, level, part) in enumerate(parts):
        first, last = index == 0, index == len(parts) - 1
        place = Place(spans[-1].next_position, first, last, level, name == before == "text")
        spans += modalities[name].encode(part, place, draw)
        before = name
    return Document(tuple(spans), sample.key, source)


def cut_text(document: Document, length: int, modalities: Mapping[str, Modality]) -> list[Document]:
    """The document as several of at most `length` tokens, each with the begin token; empty where it is no text alone.

    Every token but the begin tokens is in one of them, in order. Nothing in a later one reads an earlier one.
    """
    text = modalities["text"]
    assert isinstance(text, Text)
    begin, *rest = document.spans
    if not rest or any(span.ids is None or not span.predicted for span in rest):
        return []  # a picture, or its size
    ids = np.concatenate([span.ids for span in rest if span.ids is not None]).tolist()
    room = length - len(begin)
    return [
        replace(document, spans=(begin, text.span(ids[start : start + room], begin.next_position)))
        for start in range(0, len(ids), room)
    ]


def _interleaved_parts(sample: Sample) -> list[tuple[str, str | None, Sample]]:
    """Texts and pictures in the sample's own order, each as a sample of one part."""
    if not sample.parts:
        names = ["text"] if sample.picture is None else ["text", "image"]
        return [(name, None, sample) for name in names]
    return [
        ("text", None, Sample(f"{sample.key}/{i}", sample.shard, captions={"text": part}))
        if isinstance(part, str)
        else ("image", None, Sample(f"{sample.key}/{i}", sample.shard, picture=part))
        for i, part in enumerate(sample.parts)
    ]
