"""Documents -> PackedBatch: first-fit into rows of two streams of fixed length.

Nothing is cut: `Packer.add` refuses what has no room, and `fits_empty` says whether it ever will. Documents are added
in units whose groups are whole (see `mmgen/data/units.py`), so that those of the batch are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmgen.modalities import Modality
from mmgen.modalities.layout import BatchWriter
from mmgen.sequence import UNGROUPED, Document, Grouping, PackedBatch


@dataclass(frozen=True)
class PackConfig:
    rows: int = 8
    context_length: int = 256
    state_length: int = 256
    lookahead: int = 16
    """documents that may wait for room before a batch is closed"""

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"rows {self.rows} must be at least 1")
        if self.lookahead < 1:
            raise ValueError(f"lookahead {self.lookahead} must be at least 1 document")
        for name in ("context_length", "state_length"):
            if getattr(self, name) < 128 or getattr(self, name) % 128:
                raise ValueError(f"{name} {getattr(self, name)} must be a multiple of 128")


class Packer:
    """Collects the documents of one batch."""

    def __init__(
        self, config: PackConfig, modalities: Mapping[str, Modality], grouping: Grouping = UNGROUPED
    ) -> None:
        self.config = config
        self.modalities = modalities
        self.grouping = grouping
        self.rows: list[list[Document]] = [[] for _ in range(config.rows)]
        self._left = self._empty()

    def _empty(self) -> list[list[int]]:
        """Tokens of context and of state that each row has room for."""
        return [[self.config.context_length, self.config.state_length] for _ in self.rows]

    def fits_empty(self, *documents: Document) -> bool:
        """Whether the documents have room in a batch of their own."""
        if len(documents) > len(self.rows):
            return self._take(documents, self._empty()) is not None
        for document in documents:  # a row for each
            context, state = document.lengths
            if context > self.config.context_length or state > self.config.state_length:
                return False
        return True

    def add(self, *documents: Document) -> bool:
        """Place each document in the first row with room; False, and none is placed, where one has none."""
        found = self._take(documents, self._left)
        if found is None:
            return False
        for document, row in zip(documents, found, strict=True):
            self.rows[row].append(document)
        return True

    @staticmethod
    def _take(documents: Sequence[Document], left: list[list[int]]) -> list[int] | None:
        """The row of each document, whose tokens are taken of what is `left`.

        None, and nothing is taken, where one has no room.
        """
        found: list[int] = []
        for document in documents:
            context, state = document.lengths
            for index, row in enumerate(left):
                if context <= row[0] and state <= row[1]:
                    row[0] -= context
                    row[1] -= state
                    found.append(index)
                    break
            else:
                for placed, index in zip(documents, found, strict=False):
                    left[index][0] += placed.lengths[0]
                    left[index][1] += placed.lengths[1]
                return None
        return found

    def finish(self, first_group: int = 0) -> PackedBatch:
        """The batch of what was added, its groups numbered from `first_group`."""
        config = self.config
        writer = BatchWriter(
            config.rows,
            config.context_length,
            config.state_length,
            self.modalities,
            first_group,
            grouping=self.grouping,
        )
        for row, documents in enumerate(self.rows):
            for document in documents:
                writer.write(row, document)
        return writer.finish()
