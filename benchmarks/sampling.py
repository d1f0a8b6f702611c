"""Sampling with a cache against the same model without one: latency and throughput over plans, timed in turns.

Without: the prefix is expanded anew in every call of the network, before each refinement step, each finished block and
each token of text. The answers are the same (`largest_difference` of the pictures' latents; texts have to be equal).
`speed` is how many times longer the calls without a cache take, `counted` the same of operations. On a GPU the calls
with a cache are recorded as CUDA graphs, those without are not.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import cast
from unittest import mock

import torch
from jaxtyping import Float, Int
from torch import Tensor

from benchmarks import harness
from mmgen.modalities import Text, build_modalities
from mmgen.modalities.layout import BatchWriter
from mmgen.model.attention import Attend, plan_attention
from mmgen.model.model import Model
from mmgen.model.trunk import TrunkConfig
from mmgen.objectives import IMM, IMMConfig
from mmgen.sampling import context as contexts
from mmgen.sampling.cache import Cache
from mmgen.sampling.cost import context_flops
from mmgen.sampling.graphs import EAGER
from mmgen.sampling.plan import Plan
from mmgen.sampling.predict import Call, Work
from mmgen.sampling.probes import Probe
from mmgen.sampling.sampler import Result, Sampler, SamplingPrecision
from mmgen.sampling.session import Refinement, Session, ToldTarget
from mmgen.sampling.speed import picture_probes, text_probes
from mmgen.sequence import Span, Stream, move
from mmgen.tokenization.text import load_text_tokenizer
from mmgen.training.ranks import default_device
from mmgen.training.run import load


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    width: int = 384
    """Of the large trunk (random weights), with heads of 64 and a feed-forward of three times the width."""
    num_layers: int = 6
    """Of the large trunk."""
    batch_sizes: tuple[int, ...] = (1, 4)
    """Requests that are drawn together."""
    prompt_tokens: tuple[int, ...] = (8, 64)
    """Of each request."""
    max_tokens: int = 24
    """Of each text."""
    repeats: int = 5
    """Pairs of calls timed for each plan and seed."""
    precision: SamplingPrecision = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 64 or self.width % 64:
            raise ValueError(f"width {self.width} must be a multiple of 64, the size of a head")
        if min(*self.batch_sizes, *self.prompt_tokens, self.max_tokens - 1) < 1:
            raise ValueError("batch_sizes and prompt_tokens must be at least 1, max_tokens at least 2")


class Forgetful(Session):
    """A session that remembers which spans it has read, and computes from them alone in every call."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments[:4])  # and no graphs: its cache is another in every call
        self.spans_read: list[list[Span]] = [[] for _ in range(self.rows)]

    def read_all(self, spans: Sequence[Sequence[Span]]) -> Float[Tensor, "R L W"]:
        before = [sum(span.lengths[0] for span in row) for row in self.spans_read]
        new = [sum(span.lengths[0] for span in row) for row in spans]
        for own, more in zip(self.spans_read, spans, strict=True):
            own += more
        self.cache = Cache(self.rows, self.cache.capacity, len(self.cache.layers), self.device)
        self.ranks, self.next_block = [0] * self.rows, 0
        hidden = super().read_all(self.spans_read)
        last = hidden.new_zeros(self.rows, max(new), hidden.shape[-1])
        for row, (start, num) in enumerate(zip(before, new, strict=True)):
            last[row, :num] = hidden[row, start : start + num]
        return last

    @staticmethod
    def read_first(sessions: Sequence[Session], spans: Sequence[Sequence[Sequence[Span]]]) -> None:
        for session, own in zip(sessions, spans, strict=True):
            for kept, more in zip(cast(Forgetful, session).spans_read, own, strict=True):
                kept += more
        Session.read_first(sessions, spans)

    def write(self, tokens: Int[Tensor, "R L"]) -> tuple[Float[Tensor, "R L W"], Float[Tensor, "R L V"]]:
        text = self.modalities["text"]
        assert isinstance(text, Text)
        rows = zip(tokens.tolist(), self.positions, strict=True)
        hidden = self.read_all([[text.span(ids, start, predicted=False)] for ids, start in rows])
        return hidden, self.model.logits(hidden)

    def forget(self, num_tokens: Sequence[int]) -> None:
        super().forget(num_tokens)
        for own, num in zip(self.spans_read, num_tokens, strict=True):
            while num:
                span = own.pop()
                assert span.ids is not None, "what is taken back is text"
                kept = max(0, len(span) - num)
                num -= len(span) - kept
                if kept:
                    own.append(replace(span, ids=span.ids[:kept], positions=span.positions[:kept]))

    def outputs(
        self, spans: Sequence[Sequence[Span]], told_target: ToldTarget, others: Sequence[Session] = ()
    ) -> Refinement:
        return Anew((self, *others), spans, told_target)


