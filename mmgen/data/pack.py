"""Documents -> PackedBatch: first-fit into rows of two streams of fixed length.

Nothing is cut: `Packer.add` refuses a document that has no room, and `fits_empty` says whether it ever will.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mmgen.modalities import Modality
from mmgen.modalities.layout import BatchWriter, span_lengths
from mmgen.sequence import Document, PackedBatch


@dataclass(frozen=True)
class PackConfig:
    rows: int = 8
    context_length: int = 256
    state_length: int = 256

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"rows {self.rows} must be at least 1")
        for name in ("context_length", "state_length"):
            if getattr(self, name) < 128 or getattr(self, name) % 128:
                raise ValueError(f"{name} {getattr(self, name)} must be a multiple of 128")


def document_lengths(document: Document) -> tuple[int, int]:
    """Tokens that the document takes of the context stream and of the state stream."""
    context, state = zip(*map(span_lengths, document.spans), strict=True)
    return sum(context), sum(state)


class Packer:
    """Collects the documents of one batch."""

    def __init__(self, config: PackConfig, modalities: Mapping[str, Modality]) -> None:
        self.config = config
        self.modalities = modalities
        self.rows: list[list[Document]] = [[] for _ in range(config.rows)]
        self.used = [[0, 0] for _ in range(config.rows)]

    def fits_empty(self, document: Document) -> bool:
        context, state = document_lengths(document)
        return context <= self.config.context_length and state <= self.config.state_length

    def add(self, document: Document) -> bool:
        """Place the document in the first row with room; False where there is none."""
        context, state = document_lengths(document)
        for row, used in zip(self.rows, self.used, strict=True):
            if (
                used[0] + context <= self.config.context_length
                and used[1] + state <= self.config.state_length
            ):
                row.append(document)
                used[0] += context
                used[1] += state
                return True
        return False

    def finish(self, first_group: int = 0) -> PackedBatch:
        """The batch of what was added, its groups numbered from `first_group`."""
        config = self.config
        writer = BatchWriter(
            config.rows, config.context_length, config.state_length, self.modalities, first_group
        )
        num_documents = 0
        for row, documents in enumerate(self.rows):
            for document in documents:
                writer.begin(row, num_documents)
                for span in document.spans:
                    writer.add(span)
                num_documents += 1
        return writer.finish(num_documents)
