"""A plan: how much compute one request spends, and on what."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Plan:
    """A point of the surface that one checkpoint serves.

    `blocks` is the number of autoregressive blocks of a picture, bands of its rows: a finished one is read by those
    after it. `steps` is the number of refinement steps of a block, or one number for each. `guidance` w mixes
    G_null + w (G - G_null); 1 is none and costs one network call a step instead of two. `solver` heun makes two calls a
    step, of velocities only (flow matching). `shift` above 1 puts more of the steps near noise, below 1 near the data.
    Text is written `tokens_per_pass` tokens a pass of the trunk, those after the first drafted by its joint head; if
    `verify`, what is kept has the law of one token a pass. `temperature` 0 takes the likeliest token; `top_p` keeps the
    fewest tokens whose probabilities reach it.
    """

    blocks: int = 1
    steps: int | tuple[int, ...] = 4
    guidance: float = 1.0
    solver: Literal["euler", "heun"] = "euler"
    shift: float = 1.0
    tokens_per_pass: int = 1
    verify: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 64

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ValueError(f"blocks {self.blocks} must be at least 1")
        if isinstance(self.steps, tuple) and len(self.steps) != self.blocks:
            raise ValueError(
                f"steps {self.steps} must be one number, or one for each of {self.blocks} blocks"
            )
        if min(self.block_steps) < 1:
            raise ValueError(f"steps {self.steps} must be at least 1")
        if self.guidance < 0:
            raise ValueError(f"guidance {self.guidance} must be at least 0 (1 is none)")
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

    @property
    def block_steps(self) -> tuple[int, ...]:
        """Refinement steps of each block."""
        return self.steps if isinstance(self.steps, tuple) else (self.steps,) * self.blocks
