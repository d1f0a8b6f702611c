"""The losses of one batch: expand the context, refine the state, compare. What training minimizes is made of them.

Every modality has a sum over its own tokens; means are taken over the tokens of a whole optimizer step, wherever they
are, so that neither ranks nor micro-batches with few of them bias the gradient.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmgen.model.joint import label_windows
from mmgen.model.model import Target, plan_batch
from mmgen.objectives import Objective
from mmgen.objectives.draw import NoisyState
from mmgen.sequence import NO_LABEL, PAD, PackedBatch, Stream, move
from mmgen.training.feed import Feed
from mmgen.training.run import Parts

JOINT = "joint"  # the joint head's loss, beside those of the modalities


@dataclass(frozen=True)
class Shares:
    """What parts of a batch bear of a loss, without gradient: each of some tokens of one document, at one time."""

    document: Int[Tensor, "N"]
    total: Float[Tensor, "N"]
    count: Int[Tensor, "N"]
    time: Float[Tensor, "N"] | None = None
    """None for text, which has none"""


@dataclass(frozen=True)
class Loss:
    """The sum of a modality's losses over its tokens, and their count."""

    total: Tensor
    count: int
    shares: Shares | None = None
    """None for the joint head"""

    def mean(self) -> Tensor:
        return self.total / max(self.count, 1)


def token_counts(parts: Parts, feed: Feed) -> Counter[str]:
    """How many tokens of a batch each loss is summed over: known before anything is computed."""
    batch, counts = feed.batch, Counter(text=int((feed.batch.labels != NO_LABEL).sum()))
    head = parts.model.joint_head
    if head is not None and feed.windows is not None:
        windows = label_windows(batch.labels, head.num_tokens)[feed.windows]
        counts[JOINT] = int((windows != NO_LABEL).sum())
    for index, (name, modality) in enumerate(parts.modalities.items()):
        if modality.channels:
            counts[name] = int((batch.state.modality == index).sum())
    return counts


def seen_in(batch: PackedBatch) -> Counter[str]:
    """What a run counts: documents (`samples`), tokens of both streams, and documents with a picture to be drawn."""
    context, state = (stream.layout.document for stream in (batch.context, batch.state))
    drawn = state[state != PAD]
    return Counter(
        samples=batch.num_documents,
        tokens=int((context != PAD).sum()) + len(drawn),
        pictures=len(drawn.unique()),
    )


def compute_losses(parts: Parts, feed: Feed, precision: str, device: torch.device) -> dict[str, Loss]:
    """The loss of every modality on one batch: expand the context, refine the state, and for an objective that needs
    one the target state too. The joint head's is `joint`, over the tokens of its windows.

    Every parameter has a part in the sum of them, whatever the batch holds, if only by a gradient of zeros: ranks that
    share a model must agree on which gradients there are.
    """
    counts = token_counts(parts, feed)
    feed = move(feed, device)
    batch, state, objective = feed.batch, feed.state, parts.objective
    told = objective.told_target(state.t, state.s)
    target = None
    if objective.needs_target:
        target = Target(state.x_r, state.r, objective.told_target(state.r, state.s))
    attention = plan_batch(batch, "dense") if feed.attention is None else feed.attention
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        hidden, outputs, targets = parts.model(batch, state.x, state.t, told, attention, target)
    asked = batch.labels != NO_LABEL
    per_token = -parts.model.vocabulary.log_prob(hidden[asked], batch.labels[asked])
    document = batch.context.layout.document[asked]
    shares = {"text": Shares(document, per_token.detach(), torch.ones_like(document))}
    totals = {"text": per_token.sum()}
    head = parts.model.joint_head
    if head is not None and feed.windows is not None:
        tokens = label_windows(batch.labels, head.num_tokens)[feed.windows]
        totals[JOINT] = head.training_loss(hidden[feed.windows], tokens, parts.model.vocabulary)
    for name, output in outputs.items():
        here = batch.state.modality == list(parts.modalities).index(name)
        if targets is None:
            per_token = objective.token_loss(output, batch.state.values[name], state.noise[name])
            totals[name] = torch.where(here, per_token, 0.0).sum()
            shares[name] = _token_shares(batch.state, state, here, per_token.detach())
        else:
            totals[name], shares[name] = _group_losses(
                objective, batch.state, state, name, output, targets[name]
            )
    return {name: Loss(total, counts[name], shares.get(name)) for name, total in totals.items()}


def _token_shares(stream: Stream, state: NoisyState, here: Tensor, per_token: Tensor) -> Shares:
    assert stream.instance is not None
    document, time = stream.layout.document[here], state.t[stream.instance[here]]
    return Shares(document, per_token[here], torch.ones_like(document), time)


def _group_losses(
    objective: Objective, stream: Stream, state: NoisyState, name: str, output: Tensor, target: Tensor
) -> tuple[Tensor, Shares]:
    """The sum over a modality's noisy tokens of what each bears of its group's loss; shapes in turn, groups at once."""
    total = output.flatten()[:0].sum()  # of the graph also where there is no group, so that gradients exist
    documents, times, losses, counts = [], [], [], []
    for shape in state.groups:
        if shape.modality != name:
            continue

        def grouped(tokens: Tensor, slots: Tensor = shape.slots) -> Tensor:
            return tokens.flatten(0, 1)[slots].flatten(2)

        student, other, x_t, x_r = map(grouped, (output, target, state.x[name], state.x_r[name]))
        t, s, r = (time[shape.instance] for time in (state.t, state.s, state.r))
        velocity = None
        if objective.anchored:
            x, noise = grouped(stream.values[name]), grouped(state.noise[name])
            velocity = objective.path.target(x, noise, t[:, None, None])
        loss = objective.group_loss(student, other, x_t, x_r, t, s, r, velocity, shape.same_context)
        total = total + loss.sum() * shape.slots[0].numel()
        num_tokens = shape.slots.shape[-1]
        document = stream.layout.document.flatten()[shape.slots[..., 0]]
        documents.append(document.flatten())
        times.append(t[:, None].expand_as(document).flatten())
        losses.append((loss.detach()[:, None] * num_tokens).expand_as(document).flatten())
        counts.append(torch.full_like(documents[-1], num_tokens))
    if not documents:
        nothing = stream.layout.document.flatten()[:0]
        return total, Shares(nothing, total.detach().expand(0), nothing, state.t[:0])
    return total, Shares(torch.cat(documents), torch.cat(losses), torch.cat(counts), torch.cat(times))


def loss_weights(parts: Parts) -> dict[str, float]:
    """What the mean loss of each modality, and of the joint head, counts in what is minimized."""
    weights = {name: modality.loss_weight for name, modality in parts.modalities.items()}
    return weights if parts.joint is None else {**weights, JOINT: parts.joint.weight}


def weighted(parts: Parts, losses: Mapping[str, Loss], counts: Mapping[str, int] | None = None) -> Tensor:
    """What is minimized: the mean of each modality, and of the joint head, times its weight.

    Where the batch is one of several of a step, `counts` are the tokens of all of them: then this is its share.
    """
    weights = loss_weights(parts)
    means = [
        weights[name] * (loss.total / max(loss.count if counts is None else counts[name], 1))
        for name, loss in losses.items()
    ]
    return torch.stack(means).sum()
