"""Text that goes on from where its rows are: in a few operations what the writer of spans makes one by one."""

import torch

from mmgen.modalities import Text
from mmgen.modalities.layout import BatchWriter, text_rows
from tests.parts import modalities


def test_rows_of_text_are_what_the_writer_makes_of_their_spans():
    mods = modalities()
    text = mods["text"]
    assert isinstance(text, Text)
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    positions, ranks, blocks = [4, 21], [2, 9], [30, 33]
    writer = BatchWriter(2, 3, 0, mods, first_block=30)
    for row, (ids, position, rank) in enumerate(zip(tokens.tolist(), positions, ranks, strict=True)):
        writer.begin(row, document=row, rank=rank)
        writer.add(text.span(ids, position, predicted=False))
    expected = writer.finish().context
    made = text_rows(tokens, *map(torch.tensor, (positions, ranks, blocks)), list(mods).index("text"))
    for name in ("modality", "ids", "positions"):
        assert torch.equal(getattr(made, name), getattr(expected, name)), name
    for name in ("document", "block", "rank", "public"):
        assert torch.equal(getattr(made.layout, name), getattr(expected.layout, name)), name
    assert made.values == {}
