"""Calls of the network at fixed addresses and of fixed shapes, which a GPU records once and replays as one launch.

A step of refinement and a pass over new text are hundreds of small kernels, whose launches take longer than they do. A
CUDA graph launches all at once, but reads and writes where it did when it was recorded. So caches are kept from request
to request, of sizes in steps of `STEP` tokens, and attended whole; the rule hides what holds nothing. Without a GPU the
same calls run as they are.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmgen.modalities.layout import text_rows
from mmgen.model.attention.dense import DenseAttention
from mmgen.model.attention.rule import allow
from mmgen.model.model import Model
from mmgen.sampling.cache import Cache
from mmgen.sequence import Stream

STEP = 64  # tokens
KEPT = 16  # caches, with what was recorded over them; the one not used for longest goes first
EAGER = 2  # calls before one is recorded: kernels are chosen, and most requests of an odd shape need no more


class Recorded:
    """A function of tensors whose shapes stay; what it returns is the caller's to keep."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> None:
        self.function = function
        self.inputs = [torch.empty_like(each) for each in inputs]
        self.outputs: tuple[Tensor, ...] = ()
        self.graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        self._calls += 1
        if self.graph is None and (not self.inputs[0].is_cuda or self._calls <= EAGER):
            return self._run()
        if self.graph is None:
            self._record()
        assert self.graph is not None
        self.graph.replay()
        return tuple(each.clone() for each in self.outputs)

    def _run(self) -> tuple[Tensor, ...]:
        kind = self.inputs[0].device.type
        # a cast that autocast keeps is freed with its context, and a graph would go on reading it
        with torch.autocast(
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
        ):
            return self.function(*self.inputs)

    def _record(self) -> None:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.outputs = self._run()
        self.graph = graph


@dataclass
class Place:
    """A cache, and the calls recorded over it."""

    cache: Cache
    calls: dict[Hashable, "TextPass | NoisyPass"] = field(default_factory=dict)


class Graphs:
    """Places of one model, kept from request to request. One request (or batch of them) at a time."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._free: OrderedDict[Hashable, list[Place]] = OrderedDict()
        self._taken: list[tuple[Hashable, Place]] = []

    def take(self, rows: int, capacity: int) -> Place:
        """An empty cache of at least `capacity` tokens a row, which is nobody else's until `release`."""
        capacity = -(-capacity // STEP) * STEP
        kind = self.device.type
        narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = rows, capacity, narrow
        free = self._free.get(key)
        if free:
            place = free.pop()
            place.cache.clear()
        else:
            layers = self.model.config.num_layers
            place = Place(Cache(rows, capacity, layers, self.device, whole=True))
        self._taken.append((key, place))
        return place

    def release(self) -> None:
        """All that was taken is free again, and what has not been used for longest is dropped."""
        # the next to ask for the same in the same order gets the same, with what it recorded
        for key, place in reversed(self._taken):
            self._free.setdefault(key, []).append(place)
            self._free.move_to_end(key)
        self._taken = []
        num = sum(map(len, self._free.values()))
        while num > KEPT:
            oldest = next(iter(self._free))
            num -= len(self._free.pop(oldest))

    def text_pass(self, place: Place, num_tokens: int) -> "TextPass":
        if num_tokens not in place.calls:
            place.calls[num_tokens] = TextPass(self.model, place.cache, num_tokens)
        found = place.calls[num_tokens]
        assert isinstance(found, TextPass)
        return found

    def noisy_pass(self, place: Place, stream: Stream, name: str) -> "NoisyPass":
        """Of the noisy tokens of `stream`, which come behind all that the cache holds."""
        key = name, stream.ids.shape[1]
        if key not in place.calls:
            place.calls[key] = NoisyPass(self.model, place.cache, stream, name)
        found = place.calls[key]
        assert isinstance(found, NoisyPass)
        found.begin(stream)
        return found


class TextPass:
    """`num_tokens` tokens of text a row, appended to a whole cache: hidden states, and logits of what follows each."""

    def __init__(self, model: Model, cache: Cache, num_tokens: int) -> None:
        self.model = model
        self.cache = cache
        rows, device = len(cache.lengths), next(model.parameters()).device
        self._index = torch.arange(num_tokens, device=device)
        shape = (rows, num_tokens), (rows, 4)
        self._recorded = Recorded(
            self._read, [torch.empty(each, dtype=torch.long, device=device) for each in shape]
        )

    def __call__(
        self, tokens: Int[Tensor, "R L"], first: Int[Tensor, "R 4"]
    ) -> tuple[Float[Tensor, "R L W"], Float[Tensor, "R L V"]]:
        """`first`: position, rank, block and column of each row's first token."""
        num = tokens.shape[1]
        assert self.cache.length + num <= self.cache.capacity, "a cache is made large enough for its plan"
        hidden, logits = self._recorded(tokens, first)
        self.cache.lengths = [length + num for length in self.cache.lengths]
        return hidden, logits

    def _read(self, tokens: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        position, rank, block, column = first.unbind(-1)
        stream = text_rows(tokens, position, rank, block, self.model.names.index("text"))
        layout = stream.layout
        self.cache.make_room_at(layout, (layout.document, column[:, None] + self._index))
        attend = DenseAttention(allow(layout, self.cache.layout)[:, None])
        hidden, _ = self.model.expand(stream, attend, self.cache.layers)
        return hidden, self.model.logits(hidden)


class NoisyPass:
    """Noisy tokens behind all that a whole cache holds: G(x, t, s), all rows at one time."""

    def __init__(self, model: Model, cache: Cache, stream: Stream, name: str) -> None:
        self.model = model
        self.cache = cache
        self.name = name
        assert stream.instance is not None
        self._stream = replace(
            stream,
            modality=stream.modality.clone(),
            positions=stream.positions.clone(),
            instance=stream.instance.clone(),
        )
        rows, num = stream.ids.shape
        self._row = torch.arange(rows, device=stream.ids.device)[:, None]
        self._columns = torch.zeros(rows, num, dtype=torch.long, device=stream.ids.device)
        mask = torch.zeros(rows, 1, num, cache.capacity, dtype=torch.bool, device=stream.ids.device)
        self._attend = DenseAttention(mask)
        self._recorded: Recorded | None = None

    def begin(self, stream: Stream) -> None:
        """What the next calls are of: noisy tokens in the places, and among the keys, of `stream`."""
        own, mask = self._stream, self._attend.mask
        assert own.instance is not None and stream.instance is not None and mask is not None
        own.modality.copy_(stream.modality)
        own.positions.copy_(stream.positions)
        own.instance.copy_(stream.instance)
        num = stream.ids.shape[1]
        self._columns.copy_(self.cache.length + torch.arange(num, device=self._columns.device))
        self.cache.make_room_at(stream.layout, (self._row, self._columns))
        mask.copy_(allow(stream.layout, self.cache.layout)[:, None])

    def __call__(
        self, x: Float[Tensor, "R S D"], t: Float[Tensor, "1"], s: Float[Tensor, "1"]
    ) -> Float[Tensor, "R S D"]:
        if self._recorded is None:
            self._recorded = Recorded(self._refine, [x, t, s])
        return self._recorded(x, t, s)[0]

    def _refine(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor]:
        found = self.model.refine(self._stream, {self.name: x}, t, s, self._attend, self.cache.layers)
        return (found[self.name],)
