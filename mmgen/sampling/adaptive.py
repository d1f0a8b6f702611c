"""Compute where it is needed: a cheap plan for every request, and a dearer one where its scorer is not content."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from mmgen.sampling.cost import Cost
from mmgen.sampling.plan import Plan
from mmgen.sampling.request import Answer, Answers, Request
from mmgen.sampling.score import score_pictures

if TYPE_CHECKING:
    from mmgen.sampling.sampler import Sampler


@dataclass(frozen=True)
class Policy:
    """Draw by `first`. Where the picture's score is below `threshold` draw by `then` too, from the same noise, and keep
    what scores higher: refine for longer, or from more candidates, which `then` says."""

    first: Plan
    then: Plan
    threshold: float
    scorer: str = "likelihood"


def answer_adaptively(
    sampler: "Sampler", requests: Sequence[Request], policy: Policy, seed: int = 0
) -> Answers:
    """Answers to requests for pictures; request i draws from seed + i. Scoring is part of the cost, whose network
    evaluations are the most that a request took.

    Raises ValueError where a request asks for no picture.
    """
    first = sampler.answer(requests, policy.first, seed)
    scores = _scores(sampler, requests, first.answers, policy.scorer, first.cost)
    answers = [replace(answer, score=score) for answer, score in zip(first.answers, scores, strict=True)]
    low = [i for i, score in enumerate(scores) if score < policy.threshold]
    if low:
        asked = [requests[i] for i in low]
        again = sampler.answer(asked, policy.then, [seed + i for i in low])
        others = _scores(sampler, asked, again.answers, policy.scorer, again.cost)
        for i, answer, score in zip(low, again.answers, others, strict=True):
            if score > scores[i]:
                answers[i] = replace(answer, score=score)
        again.cost.nfe += first.cost.nfe
        first.cost.add(again.cost)
    return Answers(answers, first.cost)


def _scores(
    sampler: "Sampler", requests: Sequence[Request], answers: Sequence[Answer], scorer: str, cost: Cost
) -> list[float]:
    """Of each answer's last picture."""
    if any(not answer.latents for answer in answers):
        raise ValueError("a policy goes by scores of pictures, and a request asks for none")
    latents = torch.stack([answer.latents[-1] for answer in answers])
    return score_pictures(sampler, scorer, requests, latents, cost).tolist()
