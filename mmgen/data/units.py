"""Documents -> units: the fewest documents of one kind whose noisy copies fill groups of M particles.

A group needs copies of one shape, so documents wait here for others like them. Nothing is drawn or placed here.
"""

from collections import Counter
from dataclasses import replace
from math import gcd, lcm
from typing import Generic, TypeVar

from mmgen.sequence import Document, Grouping

Kind = frozenset[tuple[tuple[str, int], int]]
"""for each (modality, tokens of a block) how many noisy copies of it go beyond whole groups"""

T = TypeVar("T")


def kind_of(document: Document, grouping: Grouping) -> Kind:
    """What of the document's copies makes no whole groups; empty where all do, as in a text."""
    copies: Counter[tuple[str, int]] = Counter()
    for span in document.spans:
        if span.values is not None and span.predicted:
            for length in span.blocks:
                copies[span.modality, length] += span.copies
    rest = {shape: count % grouping.particles for shape, count in copies.items()}
    return frozenset((shape, count) for shape, count in rest.items() if count)


def fill_groups(document: Document, grouping: Grouping) -> Document:
    """The document with as many more copies of each block as make its groups whole."""
    spans = [
        replace(span, copies=lcm(span.copies, grouping.particles)) if span.values is not None else span
        for span in document.spans
    ]
    return replace(document, spans=tuple(spans))


class Units(Generic[T]):
    """Items, each with a document, that wait for others of their document's kind."""

    def __init__(self, grouping: Grouping) -> None:
        self.grouping = grouping
        self._waiting: dict[Kind, list[tuple[T, Document]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def offer(self, item: T, document: Document) -> list[tuple[T, Document]]:
        """The unit that the item completes; empty where it must wait."""
        kind = kind_of(document, self.grouping)
        unit = self._waiting.setdefault(kind, [])
        unit.append((item, document))
        particles = self.grouping.particles
        if len(unit) < particles // gcd(particles, *(count for _, count in kind)):
            return []
        return self._waiting.pop(kind)

    def waiting(self) -> list[tuple[T, Document]]:
        """Those that wait, by kind in the order in which its first came."""
        return [entry for unit in self._waiting.values() for entry in unit]

    def pop_oldest(self) -> tuple[T, Document]:
        """Takes out the first of the kind that has waited longest."""
        kind = next(iter(self._waiting))
        oldest = self._waiting[kind].pop(0)
        if not self._waiting[kind]:
            del self._waiting[kind]
        return oldest
