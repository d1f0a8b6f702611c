"""What is asked of a sampler, and what comes back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import PIL.Image
from jaxtyping import Float
from torch import Tensor

from mmgen.sampling.cost import Cost

Part = str | PIL.Image.Image
Kind = Literal["text", "image"]


@dataclass(frozen=True)
class Request:
    """Parts that are given, in reading order, and the kinds of those asked for, which follow in turn.

        Request(("a red apple",))                       a picture of a text
        Request((picture,), ("text",))                  a text about a picture
        Request(("a red apple",), ("image", "text"))    a picture, then a text that has read both
        Request(("a dog",), ("image", "image"))         two pictures, the second after the first
        Request((picture, "noto style"))                a picture from a picture and a text

    A text that is asked for first continues one that is given last. `size` is of the pictures asked for: height and
    width in pixels, the sampler's where it is None.
    """

    given: tuple[Part, ...] = ()
    asked: tuple[Kind, ...] = ("image",)
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("given", "asked"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise ValueError(f"{name} {value!r} must be parts in reading order, such as ({value!r},)")
        if not self.asked or not set(self.asked) <= {"text", "image"}:
            raise ValueError(f"asked {self.asked} must be one or more of 'text' and 'image'")
        if any(pair == ("text", "text") for pair in zip(self.asked, self.asked[1:], strict=False)):
            raise ValueError(f"asked {self.asked}: two texts in turn are one; ask for one")
        if wrong := [part for part in self.given if not isinstance(part, str | PIL.Image.Image)]:
            raise ValueError(f"given {type(wrong[0]).__name__}: a part is a text or a picture")

    @property
    def gives_pictures(self) -> bool:
        return any(not isinstance(part, str) for part in self.given)


@dataclass(frozen=True)
class Answer:
    """The parts that a request asked for. `latents` are of its pictures, of unit variance, as the codec takes them;
    `thoughts` the texts written before them; `score` what the scorer of several candidates says of this one."""

    parts: tuple[Part, ...]
    latents: tuple[Float[Tensor, "D h w"], ...] = ()
    thoughts: tuple[str, ...] = ()
    score: float | None = None


@dataclass(frozen=True)
class Answers:
    """Those of a batch of requests, in their order, and what they cost together."""

    answers: list[Answer] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True)
class Event:
    """What a request has so far of the part that is being made: the text, or the picture's first `blocks` blocks (the
    others are noise). `part` counts those asked for; `thought`: a text that is written before a picture.
    """

    request: int
    part: int
    text: str | None = None
    latents: Float[Tensor, "D h w"] | None = None
    blocks: int = 0
    candidate: int = 0
    thought: bool = False


Listener = Callable[[Event], None]
