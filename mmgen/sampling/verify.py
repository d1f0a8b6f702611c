"""Speculative sampling: tokens drafted by a joint head, kept or corrected so that their law is the trunk's own.

A cycle wastes no pass. x_1 is drawn already; the head drafts x_2..x_k; one pass of the trunk over x_1..x_k gives the
laws p_2..p_(k+1) of what follows each. x_i is kept with probability min(1, p_i / q_i), q_i being the exact conditional
that it was drawn from. The first that is not kept is replaced from (p_i - q_i)_+, and that token is the next x_1; if
all are kept, a token from p_(k+1) is (arXiv 2211.17192, algorithm 1).

The laws of trunk and head may have a temperature and a nucleus; what is kept follows the trunk's, whatever the head's.

Shape letters: N rows, D drafted tokens (k - 1), k tokens of a pass, W width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmgen.model.joint import Drawn, JointHead, Law, invert
from mmgen.model.vocabulary import Vocabulary

AHEAD = 64  # passes whose random numbers are moved to the device at once


@dataclass(frozen=True)
class Verdict:
    """How many drafted tokens of each row are kept, and the token that follows them."""

    kept: Int[Tensor, "N"]
    token: Int[Tensor, "N"]


def acceptance(drawn: Drawn, p: Float[Tensor, "N E V"]) -> Float[Tensor, "N D"]:
    """The probability that each drafted token is kept, given that those before it are: min(1, p / q).

    `p` is the law of each drafted token given those before, and may go on (E >= D).
    """
    index = drawn.tokens[..., None]
    kept = p[:, : index.shape[1]].gather(-1, index) / drawn.probabilities.gather(-1, index)
    return kept.squeeze(-1).clamp(max=1)


def correction(p: Float[Tensor, "... V"], q: Float[Tensor, "... V"]) -> Float[Tensor, "... V"]:
    """The law of the token in the place of one that is not kept: (p - q)_+, normalized. With q = 0 it is p."""
    residual = (p - q).clamp(min=0)
    total = residual.sum(-1, keepdim=True)
    # nothing is left where p and q differ by rounding alone; then any of the two laws will do
    return torch.where(total > 0, residual / total, p)


def verify(drawn: Drawn, p: Float[Tensor, "N k V"], uniform: Float[Tensor, "N k"]) -> Verdict:
    """What is kept of a draft, and what follows it.

    `p` are the laws of the k - 1 drafted tokens and of the one after them, in float64; `uniform` are numbers in [0, 1),
    one for each drafted token and one for the token that follows.
    """
    kept = (uniform[:, :-1] < acceptance(drawn, p)).long().cumprod(-1).sum(-1)
    row = torch.arange(len(p), device=p.device)
    # no token was drafted for the last place, so nothing is taken from its law
    q = torch.cat([drawn.probabilities, torch.zeros_like(p[:, :1])], 1)
    return Verdict(kept, invert(correction(p[row, kept], q[row, kept]), uniform[:, -1]))


class Decoder(Protocol):
    """A trunk with its cache, as `speculate` sees it."""

    def advance(self, tokens: Int[Tensor, "N k"], /) -> tuple[Float[Tensor, "N k V"], Float[Tensor, "N k W"]]:
        """Reads k tokens a row. Returns, after each, the logits of the next token and the hidden state."""
        ...

    def truncate(self, num_tokens: Sequence[int], /) -> None:
        """Forgets what the last `advance` read but for the first `num_tokens` of each row."""
        ...


@dataclass(frozen=True)
class Speculated:
    """The tokens of each row, and how many passes of the trunk it took part in before it ended."""

    tokens: list[list[int]]
    passes: list[int]


def speculate(
    head: JointHead | None,
    vocabulary: Vocabulary,
    decoder: Decoder,
    logits: Float[Tensor, "N V"],
    hidden: Float[Tensor, "N W"],
    law: Law,
    draws: Sequence[np.random.Generator],
    max_tokens: int,
    end: int | None = None,
    *,
    tokens_per_pass: int | None = None,
    lossless: bool = True,
    told: Callable[[int, list[int]], None] | None = None,
) -> Speculated:
    """Up to `max_tokens` tokens a row, of the law that drawing them from the trunk one by one has.

    `logits` and `hidden` are of what was read so far. `law` is applied to the trunk's logits and to the head's. Each
    row has random numbers of its own (`draws`), so that what it gets does not depend on its batch. `end` ends a row
    and is not among its tokens. Rows that have ended go through the passes until all have.

    A pass of the trunk reads `tokens_per_pass` tokens, as many as the head says where it is not given. One is plain
    autoregression, and needs no head. Where not `lossless` every draft is kept: the law is then the head's as much as
    the trunk's. `told` hears of each row that has new tokens, and all that it has.
    """
    if tokens_per_pass is None:
        tokens_per_pass = 1 if head is None else head.num_tokens
    num_drafted = tokens_per_pass - 1
    rows, passes = [[] for _ in draws], [0 for _ in draws]
    running = set(range(len(draws)))

    def commit(row: int, tokens: Sequence[int]) -> None:
        if row not in running:
            return
        for token in tokens:
            if token != end:
                rows[row].append(token)
            if token == end or len(rows[row]) == max_tokens:
                running.remove(row)
                break
        if told is not None and tokens:
            told(row, rows[row])

    token = invert(law(logits.double()).exp(), _uniform(draws, 1, logits.device)[:, 0])
    first = token.tolist()
    numbers = _numbers(draws, 2 * num_drafted + 1, logits.device)
    nothing = Drawn(token[:, None][:, :0], logits.double()[:, None][:, :0])
    while True:
        for row, own in enumerate(first):
            commit(row, [own])
        if not running:
            return Speculated(rows, passes)
        uniform = next(numbers)
        drawn = nothing
        if num_drafted:
            assert head is not None, "a draft needs a head"
            drawn = head.start(hidden, vocabulary, law).extend(token).draw(uniform[:, :num_drafted])
        logits, states = decoder.advance(torch.cat([token[:, None], drawn.tokens], 1))
        p = law(logits.double()).exp()
        if lossless and num_drafted:
            verdict = verify(drawn, p, uniform[:, num_drafted:])
        else:
            verdict = Verdict(torch.full_like(token, num_drafted), invert(p[:, -1], uniform[:, -1]))
        token = verdict.token
        # one wait for the device in a pass: all that the host has to know of it
        found = torch.cat([torch.stack([token, verdict.kept], 1), drawn.tokens], 1).tolist()
        first, kept, drafted = zip(*((own[0], own[1], own[2:]) for own in found), strict=True)
        decoder.truncate([1 + num if row in running else 0 for row, num in enumerate(kept)])
        for row in running:
            passes[row] += 1
        for row, (own, num) in enumerate(zip(drafted, kept, strict=True)):
            commit(row, own[:num])
        if num_drafted:
            hidden = states[torch.arange(len(states), device=states.device), verdict.kept]


def _numbers(
    draws: Sequence[np.random.Generator], num: int, device: torch.device
) -> Iterator[Float[Tensor, "N {num}"]]:
    """What `_uniform` gives, call by call."""
    while True:
        yield from _uniform(draws, AHEAD * num, device).unflatten(1, (AHEAD, num)).unbind(1)


def _uniform(
    draws: Sequence[np.random.Generator], num: int, device: torch.device
) -> Float[Tensor, "N {num}"]:
    return torch.from_numpy(np.stack([draw.random(num) for draw in draws])).to(device)
