"""The types that flow: Sample (a tar entry) -> Document (a list of Spans) -> PackedBatch.

Imports nothing of ours. Shape letters: B rows of a batch, C context tokens, S state tokens, L either, N tokens of a
span, D channels of a token, I instances (noisy copies of a block).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

PAD = -1  # the document of padding: no token of a real document reads it
NO_LABEL = -100  # what torch's cross entropy ignores


@dataclass(frozen=True)
class Sample:
    """One decoded sample of a shard.

    `captions` maps a level of detail to a caption; the level "text" is the plain one (the `.txt` member). `latents`
    are an encoded picture [channels, height, width] (the `.latents.npy` member), normalised to zero mean and unit
    standard deviation per channel. `parts` is an interleaved document: texts and pictures in reading order.
    """

    key: str
    shard: str
    captions: Mapping[str, str] = field(default_factory=dict)
    picture: Image.Image | None = None
    latents: np.ndarray | None = None
    parts: tuple[str | Image.Image, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Span:
    """A run of tokens of one modality, in reading order.

    A discrete span has `ids` and every token is a block of its own. A continuous span has `values` (clean, standard
    deviation sigma_data) and `blocks`, the token counts of its autoregressive blocks. Integers are numpy's, which takes
    less time than torch for so few.

    `predicted` says that the model is trained to produce the span: cross entropy on ids, `copies` noisy copies of each
    block of values, which share one context.
    `committed` are the values as later tokens read them, at the configured small noise level. `read` says that a
    later span does, so that they must be in the context.
    """

    modality: str
    positions: Int[np.ndarray, "N 3"]
    ids: Int[np.ndarray, "N"] | None = None
    values: Float[Tensor, "N D"] | None = None
    committed: Float[Tensor, "N D"] | None = None
    blocks: tuple[int, ...] = ()
    copies: int = 1
    predicted: bool = True
    read: bool = True

    def __post_init__(self) -> None:
        assert (self.ids is None) != (self.values is None), "a span is discrete or continuous"
        num = len(self.positions)
        assert self.ids is None or len(self.ids) == num, "every token has a position"
        assert self.values is None or self.values.shape[0] == sum(self.blocks) == num, (
            "blocks partition a continuous span, and every token has a position"
        )
        assert self.committed is None or self.committed.shape[0] == num, "committed are all of the values"

    def __len__(self) -> int:
        return len(self.positions)

    @cached_property
    def next_position(self) -> int:
        """Where the next span begins: one past the largest position, whether or not the clean copy is present."""
        return int(self.positions.max()) + 1

    @property
    def clean_blocks(self) -> tuple[int, ...]:
        """Blocks of a continuous span that a later token reads: all if a later span does, else all but the last."""
        return self.blocks if self.read else self.blocks[:-1]

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens that the span takes of the context stream and of the state stream."""
        if self.values is None:
            return len(self), 0
        return sum(self.clean_blocks), self.copies * len(self) if self.predicted else 0


@dataclass(frozen=True)
class Document:
    """What one context is made of: spans that may read each other, and nothing else."""

    spans: tuple[Span, ...]
    key: str = ""
    """of its sample"""
    source: str = ""
    """the name of the source of data that the sample is of"""

    def __len__(self) -> int:
        return sum(map(len, self.spans))

    @cached_property
    def lengths(self) -> tuple[int, int]:
        """Tokens that the document takes of the context stream and of the state stream."""
        context, state = zip(*(span.lengths for span in self.spans), strict=True)
        return sum(context), sum(state)


@dataclass(frozen=True)
class Grouping:
    """How the noisy copies of a batch form groups: `particles` M copies of one shape each.

    A shape is a modality and a number of tokens. The copies of a group are of different blocks as far as there are
    enough of them ("across"); of blocks that read one context, as far as the batch has M of such ("context"); or all of
    one block ("within").
    """

    particles: int = 1
    of: Literal["across", "context", "within"] = "across"

    @property
    def within(self) -> bool:
        return self.of == "within"


UNGROUPED = Grouping()  # every copy by itself


