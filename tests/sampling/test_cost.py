"""What a plan is said to cost is what it costs: the sampler's own count, torch's count of operations, and its cache."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from typing import cast

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmgen.modalities import build_modalities
from mmgen.model.joint import JointConfig, JointKind, build_joint_head, draft_flops
from mmgen.model.model import Model
from mmgen.model.trunk import TrunkConfig
from mmgen.objectives import IMM, FlowMatching, FlowMatchingConfig, IMMConfig, Objective
from mmgen.sampling import text as text_module
from mmgen.sampling.cost import Cost
from mmgen.sampling.plan import MAX_BATCH, Plan
from mmgen.sampling.predict import (
    BEGIN,
    SIZE,
    ModelFacts,
    Work,
    Written,
    described_tokens,
    predict_pictures,
    predict_texts,
)
from mmgen.sampling.sampler import Result, Sampler
from mmgen.sampling.session import Session
from tests.parts import TINY, modalities, model, picture, tokenizer

FLOW, MOMENTS = FlowMatching(FlowMatchingConfig()), IMM(IMMConfig())
KINDS = ("independent", "mixture", "hmm", "chain")
PROMPTS = ["red square", "a large blue circle on the white square", "the picture", None, "green"]
TRUNKS = {
    "grouped heads": TINY,
    "added times, untied head": replace(TINY, num_layers=1, num_kv_heads=4, time="add", tied=False),
    "modulation of each block": replace(TINY, time="adaln"),
    "own feed-forward, wide": TrunkConfig(48, 3, 6, 3, 16, 40, state_ffn=True, modulation_norm=True),
}


def sampler(trunk: TrunkConfig = TINY, objective: Objective = FLOW, joint: str | None = None) -> Sampler:
    head = None if joint is None else JointConfig(cast(JointKind, joint), tokens=4, components=3, rank=8)
    return Sampler(model(trunk, dtype=torch.float32, joint=head), modalities(), objective, (16, 16))


def facts_of(draws: Sampler) -> ModelFacts:
    return ModelFacts.of(draws.model, draws.modalities, draws.objective)


def prompt_tokens(prompts: Sequence[str | None]) -> list[int]:
    return [len(tokenizer().encode(prompt)) if prompt else 0 for prompt in prompts]


def without_seconds(cost: Cost) -> Cost:
    return replace(cost, seconds=0.0)


@dataclass
class Kept:
    """What passes left in the context of each row of each batch, and how many rows were still running: by recording."""

    rows: list[list[float]] = field(default_factory=list)


@contextmanager
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    kept, rows = Kept(), {}
    truncate = text_module.TextDecoder.truncate

    def record(self, num_tokens):
        if self not in rows:
            rows[self] = [[] for _ in num_tokens]
            kept.rows.extend(rows[self])
        for row, num in zip(rows[self], num_tokens, strict=True):
            if num:
                row.append(float(num))
        truncate(self, num_tokens)

    with monkeypatch.context() as patch:
        patch.setattr(text_module.TextDecoder, "truncate", record)
        yield kept


PLANS = [
    Plan(blocks=blocks, steps=steps, guidance=guidance, guidance_range=between, shift=shift)
    for (blocks, steps), (guidance, between), shift in product(
        [(1, 1), (1, 4), (2, 3), (3, (2, 1, 3)), (4, (4, 1, 2, 1))],
        [(1.0, (0.0, 1.0)), (2.5, (0.0, 1.0)), (0.0, (0.3, 0.8)), (2.5, (0.25, 0.5))],
        [1.0, 0.5],
    )
]


@pytest.mark.parametrize("objective", [FLOW, MOMENTS])
def test_pictures_cost_what_the_sampler_counts(objective: Objective):
    draws = sampler(objective=objective)
    facts, tokens = facts_of(draws), prompt_tokens(PROMPTS)
    other = "restart" if objective is MOMENTS else "heun"
    costs = set()
    for plan in [*PLANS, *(replace(plan, solver=other) for plan in PLANS)]:
        expected = without_seconds(draws.generate(PROMPTS, plan).cost)
        assert predict_pictures(facts, plan, tokens, (4, 4)).cost == expected, plan
        costs.add(expected.flops)
    assert len(costs) > 15, "the plans differ in what they cost"


def test_more_requests_than_a_batch_takes_and_other_sizes():
    draws = sampler(objective=MOMENTS)
    prompts = [PROMPTS[i % 5] for i in range(MAX_BATCH)] + ["red"] * 7
    plan = Plan(blocks=2, steps=(1, 2), guidance=2.0)
    result = draws.generate(prompts, plan, size=(24, 8))
    work = predict_pictures(facts_of(draws), plan, prompt_tokens(prompts), (6, 2))
    assert work.cost == without_seconds(result.cost)
    assert [batch.rows for batch in work.batches] == [MAX_BATCH, 7]
    first, second = (batch.calls[0].tokens for batch in work.batches)
    assert second < first, "the second batch is not padded to the first one's prompts"
    assert predict_pictures(facts_of(draws), plan, [], (6, 2)).cost == Cost()
    with pytest.raises(ValueError, match="blocks 5: a picture of 4 rows"):
        predict_pictures(facts_of(draws), Plan(blocks=5), [0], (4, 4))


@pytest.mark.parametrize("joint", [None, *KINDS])
@pytest.mark.parametrize("verify", [True, False])
def test_texts_cost_what_the_sampler_counts(joint: str | None, verify: bool, monkeypatch: pytest.MonkeyPatch):
    writes = sampler(joint=joint)
    prompts = [prompt or "the" for prompt in PROMPTS] * 14  # more than a batch
    for k in (1, 2, 4) if joint else (1,):
        plan = Plan(max_tokens=9, tokens_per_pass=k, verify=verify)
        with recording(monkeypatch) as kept:
            result = writes.complete(prompts, plan, seed=1)
        contexts = [BEGIN + tokens for tokens in prompt_tokens(prompts)]
        assert predicted_texts(writes, plan, contexts, kept, result).cost == without_seconds(result.cost)
        with recording(monkeypatch) as kept:
            result = writes.describe([picture(i) for i in range(3)], plan)
        work = predicted_texts(writes, plan, [described_tokens((4, 4))] * 3, kept, result)
        assert work.cost == without_seconds(result.cost)


def predicted_texts(writes: Sampler, plan: Plan, contexts: list[int], kept: Kept, result: Result) -> Work:
    texts = [Written(0, tuple(row)) for row in kept.rows]
    # which text has how many of the tokens does not matter to what they cost together
    texts[0] = replace(texts[0], tokens=result.cost.tokens)
    return predict_texts(facts_of(writes), plan, contexts, texts)


def test_a_text_that_is_cut_needs_a_pass_for_each_token_but_the_first():
    writes, plan = sampler(), Plan(max_tokens=5, temperature=0)
    cost = writes.complete(["red"], plan).cost
    assert cost.tokens == 5, "this model does not end of itself"
    contexts = [BEGIN + tokens for tokens in prompt_tokens(["red"])]
    assert predict_texts(facts_of(writes), plan, contexts, [Written.evenly(5)]).cost == without_seconds(cost)
    assert Written.evenly(5, 2.5).kept == (2.5, 2.5) and Written.evenly(1).kept == ()
    with pytest.raises(ValueError, match="1 contexts of 2 texts"):
        predict_texts(facts_of(writes), plan, contexts, [Written.evenly(5)] * 2)
    with pytest.raises(ValueError, match="tokens_per_pass 2: this model writes 1 at most"):
        predict_texts(facts_of(writes), Plan(tokens_per_pass=2), contexts, [Written.evenly(5)])
    with pytest.raises(ValueError, match="this model has no pictures"):
        predict_pictures(replace(facts_of(writes), channels={}), plan, [3], (4, 4))


def counted(call: Callable[[], Result]) -> tuple[Cost, int]:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = call()
    return result.cost, counter.get_total_flops()


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize(
    "plan",
    [
        Plan(steps=1),
        Plan(steps=3, guidance=2.0, guidance_range=(0.5, 1.0), solver="heun"),
        Plan(blocks=2, steps=2, guidance=2.0),
        Plan(blocks=4, steps=(3, 1, 1, 2)),
    ],
)
def test_the_count_is_torchs_own(trunk: str, plan: Plan):
    draws = sampler(TRUNKS[trunk])
    cost, operations = counted(lambda: draws.generate(PROMPTS, plan))
    assert cost.flops == operations
    assert predict_pictures(facts_of(draws), plan, prompt_tokens(PROMPTS), (4, 4)).cost.flops == operations


@pytest.mark.parametrize("joint", [None, *KINDS])
@pytest.mark.parametrize("trunk", TRUNKS)
def test_the_count_of_text_is_torchs_own(trunk: str, joint: str | None):
    writes = sampler(TRUNKS[trunk], joint=joint)
    plan = Plan(max_tokens=6, tokens_per_pass=3 if joint else 1)
    for call in (
        lambda: writes.complete(["a red square", "the"], plan, seed=1),
        lambda: writes.describe([picture(0), picture(1)], plan),
    ):
        cost, operations = counted(call)
        assert cost.flops == operations


def test_every_continuous_modality_costs_each_token_its_head():
    """A second one, that no picture needs, is paid for by pictures too; sizes of the first alone would be too few."""
    parts = build_modalities(
        {
            "text": {},
            "image": {"codec": "pixels", "patch": 4},
            "pulse": {"kind": "tests.modalities.test_new_modality:Pulse"},
        },
        tokenizer(),
    )
    draws = Sampler(Model(TINY, parts, tokenizer().vocab_size), parts, FLOW, (16, 16))
    plan = Plan(blocks=2, steps=2, guidance=2.0)
    cost, operations = counted(lambda: draws.generate(["red"], plan))
    facts = facts_of(draws)
    work = predict_pictures(facts, plan, prompt_tokens(["red"]), (4, 4))
    assert cost.flops == operations == work.cost.flops
    alone = replace(facts, channels={"image": facts.channels["image"]})
    assert predict_pictures(alone, plan, prompt_tokens(["red"]), (4, 4)).cost.flops < operations


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_costs_what_its_products_do(kind: str):
    config = JointConfig(cast(JointKind, kind), tokens=4, components=3, rank=8)
    net = model(joint=config)
    head = build_joint_head(config, TINY).double()
    hidden, uniform = torch.randn(1, TINY.width).double(), torch.rand(1, 3)
    with FlopCounterMode(display=False) as counter:
        head.start(hidden, net.vocabulary).extend(torch.tensor([5])).draw(uniform)
    assert draft_flops(config, TINY, 3, tokenizer().vocab_size) == counter.get_total_flops()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_bytes_of_the_cache_are_those_that_sessions_hold(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    sessions: list[Session] = []
    init = Session.__init__

    def record(self, *arguments):
        sessions.append(self)
        init(self, *arguments)

    monkeypatch.setattr(Session, "__init__", record)
    draws = Sampler(model(dtype=dtype), modalities(), MOMENTS, (16, 16))
    facts, tokens = facts_of(draws), prompt_tokens(PROMPTS)
    found = []
    for plan in (Plan(steps=1), Plan(blocks=3, steps=1), Plan(blocks=3, steps=1, guidance=2.0)):
        sessions.clear()
        cost = draws.generate(PROMPTS, plan).cost
        found.append(sum(session.cache.num_bytes for session in sessions))
        copied = 0
        if plan.guidance != 1:
            # both conditions' rows below each other, of the longest prompt, with the last band while it is noisy
            keys = BEGIN + max(tokens) + SIZE + 16
            copied = 2 * len(PROMPTS) * keys * facts.token_bytes
        assert predict_pictures(facts, plan, tokens, (4, 4)).cache_bytes == found[-1] + copied == cost.memory
    assert found[0] == found[1] < found[2], "a noisy block stands where its clean copy will"
    sessions.clear()
    plan = Plan(max_tokens=3)
    draws.complete(["red", "a large blue"], plan)
    contexts = [BEGIN + tokens for tokens in prompt_tokens(["red", "a large blue"])]
    work = predict_texts(facts, plan, contexts, [Written.evenly(3)] * 2)
    assert work.cache_bytes == sessions[0].cache.num_bytes


@pytest.mark.parametrize("joint", [None, "chain"])
def test_thoughts_and_candidates_cost_what_the_sampler_counts(joint: str | None):
    draws = sampler(objective=MOMENTS, joint=joint)
    facts, prompts = facts_of(draws), ["red square", "the picture of a large blue circle", "green"]
    plan = Plan(steps=2, guidance=2.0, candidates=3)
    cost = draws.generate(prompts, plan).cost
    predicted = predict_pictures(facts, plan, prompt_tokens(prompts), (4, 4)).cost
    assert without_seconds(cost) == predicted and cost.score_flops > 0
    for plan in (Plan(steps=1, thinking=5), Plan(blocks=2, steps=1, guidance=2.0, thinking=1, candidates=2)):
        cost = draws.generate(["red square"], plan, seed=3).cost
        assert cost.tokens == plan.thinking * plan.candidates, "this model does not end of itself"
        assert predict_pictures(facts, plan, prompt_tokens(["red square"]), (4, 4)).cost == without_seconds(
            cost
        )
    with pytest.raises(ValueError, match="scorer a:b: what it costs is not known"):
        predict_pictures(facts, Plan(candidates=2, scorer="a:b"), [3], (4, 4))
    mine = Plan(steps=3, solver="tests.sampling.test_answer:twice")
    cost = draws.generate(["red"], mine).cost
    assert predict_pictures(facts, mine, prompt_tokens(["red"]), (4, 4)).cost == without_seconds(cost)
    assert cost.nfe == 6
