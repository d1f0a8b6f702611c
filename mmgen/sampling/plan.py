"""A plan: how much compute one request spends, and on what."""

import importlib
import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

SOLVERS = ("euler", "heun", "restart")
SOLVER_ARGUMENTS = "output, jump, x, times"
SCORERS = ("likelihood",)
COUNTS = ("blocks", "thinking", "candidates", "tokens_per_pass", "max_tokens")
NUMBERS = ("guidance", "guidance_range", "picture_guidance", "shift", "temperature", "top_p")

MAX_BATCH = 64
"""requests that are drawn together at most"""
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """A point of the surface that one checkpoint serves: how a picture is refined, and how text is written."""

    blocks: int = 1
    """autoregressive blocks of a picture, bands of its rows: a finished one is read by those after it"""
    steps: int | tuple[int, ...] = 4
    """refinement steps of a block, or one number for each"""
    guidance: float = 1.0
    """w of G_null + w (G - G_null); 1 is none and costs one network call a step instead of two"""
    guidance_range: tuple[float, float] = (0.0, 1.0)
    """times (1 is noise) between which steps begin that are guided"""
    picture_guidance: float | None = None
    """the same of pictures that a request gives beside a text, by a third call a step; none: one guidance for both"""
    solver: str = "euler"
    """euler jumps along the grid, each time from where the last jump landed. heun makes two calls a step, of velocities
    only (flow matching). restart jumps to the data from every time of the grid, with fresh noise in between, and needs
    a model that is told its target (IMM). Or one's own, `package.module:function` with the arguments of
    `mmgen.sampling.loops.pushforward`"""
    shift: float = 1.0
    """above 1 puts more of the steps near noise, below 1 near the data"""
    thinking: int = 0
    """tokens of text that are written before a picture at most, and read by it"""
    candidates: int = 1
    """answers that are drawn to a request; the one that the scorer likes best is kept"""
    scorer: str = "likelihood"
    """of candidates. likelihood: how likely the model finds the request's texts after the picture. Or one's own,
    `package.module:function` as `mmgen.sampling.score.Scorer` has it"""
    tokens_per_pass: int = 1
    """of text, in a pass of the trunk; those after the first are drafted by its joint head"""
    verify: bool = True
    """keep of a draft what has the law of one token a pass"""
    temperature: float = 1.0
    """0 takes the likeliest token"""
    top_p: float = 1.0
    """keep the fewest tokens whose probabilities reach it"""
    max_tokens: int = 64

    def __post_init__(self) -> None:
        if isinstance(self.steps, list):
            object.__setattr__(self, "steps", tuple(self.steps))
        self._check_types()
        if self.blocks < 1:
            raise ValueError(f"blocks {self.blocks} must be at least 1")
        if isinstance(self.steps, tuple) and len(self.steps) != self.blocks:
            raise ValueError(
                f"steps {self.steps} must be one number, or one for each of {self.blocks} blocks"
            )
        if min(self.block_steps) < 1:
            raise ValueError(f"steps {self.steps} must be at least 1")
        if min(self.guidance, self.picture_guidance or 0) < 0:
            name = "guidance" if self.guidance < 0 else "picture_guidance"
            raise ValueError(f"{name} {getattr(self, name)} must be at least 0 (1 is none)")
        for name, known in (("solver", SOLVERS), ("scorer", SCORERS)):
            if getattr(self, name) not in known and ":" not in getattr(self, name):
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is none of {', '.join(known)}, nor package.module:function"
                )
        if self.thinking < 0:
            raise ValueError(f"thinking {self.thinking} must be at least 0 tokens (0 is none)")
        if self.candidates < 1:
            raise ValueError(f"candidates {self.candidates} must be at least 1")
        low, high = self.guidance_range
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"guidance_range {low:g} {high:g} must be two times of [0, 1], the lower one first"
            )
        if not self.shift > 0:
            raise ValueError(f"shift {self.shift} must be positive (1 is none)")
        if self.tokens_per_pass < 1:
            raise ValueError(f"tokens_per_pass {self.tokens_per_pass} must be at least 1")
        if self.temperature < 0:
            raise ValueError(
                f"temperature {self.temperature} must be at least 0 (0 takes the likeliest token)"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be in (0, 1]")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens {self.max_tokens} must be at least 1")

    def _check_types(self) -> None:
        counts = {name: [getattr(self, name)] for name in COUNTS} | {"steps": list(self.block_steps)}
        for name, values in counts.items():
            if wrong := [value for value in values if not isinstance(value, int) or isinstance(value, bool)]:
                raise ValueError(f"{name} {wrong[0]!r} must be a whole number")
        for name in NUMBERS:
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else (values,):
                if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
                    raise ValueError(f"{name} {value!r} must be a finite number")

    @property
    def block_steps(self) -> tuple[int, ...]:
        """Refinement steps of each block."""
        return self.steps if isinstance(self.steps, tuple) else (self.steps,) * self.blocks


def batches(items: Sequence[T], most: int = MAX_BATCH) -> Iterator[Sequence[T]]:
    """The items in their order, at most so many at a time."""
    for start in range(0, len(items), most):
        yield items[start : start + most]


def import_function(path: str, what: str, arguments: str) -> Any:
    """What `package.module:function` names. Raises ValueError where it cannot be imported, or called with as many
    arguments as `arguments` names, with commas between them."""
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{what} {path!r} cannot be imported: {error}") from None
    if not callable(found):
        raise ValueError(f"{what} {path!r} is {type(found).__name__}, which cannot be called")
    try:
        inspect.signature(found).bind(*arguments.split(","))
    except (TypeError, ValueError) as error:  # a builtin may have no signature to look at
        raise ValueError(f"{what} {path!r} must take ({arguments}): {error}") from None
    return found
