"""Scorers: which of several pictures that were drawn for a request is kept.

A scorer must not be what the pictures are judged by: the best of many by a figure is good by that figure, and that says
nothing.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from mmgen.model.model import Model
from mmgen.rng import keyed_numpy
from mmgen.sampling.context import Context
from mmgen.sampling.cost import Cost, head_flops
from mmgen.sampling.plan import MAX_BATCH, batches, import_function
from mmgen.sampling.request import Request

if TYPE_CHECKING:
    from mmgen.sampling.sampler import Sampler


class Scorer(Protocol):
    """(sampler, requests, their pictures, cost) -> a score for each, the higher the better."""

    def __call__(
        self,
        sampler: "Sampler",
        requests: Sequence[Request],
        latents: Float[Tensor, "N D h w"],
        cost: Cost,
        /,
    ) -> Float[Tensor, "N"]: ...


def likelihood(
    sampler: "Sampler", requests: Sequence[Request], latents: Float[Tensor, "N D h w"], cost: Cost
) -> Float[Tensor, "N"]:
    """log p(texts of the request | picture) in nats, by the model itself: it must have learned "image text".

    Raises ValueError for a request without a text.
    """
    image, text = sampler.image, sampler.text
    documents, labels = [], []
    for request, own in zip(requests, latents, strict=True):
        ids = sampler.documents.join([part for part in request.given if isinstance(part, str)])
        if not ids:
            raise ValueError("scorer likelihood: a request without a text has none to be likely")
        values, height, width = image.patchify(own)
        size = image.size_span(height, width, 1, predicted=False)
        # one noise for all candidates, which differ by what they are alone
        noise = keyed_numpy("score")
        span = image.span(values, height, width, size.next_position, noise, read=True, predicted=False)
        documents.append([text.begin(), size, span, text.span(ids, span.next_position, predicted=False)])
        labels.append([*ids, text.tokenizer.end])
    hidden = Context(sampler.model, sampler.modalities, documents, 0, cost, "score_flops").read_all()
    scores = []
    for row, (spans, ids) in enumerate(zip(documents, labels, strict=True)):
        last = sum(map(len, spans))
        cost.score_flops += head_flops(sampler.model.config, len(ids), text.tokenizer.vocab_size)
        scores.append(log_likelihood(sampler.model, hidden[row, last - len(ids) : last], ids))
    return torch.stack(scores).cpu()


def log_likelihood(model: Model, hidden: Float[Tensor, "N W"], ids: Sequence[int]) -> Float[Tensor, ""]:
    """Summed log-probability of N tokens in nats, given the final hidden state before each; in float64."""
    index = torch.tensor(ids, device=hidden.device)[:, None]
    return model.logits(hidden).double().log_softmax(-1).gather(-1, index).sum()


def score_pictures(
    sampler: "Sampler",
    scorer: str,
    requests: Sequence[Request],
    latents: Float[Tensor, "N D h w"],
    cost: Cost,
) -> Float[Tensor, "N"]:
    """The scores of pictures, a batch at a time; seconds and all are added to `cost`."""
    score, found = load_scorer(scorer), []
    started = time.perf_counter()
    with torch.inference_mode():
        for part, drawn in zip(batches(requests), latents.split(MAX_BATCH), strict=True):
            own = score(sampler, part, drawn, cost)
            if not isinstance(own, Tensor) or own.shape != (len(part),) or not own.isfinite().all():
                raise ValueError(
                    f"scorer {scorer} must give {len(part)} finite scores, one a request, not {own}"
                )
            found.append(own.cpu())
    cost.seconds += time.perf_counter() - started
    return torch.cat(found)


def load_scorer(name: str) -> Scorer:
    """`likelihood`, or `package.module:function`. Raises ValueError where there is none."""
    return (
        likelihood
        if name == "likelihood"
        else import_function(name, "scorer", "sampler, requests, latents, cost")
    )