@dataclass(frozen=True)
class Layout:
    """The four integers of the mask rule, per token. `document` is PAD where there is no token."""

    document: Int[Tensor, "B L"]
    block: Int[Tensor, "B L"]
    rank: Int[Tensor, "B L"]
    public: Bool[Tensor, "B L"]

    @property
    def shape(self) -> torch.Size:
        return self.document.shape

    def take(self, place: Any) -> "Layout":
        """The tokens at `place`, any index of a tensor [B, L]."""
        return Layout(self.document[place], self.block[place], self.rank[place], self.public[place])

    @staticmethod
    def concat(layouts: Sequence["Layout"]) -> "Layout":
        """The layouts side by side, along L."""
        return Layout(
            **{
                f.name: torch.cat([getattr(layout, f.name) for layout in layouts], dim=1)
                for f in fields(Layout)
            }
        )


@dataclass(frozen=True)
class Stream:
    """Tokens of one stream of a batch. `modality` indexes the model's modalities in their order, PAD where none.

    `ids` is zero where a token is continuous, `values[m]` where it is not of modality m. `instance` (state stream
    only) indexes the batch's instances; `positions` of a noisy copy are those of its clean twin.
    """

    modality: Int[Tensor, "B L"]
    ids: Int[Tensor, "B L"]
    values: Mapping[str, Float[Tensor, "B L D"]]
    positions: Int[Tensor, "B L 3"]
    layout: Layout
    instance: Int[Tensor, "B L"] | None = None

    @staticmethod
    def side_by_side(streams: Sequence["Stream"]) -> "Stream":
        """Clean tokens of several streams along L, each stream's documents apart from the others'."""
        layouts, first = [], 0
        for stream in streams:
            document = stream.layout.document
            layouts.append(
                replace(stream.layout, document=torch.where(document == PAD, PAD, document + first))
            )
            first += len(document)
        return Stream(
            torch.cat([stream.modality for stream in streams], 1),
            torch.cat([stream.ids for stream in streams], 1),
            {name: torch.cat([s.values[name] for s in streams], 1) for name in streams[0].values},
            torch.cat([stream.positions for stream in streams], 1),
            Layout.concat(layouts),
        )


@dataclass(frozen=True)
class Instances:
    """One row per noisy copy of a block. Those with one `group` share (t, s, r); `particle` counts within the group.

    `group` is global (it counts over the whole training), so that draws keyed by it do not depend on the rank that
    holds it. A batch holds groups whole, and those of a group have one modality and one number of tokens. Instances
    that read equal texts, and no picture but their own document's, have one `context` (a number within the batch).
    """

    modality: Int[Tensor, "I"]
    group: Int[Tensor, "I"]
    particle: Int[Tensor, "I"]
    num_tokens: Int[Tensor, "I"]
    context: Int[Tensor, "I"]

    @property
    def num_groups(self) -> int:
        return len(set(self.group.tolist()))


@dataclass(frozen=True)
class PackedBatch:
    """Two streams of fixed length. `labels[b, c]` is the id that follows context token c, or NO_LABEL.

    Documents are numbered in the order of `keys` (of their samples) and `sources` (of the data).
    """

    context: Stream
    state: Stream
    labels: Int[Tensor, "B C"]
    instances: Instances
    keys: tuple[str, ...]
    sources: tuple[str, ...]

    @property
    def num_documents(self) -> int:
        return len(self.keys)


T = TypeVar("T")


def move(value: T, device: torch.device | str) -> T:
    """A copy of a dataclass, mapping or tuple with every tensor in it on `device`."""
    moved: Any = value
    if isinstance(value, Tensor):
        moved = value.to(device, non_blocking=True)
    elif isinstance(value, Mapping):
        moved = {key: move(item, device) for key, item in value.items()}
    elif isinstance(value, tuple):
        moved = tuple(move(item, device) for item in value)
    elif is_dataclass(value) and not isinstance(value, type):
        moved = replace(value, **{f.name: move(getattr(value, f.name), device) for f in fields(value)})
    return moved
