"""Batches without data: rows full of captions of random tokens with a picture of noise each, as `estimate` counts them.

A step takes as long with them as with real documents of these sizes, so a size can be timed before there are data.
"""

from collections.abc import Sequence
from math import gcd

import numpy as np
import torch

from mmgen.data.pack import Packer
from mmgen.modalities import Image, Text
from mmgen.modalities.base import text_positions
from mmgen.modalities.layout import BatchWriter
from mmgen.model.attention import AttentionBackend
from mmgen.objectives.draw import draw_state
from mmgen.rng import keyed_numpy
from mmgen.sequence import Document, Span
from mmgen.training.estimate import full_rows
from mmgen.training.feed import Feed, make_feed
from mmgen.training.run import Parts, RunConfig

AROUND = 3  # context tokens of a document beside its caption: begin, and the picture's two of size


def text_document(parts: Parts, length: int, draw: np.random.Generator) -> Document:
    """Begin, and random tokens: `length` in all."""
    text = _text(parts)
    return Document((text.begin(), _random_text(text, 1, length - 1, draw, predicted=True)))


def picture_document(
    parts: Parts,
    caption: int,
    grid: tuple[int, int],
    draw: np.random.Generator,
    pictures: int = 1,
    predicted: bool = True,
) -> Document:
    """Begin, and `pictures` times: `caption` random tokens, the size, a picture of `grid` rows and columns of tokens.

    A picture is read by all that follows. `predicted`: whether the texts are trained on; the pictures are.
    """
    text, image = _text(parts), _image(parts)
    spans = [text.begin()]
    for number in range(pictures):
        spans.append(_random_text(text, spans[-1].next_position, caption, draw, predicted))
        spans.append(image.size_span(*grid, spans[-1].next_position, predicted))
        noise = draw.standard_normal((grid[0] * grid[1], image.channels), dtype=np.float32)
        values, start = torch.from_numpy(noise) * image.sigma_data, spans[-1].next_position
        spans.append(image.span(values, *grid, start, draw, read=number + 1 < pictures))
    return Document(tuple(spans))


def full_feed(config: RunConfig, parts: Parts, backend: AttentionBackend, number: int = 0) -> Feed:
    """A batch whose rows are full (`full_rows`), ready for its step; a picture too many for a whole group is left out.

    `number` keys all draws. Raises ValueError where a row has no room for a document, and a batch none for a group.
    """
    pack, objective = config.data.pack, parts.objective
    pictures = full_rows(config, parts)[1]
    documents = max(pictures // pack.rows, 1)
    packer = Packer(pack, parts.modalities, objective.grouping)
    if pictures:
        image = _image(parts)
        caption, grid = pack.context_length // documents - AROUND, image.token_grid(*config.size)
        if caption < 1:
            raise ValueError(
                f"data.pack.context_length {pack.context_length} leaves no room for captions of the {documents} "
                f"pictures that data.pack.state_length {pack.state_length} has room for"
            )
        whole = objective.particles // gcd(objective.particles, image.copies)
        if pictures < whole:
            raise ValueError(
                f"a batch has room for {pictures} pictures and a group is of {whole}: data.pack is too small"
            )
        for index in range(pictures - pictures % whole):
            packer.add(picture_document(parts, caption, grid, keyed_numpy("synthetic", number, index)))
    else:
        for row in range(pack.rows):
            packer.add(text_document(parts, pack.context_length, keyed_numpy("synthetic", number, row)))
    batch = packer.finish()
    drawn = draw_state(batch, parts.modalities, objective, number)
    return make_feed(batch, drawn, backend, parts.joint, number, number)


def rows_feed(parts: Parts, documents: Sequence[Document], backend: AttentionBackend, seed: int = 0) -> Feed:
    """A batch of a document a row, all of one length, without padding; their noisy copies must make whole groups."""
    writer = BatchWriter(
        len(documents),
        *documents[0].lengths,
        parts.modalities,
        grouping=parts.objective.grouping,
    )
    for row, document in enumerate(documents):
        writer.write(row, document)
    batch = writer.finish()
    drawn = draw_state(batch, parts.modalities, parts.objective, seed)
    return make_feed(batch, drawn, backend, parts.joint, seed, 0)


def _image(parts: Parts) -> Image:
    image = parts.modalities["image"]
    assert isinstance(image, Image)
    return image


def _text(parts: Parts) -> Text:
    text = parts.modalities["text"]
    assert isinstance(text, Text)
    return text


def _random_text(text: Text, start: int, length: int, draw: np.random.Generator, predicted: bool) -> Span:
    ids = draw.integers(text.tokenizer.vocab_size, size=length)
    return Span(text.name, text_positions(start, length), ids, predicted=predicted)
