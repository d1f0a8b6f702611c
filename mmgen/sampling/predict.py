"""What a plan will cost, before anything is drawn: the calls that it will make of a network of known sizes.

`predict_pictures` and `predict_texts` give the calls as `Work`. Its cost is, to the operation, what the sampler counts;
`Calibration` (calibration.py) turns it into seconds. No network is held or run here, only sizes.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import torch
from torch import Tensor

from mmgen.modalities import Modality, bands
from mmgen.model.joint import JointConfig, draft_flops
from mmgen.model.model import Model
from mmgen.model.trunk import TrunkConfig
from mmgen.objectives import Objective
from mmgen.sampling.cost import Cost, context_flops, head_flops, state_flops
from mmgen.sampling.loops import guided, heun, plan_times, pushforward, restart
from mmgen.sampling.plan import MAX_BATCH, SOLVER_ARGUMENTS, Plan, batches, import_function

BEGIN, SIZE = 1, 2  # tokens that begin a document, and that say how large a picture is
NEW_LINE = 1  # between two texts; a tokenizer may take more


@dataclass(frozen=True)
class ModelFacts:
    """The sizes of a model that decide what its calls cost."""

    trunk: TrunkConfig
    vocab_size: int
    channels: Mapping[str, int]
    """of each continuous modality"""
    time_range: tuple[float, float] = (0.0, 1.0)
    """of the objective's path: what a range of guided times is compared with"""
    joint: JointConfig | None = None
    value_bytes: int = 4
    """of a number in the cache"""

    @classmethod
    def of(
        cls, model: Model, modalities: Mapping[str, Modality], objective: Objective, narrow: bool = False
    ) -> "ModelFacts":
        """`narrow`: sampled in bfloat16, whatever the weights are kept in."""
        weight = model.text_embedding.weight
        return cls(
            model.config,
            len(weight),
            {name: modality.channels for name, modality in modalities.items() if modality.channels},
            objective.path.time_range,
            None if model.joint_head is None else model.joint_head.config,
            torch.bfloat16.itemsize if narrow else weight.element_size(),
        )

    @property
    def all_channels(self) -> int:
        return sum(self.channels.values())

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token, in all layers."""
        return 2 * self.trunk.num_layers * self.trunk.num_kv_heads * self.trunk.head_dim * self.value_bytes


@dataclass(frozen=True)
class Call:
    """`times` like calls of the network over `tokens` tokens in each of `rows`, each of which scores `keys` keys.

    A pass over text has the logits of `logits` tokens a row, and `drafted` tokens of a joint head before it.
    """

    kind: Literal["prefill", "refine", "commit", "decode", "score"]
    times: float
    rows: int
    tokens: int
    keys: float
    logits: float = 0
    drafted: int = 0

    @property
    def num_tokens(self) -> float:
        return self.times * self.rows * self.tokens

    def trunk_flops(self, facts: ModelFacts) -> float:
        """Operations of the blocks with what is around them, but for logits and drafts."""
        if self.kind == "refine":
            # noisy tokens are of pictures, and all rows are at one time
            sizes = facts.channels["image"], facts.all_channels
            flops = state_flops(facts.trunk, 1, self.rows * self.tokens, self.keys, *sizes)
        else:
            # a pass over new text embeds text alone
            channels = 0 if self.kind == "decode" else facts.all_channels
            flops = context_flops(facts.trunk, self.rows * self.tokens, self.keys, channels)
        return self.times * flops

    def text_flops(self, facts: ModelFacts) -> float:
        """Operations of logits and drafts."""
        flops = head_flops(facts.trunk, round(self.rows * self.logits), facts.vocab_size)
        if self.drafted:
            assert facts.joint is not None, "a draft needs a head"
            flops += self.rows * draft_flops(facts.joint, facts.trunk, self.drafted, facts.vocab_size)
        return self.times * flops


@dataclass(frozen=True)
class Batch:
    """Requests that are drawn together: their calls, network evaluations a picture, the tokens that their sessions have
    room for, and the tokens of all pictures that pass the autoencoder either way.
    """

    rows: int
    calls: tuple[Call, ...]
    nfe: int = 0
    cache_tokens: int = 0
    decoded: int = 0
    encoded: int = 0


@dataclass(frozen=True)
class Written:
    """A text of so many tokens, and how many each pass of the trunk leaves in its context.

    That is 1 where a plan has one token a pass, else 1 to its `tokens_per_pass`; or what is expected of it.
    """

    tokens: int
    kept: tuple[float, ...]

    @classmethod
    def evenly(cls, tokens: int, kept_per_pass: float = 1.0) -> "Written":
        """A text that is cut at `tokens`, of which the first needs no pass."""
        return cls(tokens, (kept_per_pass,) * math.ceil((tokens - 1) / kept_per_pass))


@dataclass(frozen=True)
class Work:
    """What some requests ask of a model, batch after batch. `tokens` and `passes` are of text, over all requests."""

    facts: ModelFacts
    batches: tuple[Batch, ...]
    tokens: int = 0
    passes: int = 0

    @property
    def cost(self) -> Cost:
        """As the sampler reports it, without its seconds."""
        cost = Cost(tokens=self.tokens, passes=self.passes, memory=self.cache_bytes)
        for batch in self.batches:
            cost.nfe = batch.nfe
            for call in batch.calls:
                name = f"{call.kind}_flops"
                setattr(cost, name, getattr(cost, name) + call.trunk_flops(self.facts))
                if call.kind == "score":
                    cost.score_flops += call.text_flops(self.facts)
                else:
                    cost.decode_flops += call.text_flops(self.facts)
        return cost

    @property
    def cache_bytes(self) -> int:
        """Keys and values that the sessions of a batch hold, in the largest batch."""
        return max((batch.cache_tokens for batch in self.batches), default=0) * self.facts.token_bytes


def predict_pictures(
    facts: ModelFacts, plan: Plan, prompt_tokens: Sequence[int], grid: tuple[int, int], thought: float = 1.0
) -> Work:
    """A picture of `grid` (rows and columns of tokens) for each prompt of so many text tokens; 0 is no prompt.

    Thoughts are taken to be as long as the plan lets them be, and `thought` is the tokens that a pass over one keeps.
    Raises ValueError for more blocks than rows of tokens, a model without pictures, and a scorer of one's own.
    """
    if "image" not in facts.channels:
        raise ValueError(f"this model has no pictures: its continuous modalities are {list(facts.channels)}")
    if plan.candidates > 1 and plan.scorer != "likelihood":
        raise ValueError(f"scorer {plan.scorer}: what it costs is not known, of likelihood it is")
    written = Written.evenly(plan.thinking, thought) if plan.thinking else None
    most = max(1, MAX_BATCH // plan.candidates)
    made = [_pictures(facts, plan, each, grid, written) for each in batches(prompt_tokens, most)]
    drawn = len(prompt_tokens) * plan.candidates
    tokens, passes = (written.tokens, len(written.kept)) if written else (0, 0)
    return Work(facts, tuple(made), drawn * tokens, drawn * passes)


def predict_texts(
    facts: ModelFacts,
    plan: Plan,
    context_tokens: Sequence[int],
    written: Sequence[Written],
    picture_tokens: int = 0,
) -> Work:
    """Texts after contexts of so many tokens, `BEGIN` (and `described_tokens`, for a picture's) included.

    `picture_tokens` are encoded for each text. Raises ValueError where there are not as many contexts as texts,
    and for more tokens a pass than the model has a joint head for.
    """
    most = 1 if facts.joint is None else facts.joint.tokens
    if plan.tokens_per_pass > most:
        raise ValueError(f"tokens_per_pass {plan.tokens_per_pass}: this model writes {most} at most")
    if len(written) != len(context_tokens):
        raise ValueError(f"{len(context_tokens)} contexts of {len(written)} texts: give one for each")
    texts = list(zip(context_tokens, written, strict=True))
    made = tuple(_texts(plan, each, picture_tokens) for each in batches(texts))
    tokens, passes = sum(each.tokens for each in written), sum(len(each.kept) for each in written)
    return Work(facts, made, tokens, passes)


def described_tokens(grid: tuple[int, int]) -> int:
    """The context of a text that describes a picture."""
    return BEGIN + SIZE + grid[0] * grid[1]


def _pictures(
    facts: ModelFacts,
    plan: Plan,
    prompt_tokens: Sequence[int],
    grid: tuple[int, int],
    thought: Written | None,
) -> Batch:
    parts, rows, size = bands(*grid, plan.blocks), len(prompt_tokens) * plan.candidates, grid[0] * grid[1]
    # rows are padded to the longest; guidance has a second context, without the prompt
    longest = BEGIN + max(prompt_tokens)
    calls, contexts, room = [], [longest + SIZE, BEGIN + SIZE][: 1 + (plan.guidance != 1)], 0
    if thought is not None:
        # a new line parts it from the prompt; the last token of it is read with the picture's size
        longest += NEW_LINE if max(prompt_tokens) else 0
        calls.append(Call("prefill", 1, rows, longest, longest, logits=1))
        held, k = float(longest), plan.tokens_per_pass
        for kept in thought.kept:
            calls.append(Call("decode", 1, rows, k, held + k, logits=k, drafted=k - 1))
            held += kept
        contexts[0] = longest + thought.tokens + SIZE
        rest = contexts[0] - min(round(held), longest + thought.tokens)
        calls.append(Call("prefill", 1, rows, rest, contexts[0]))
        room = NEW_LINE + plan.thinking + 2 * k + BEGIN + max(prompt_tokens) + SIZE - contexts[0]
        calls += [Call("prefill", 1, rows, context, context) for context in contexts[1:]]
    else:
        # contexts of which nothing has been read are read in one pass
        calls.append(Call("prefill", 1, rows, sum(contexts), sum(contexts)))
    nfe = copied = 0
    for number, (band, steps) in enumerate(zip(parts, plan.block_steps, strict=True)):
        tokens = band.stop - band.start
        evaluations = _evaluations(plan, steps, facts.time_range)
        for num, times in evaluations.items():
            nfe += num * times
            calls.append(Call("refine", times, num * rows, tokens, max(contexts[:num]) + band.stop))
        if number + 1 < len(parts):
            calls += [Call("commit", 1, rows, tokens, context + band.stop) for context in contexts]
        # of several contexts that are refined at once
        copied = max(copied, sum(num * (max(contexts) + band.stop) for num in evaluations if num > 1))
    room += contexts[0] + size + sum(context + parts[-1].start for context in contexts[1:]) + copied
    if plan.candidates > 1:
        length = described_tokens(grid) + max(prompt_tokens)
        mean = sum(prompt_tokens) / len(prompt_tokens) + 1  # with the token that ends it
        calls.append(Call("score", 1, rows, length, length, logits=mean))
    return Batch(rows, tuple(calls), nfe * plan.candidates, rows * room, len(prompt_tokens) * size)


def _evaluations(plan: Plan, steps: int, time_range: tuple[float, float]) -> Counter[int]:
    """How often a block's steps call the network for so many conditions at once: the loops run, on nothing."""
    counts = Counter()

    def network(x: Tensor, t: float, s: float, num: int) -> list[Tensor]:
        counts[num] += 1
        return [x] * num

    output = guided(network, plan.guidance, plan.guidance_range)
    times = plan_times(steps, plan.shift, time_range)
    nothing = torch.zeros(())
    if plan.solver == "restart":
        restart(output, _stay, lambda x, noise, t: x, nothing, times, lambda i: nothing)
    else:
        own = {"euler": pushforward, "heun": heun}
        solve = own.get(plan.solver) or import_function(plan.solver, "solver", SOLVER_ARGUMENTS)
        solve(output, _stay, nothing, times)
    return counts


def _stay(output: Tensor, x: Tensor, t: float, s: float, /) -> Tensor:
    return x


def _texts(plan: Plan, texts: Sequence[tuple[int, Written]], picture_tokens: int) -> Batch:
    rows, k = len(texts), plan.tokens_per_pass
    lengths = [float(context) for context, _ in texts]
    longest = max(context for context, _ in texts)
    calls = [Call("prefill", 1, rows, longest, longest, logits=1)]
    # a row that has ended goes through the passes of the others, and keeps nothing
    passes = zip_longest(*(written.kept for _, written in texts), fillvalue=0.0)
    for kept in passes:
        calls.append(Call("decode", 1, rows, k, max(lengths) + k, logits=k, drafted=k - 1))
        lengths = [length + more for length, more in zip(lengths, kept, strict=True)]
    room = longest + plan.max_tokens + 2 * k
    return Batch(rows, tuple(calls), cache_tokens=rows * room, encoded=rows * picture_tokens)