class Anew(Refinement):
    """Expands in every call what its sessions have read, in one pass over the rows of all."""

    def __call__(self, x: Tensor, t: float, s: float, num: int) -> Sequence[Tensor]:
        stream, attend = self._read(num)
        self.sessions[0].model.expand(
            stream, attend
        )  # the keys and values that are refined against, once more
        return super().__call__(x, t, s, num)

    @cache  # noqa: B019 (an object of a few calls)
    def _read(self, num: int) -> tuple[Stream, Attend]:
        rows = [row for session in self.sessions[:num] for row in cast(Forgetful, session).spans_read]
        longest = max(session.cache.length for session in self.sessions[:num])
        writer = BatchWriter(len(rows), longest, 0, self.sessions[0].modalities)
        for row, items in enumerate(rows):
            writer.begin(row, document=row)
            for span in items:
                writer.add(span)
        stream = move(writer.context(), self.sessions[0].device)
        return stream, plan_attention(stream.layout, stream.layout, "dense")


@contextmanager
def without_cache() -> Iterator[None]:
    """Within the context samplers compute everything in every call."""
    with mock.patch.object(contexts, "Session", Forgetful):
        yield


def recomputing_ratio(work: Work) -> float:
    """Operations without a cache over those with one."""

    def again(call: Call) -> float:
        """Operations of the prefix, beside what the call does of it anyway."""
        prefix = call.keys - call.tokens
        keys = prefix if call.kind == "refine" else call.keys
        trunk, channels = work.facts.trunk, work.facts.all_channels
        more = context_flops(trunk, call.rows * prefix, keys, channels)
        if (
            call.kind == "decode"
        ):  # read together with the prefix, new text passes the embedding of pictures too
            more += 2.0 * call.rows * call.tokens * trunk.width * channels
        return call.times * more

    more = sum(again(call) for batch in work.batches for call in batch.calls)
    return 1 + more / work.cost.flops


def measure(arguments: Arguments) -> Iterator[harness.Row]:
    repeats = 2 if arguments.quick else arguments.repeats
    for seed in range(arguments.seeds):
        for name, sampler in _samplers(arguments, seed).items():
            for probe in _probes(sampler, arguments):
                yield {"model": name, "seed": seed, **_compare(probe, repeats, seed)}


def _samplers(arguments: Arguments, seed: int) -> dict[str, Sampler]:
    """The shipped model, and a larger one of random weights."""
    torch.manual_seed(seed)
    tokenizer = load_text_tokenizer(harness.ROOT / "tokenizers/emoji-text")
    codec = str(harness.ROOT / "tokenizers/emoji-latents")
    modalities = build_modalities({"text": {}, "image": {"codec": codec, "patch": 2}}, tokenizer)
    width, layers = (128, 2) if arguments.quick else (arguments.width, arguments.num_layers)
    trunk = TrunkConfig(width, layers, width // 64, width // 64, 64, 3 * width)
    device = default_device()
    model = Model(trunk, modalities, tokenizer.vocab_size).to(device)
    for parameter in model.heads.parameters():  # which start at zero, and would make every G the same
        torch.nn.init.normal_(parameter, std=0.02)
    if arguments.precision == "bf16":
        model.trunk.narrow_weights()
    recorded = device.type == "cuda"
    large = Sampler(model, modalities, IMM(IMMConfig()), precision=arguments.precision, graphs=recorded)
    return {
        "models/emoji": load(harness.ROOT / "models/emoji", precision=arguments.precision, graphs=recorded),
        f"random, {model.num_parameters() / 1e6:.0f}M": large,
    }


def _probes(sampler: Sampler, arguments: Arguments) -> list[Probe]:
    plans = [Plan(steps=1), Plan(steps=8), Plan(steps=4, guidance=2.0), Plan(blocks=4, steps=2)]
    sizes, prompts = arguments.batch_sizes, arguments.prompt_tokens
    if arguments.quick:
        plans, sizes, prompts = plans[-1:], sizes[:1], prompts[:1]
    return [
        probe
        for tokens in prompts
        for probe in (
            *picture_probes(sampler, plans, sizes, tokens),
            *text_probes(sampler, sizes, tokens, arguments.max_tokens),
        )
    ]


def _compare(probe: Probe, repeats: int, seed: int) -> harness.Row:
    def forgetful() -> Result:
        with without_cache():
            return probe.run()

    cached, again = probe.run(), forgetful()
    if cached.text != again.text and probe.sampler.precision == "float32":
        raise ValueError(f"without a cache other texts were written: {again.text}, not {cached.text}")
    difference = None
    if cached.latents is not None and again.latents is not None:
        difference = float((cached.latents - again.latents).abs().max())
    timed = harness.compare(forgetful, probe.run, repeats=repeats, warmup=EAGER, seed=seed)
    made = probe.num if probe.task == "generate" else cached.cost.tokens
    return {
        "task": probe.task,
        "requests": probe.num,
        "prompt_tokens": probe.prompt_tokens,
        **(
            {"blocks": probe.plan.blocks, "steps": probe.plan.steps, "guidance": probe.plan.guidance}
            if probe.task == "generate"
            else {"tokens": cached.cost.tokens}
        ),
        "latency_ms": 1e3 * timed.b,
        "per_second": made / timed.b,
        "gflops_per_second": cached.cost.flops / timed.b / 1e9,
        "cache_mb": cached.cost.memory / 1e6,
        "speed": timed.ratio,
        "counted": recomputing_ratio(probe.work),
        "precision": probe.sampler.precision,
        "largest_difference": difference,
    }


if __name__ == "__main__":
    harness.run("sampling", Arguments, measure, __doc__)
