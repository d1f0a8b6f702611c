"""Documents of requests: the spans that training makes of samples, made of what a caller gives."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mmgen.modalities import Image, Modality, Text
from mmgen.sampling.request import Part
from mmgen.sequence import Span
from mmgen.tokenization.latents import picture_to_tensor


class Documents:
    """Builds spans for one model's modalities."""

    def __init__(self, modalities: Mapping[str, Modality]) -> None:
        self.modalities = modalities
        text = modalities["text"]
        assert isinstance(text, Text)
        self.text = text

    @property
    def image(self) -> Image:
        """The picture modality. Raises ValueError where the model has none."""
        image = self.modalities.get("image")
        if not isinstance(image, Image):
            raise ValueError(f"this model has no pictures: its modalities are {list(self.modalities)}")
        return image

    def begin(self, parts: Sequence[Part], noise: Callable[[int], np.random.Generator]) -> list[Span]:
        """A document that begins with `parts`; `noise(i)` is for the commit of its picture number i.

        Raises ValueError for a picture whose sides make no whole tokens.
        """
        spans = [self.text.begin()]
        pictures, before = 0, None
        for part in parts:
            start = spans[-1].next_position
            if isinstance(part, str):
                ids = self.text.tokenizer.encode(part)
                if isinstance(before, str):
                    ids = [*self.text.separator(), *ids]
                if ids:
                    spans.append(self.text.span(ids, start, predicted=False))
            else:
                image = self.image
                image.token_grid(part.height, part.width)
                latents = image.codec.encode(picture_to_tensor(part)[None])[0]
                values, height, width = image.patchify(latents)
                spans.append(self.size((height, width), start))
                start, draw = spans[-1].next_position, noise(pictures)
                spans.append(image.span(values, height, width, start, draw, read=True, predicted=False))
                pictures += 1
            before = part
        return spans

    def size(self, grid: tuple[int, int], start: int) -> Span:
        """The two size tokens that come before a picture of rows x columns tokens."""
        return self.image.size_span(*grid, start, predicted=False)

    def join(self, texts: Sequence[str]) -> list[int]:
        """The tokens of texts that follow each other."""
        ids: list[int] = []
        for number, text in enumerate(texts):
            ids += self.text.separator() if number else []
            ids += self.text.tokenizer.encode(text)
        return ids
