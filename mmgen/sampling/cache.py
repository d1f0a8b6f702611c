"""Keys and values of what was read, written in place, with the integers of the mask rule beside them."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmgen.model.trunk import KeyValue
from mmgen.sequence import PAD, Layout

INTEGERS = ("document", "block", "rank", "public")


class Layer:
    """One block's keys and values, in tensors [rows, capacity, K, E] that the first to be written allocate."""

    def __init__(self, cache: "Cache") -> None:
        self.cache = cache
        self.kv: KeyValue | None = None

    def extend(self, k: Float[Tensor, "R L K E"], v: Float[Tensor, "R L K E"]) -> KeyValue:
        """Writes those of the tokens that the cache has made room for; returns all that it holds."""
        for own, new in zip(self.tensors(k), (k, v), strict=True):
            self.cache.write(own, new)
        return self.past

    def tensors(self, like: Float[Tensor, "B L K E"]) -> KeyValue:
        """Those of all rows, made when first asked for, of heads and numbers as `like` has them."""
        if self.kv is None:
            # a head's keys side by side in memory, as its query takes them
            num_heads, dim = like.shape[2:]
            shape = len(self.cache.lengths), num_heads, self.cache.capacity, dim
            self.kv = like.new_zeros(shape).transpose(1, 2), like.new_zeros(shape).transpose(1, 2)
        return self.kv

    @property
    def past(self) -> KeyValue:
        assert self.kv is not None, "something was read"
        k, v = self.kv
        return (k, v) if self.cache.whole else (k[:, : self.cache.length], v[:, : self.cache.length])


class Cache:
    """Keys and values of what was read, written in place into tensors that are allocated once, and their layout.

    Each row's tokens stand together from the left: `lengths` of them, of `length` at most. Of one that is `whole` all
    columns are attended, and the rule hides those that hold nothing: shapes stay as they are from call to call.
    """

    def __init__(
        self, rows: int, capacity: int, num_layers: int, device: torch.device, whole: bool = False
    ) -> None:
        self.capacity = capacity
        self.whole = whole
        self.lengths = [0] * rows
        self.layers = [Layer(self) for _ in range(num_layers)]
        self._place: tuple[Any, ...] = ()  # where what is read now stands, and which of it is of a document
        self._taken: tuple[Any, ...] = ()
        pad = torch.full((rows, capacity), PAD, device=device)
        public = torch.zeros(rows, capacity, dtype=torch.bool, device=device)
        self._layout = Layout(pad, pad.clone(), pad.clone(), public)

    @property
    def length(self) -> int:
        return max(self.lengths)

    @property
    def layout(self) -> Layout:
        return self._layout if self.whole else self._layout.take((slice(None), slice(self.length)))

    def make_room(self, layout: Layout, num_tokens: Sequence[int]) -> None:
        """Appends the layout of new tokens, the first `num_tokens` of each row; the rest is padding.

        The layers' `extend` then writes their keys and values. Padding is not kept, and there may be nothing that it
        reads: what comes of it is not to be used.
        """
        first, longest = self.lengths, layout.shape[1]
        self.lengths = [held + num for held, num in zip(first, num_tokens, strict=True)]
        assert self.length <= self.capacity, "a cache is made large enough for its plan"
        if min(num_tokens) == longest:
            self._taken = (slice(None),)
            if len({*first}) == 1:  # no row is apart from the others: a copy of whole rows
                self._place = slice(None), slice(first[0], self.length)
            else:
                starts = torch.tensor([*enumerate(first)], device=layout.document.device)
                row, start = starts[:, :, None].unbind(1)
                self._place = row, start + torch.arange(longest, device=start.device)
        else:
            new = [(row, i) for row, num in enumerate(num_tokens) for i in range(num)]
            places = [(row, first[row] + i) for row, i in new]
            index = torch.tensor([new, places], dtype=torch.long, device=layout.document.device)
            self._taken, self._place = (tuple(each.unbind(-1)) for each in index)
        self._write_layout(layout)

    def make_room_at(self, layout: Layout, place: tuple[Int[Tensor, "R #L"], Int[Tensor, "R L"]]) -> None:
        """`make_room` in rows and columns that only the device knows; `lengths` are the caller's to keep."""
        self._place, self._taken = place, (slice(None),)
        self._write_layout(layout)

    def _write_layout(self, layout: Layout) -> None:
        for name in INTEGERS:
            self.write(getattr(self._layout, name), getattr(layout, name))

    def write(self, own: Tensor, new: Tensor) -> None:
        """Into a tensor [rows, capacity, ...] what is new in one [rows, L, ...]."""
        own[self._place] = new[self._taken]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forgets what each row has beyond its new length."""
        for row, (new, old) in enumerate(zip(lengths, self.lengths, strict=True)):
            if new < old:
                self._layout.document[row, new:old] = PAD
        self.lengths = list(lengths)

    def past(self) -> list[KeyValue]:
        return [layer.past for layer in self.layers]

    def beside(self) -> "Cache":
        """The same keys and values, for tokens that are appended behind the longest row and not kept."""
        other = Cache(len(self.lengths), self.capacity, len(self.layers), self._layout.document.device)
        for name in INTEGERS:
            getattr(other._layout, name)[:, : self.length] = getattr(self.layout, name)
        for own, layer in zip(other.layers, self.layers, strict=True):
            own.kv = layer.kv
        other.lengths = [self.length] * len(self.lengths)
        return other

    def clear(self) -> None:
        """Forgets all that was read; what memory it took stays where it is."""
        self.lengths = [0] * len(self.lengths)
        self._layout.document.fill_(PAD)
        for layer in self.layers:
            for tensor in layer.kv or ():
                tensor.zero_()  # what is hidden still must be finite

    def fill(self, caches: Sequence["Cache"]) -> None:
        """Takes in the rows of several caches below each other.

        Rows are filled up with padding, so that new tokens stand in the same columns of all.
        """
        held = max(cache.length for cache in caches)
        start = 0
        for cache in caches:
            num = len(cache.lengths)
            place = slice(start, start + num), slice(0, cache.length)
            for name in INTEGERS:
                getattr(self._layout, name)[place] = getattr(cache._layout, name)[:, : cache.length]
            for into, layer in zip(self.layers, cache.layers, strict=True):
                assert layer.kv is not None, "something was read"
                for own, past in zip(into.tensors(layer.kv[0]), layer.kv, strict=True):
                    own[place] = past[:, : cache.length]
            start += num
        self.lengths = [held] * start

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.kv or ())
