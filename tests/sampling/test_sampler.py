"""What a request gets depends on the request alone, and on the model as it was trained."""

import copy
from collections import Counter
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

from mmgen.data.pack import PackConfig, Packer
from mmgen.modalities import bands
from mmgen.model.joint import JointConfig, JointKind
from mmgen.model.model import plan_batch
from mmgen.objectives import IMM, FlowMatching, FlowMatchingConfig, IMMConfig, Objective
from mmgen.rng import keyed_numpy, keyed_torch
from mmgen.sampling.loops import guided, one_by_one, pushforward, tempered
from mmgen.sampling.plan import Plan
from mmgen.sampling.sampler import Sampler
from mmgen.sampling.session import Session
from mmgen.sequence import Span
from tests.parts import TINY, documents, modalities, model, picture

PROMPTS = ["red square", "a large blue circle on the white square", "the picture", None, "green"]


FLOW = FlowMatching(FlowMatchingConfig())
MOMENTS = IMM(IMMConfig())


KINDS = ("independent", "mixture", "hmm", "chain")


def sampler(
    dtype: torch.dtype = torch.float64,
    objective: Objective = FLOW,
    joint: str | None = None,
    **overrides: object,
) -> Sampler:
    head = None if joint is None else JointConfig(cast(JointKind, joint), tokens=4, components=3, rank=8)
    net = model(replace(TINY, **overrides), dtype=dtype, joint=head)
    return Sampler(net, modalities(), objective, (16, 16))


@pytest.mark.parametrize(
    ("objective", "plan"),
    [
        (FLOW, Plan(steps=3)),
        (FLOW, Plan(steps=3, guidance=2.5)),
        (MOMENTS, Plan(steps=3, guidance=2.5)),
        (MOMENTS, Plan(blocks=2, steps=(3, 1), guidance=2.5)),
        (MOMENTS, Plan(blocks=2, steps=3, guidance=2.5, guidance_range=(0.3, 0.9), solver="restart")),
    ],
)
def test_pictures_batched_equal_one_by_one(objective: Objective, plan: Plan):
    draws = sampler(torch.float32, objective)
    together = draws.generate(PROMPTS, plan, seed=7).latents
    assert together is not None
    for index, prompt in enumerate(PROMPTS):
        alone = draws.generate([prompt], plan, seed=7 + index).latents
        torch.testing.assert_close(alone[0], together[index], rtol=0, atol=1e-4)
    assert (together[0] - draws.generate(PROMPTS[:1], plan, seed=8).latents[0]).abs().max() > 0.1, (
        "seeds matter"
    )


@pytest.mark.parametrize(("objective", "grid"), [(FLOW, [1.0, 0.5, 0.0]), (MOMENTS, [0.994, 0.497, 0.0])])
def test_the_objective_says_where_sampling_runs_and_what_the_network_is_told(
    monkeypatch: pytest.MonkeyPatch, objective: Objective, grid: list[float]
):
    """IMM knows its target and starts where eta ends; flow matching knows where it is."""
    draws = sampler(torch.float32, objective)
    seen = []
    refine = draws.model.refine

    def record(stream, x, t, s, attend, past):
        seen.append((x["image"].dtype, float(t[0]), float(s[0])))
        return refine(stream, x, t, s, attend, past)

    monkeypatch.setattr(draws.model, "refine", record)
    draws.generate(["red"], Plan(steps=2))
    told = grid[1:] if objective is MOMENTS else grid[:-1]
    assert [t for _, t, _ in seen] == pytest.approx(grid[:-1])
    assert [s for _, _, s in seen] == pytest.approx(told)
    assert {dtype for dtype, _, _ in seen} == {torch.float64}, "the state's, whatever the network's"


def test_texts_batched_equal_one_by_one():
    writes = sampler()
    plan = Plan(max_tokens=12)
    pictures = [picture(i) for i in range(5)]
    together = writes.describe(pictures, plan, seed=3).text
    assert together == [writes.describe([p], plan, seed=3 + i).text[0] for i, p in enumerate(pictures)]
    assert len(set(together)) == 5
    together = writes.complete(["red", "a large blue", "the"], plan, seed=3).text
    assert together == [
        writes.complete([p], plan, seed=3 + i).text[0] for i, p in enumerate(["red", "a large blue", "the"])
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_several_tokens_a_pass_are_one_by_one_what_they_are_in_a_batch(kind: str):
    writes = sampler(joint=kind)
    plan = Plan(max_tokens=12, tokens_per_pass=3)
    prompts = ["red", "a large blue", "the", "a picture of the small green square"]
    together = writes.complete(prompts, plan, seed=3)
    assert together.text == [writes.complete([p], plan, seed=3 + i).text[0] for i, p in enumerate(prompts)]
    assert together.cost.tokens > together.cost.passes


@pytest.mark.parametrize("kind", KINDS)
def test_the_likeliest_text_is_the_same_however_many_tokens_a_pass_writes(kind: str):
    writes = sampler(joint=kind)
    pictures = [picture(i) for i in range(4)]
    texts = [
        writes.describe(pictures, Plan(max_tokens=15, tokens_per_pass=k, temperature=0)).text
        for k in (1, 2, 3, 4)
    ]
    assert texts[0] == texts[1] == texts[2] == texts[3]
    unverified = Plan(max_tokens=15, tokens_per_pass=4, temperature=0, verify=False)
    assert writes.describe(pictures, unverified).text != texts[0], "the control: an untrained head's own text"


@pytest.mark.parametrize("kind", KINDS)
def test_two_tokens_of_a_real_model_have_its_law(kind: str):
    """A chi-square over the texts of two tokens, whose law is enumerated; drafts kept unseen fail it."""
    writes, num = sampler(joint=kind), 4000
    plan = Plan(max_tokens=2, tokens_per_pass=3, top_p=0.3)
    tokenizer = writes.text.tokenizer
    expected: dict[str, float] = Counter()
    for first, p in following(writes, [], plan).items():
        if first == tokenizer.end:
            expected[""] += p * num
            continue
        for second, q in following(writes, [first], plan).items():
            ids = [first] if second == tokenizer.end else [first, second]
            expected[tokenizer.decode(ids)] += p * q * num
    assert sum(expected.values()) == pytest.approx(num)
    frequent = [text for text, due in expected.items() if due > 5]
    assert len(frequent) > 20

    def pvalue(plan: Plan) -> float:
        seen = Counter(writes.complete(["red"] * num, plan).text)
        counts = np.array([seen[text] for text in frequent])
        due = np.array([expected[text] for text in frequent])
        both = [[*each, num - each.sum()] for each in (counts, due)]
        return stats.chisquare(*both).pvalue

    assert pvalue(plan) > 1e-3
    assert pvalue(replace(plan, verify=False)) < 1e-6


def prompt(draws: Sampler, text: str | None) -> list[Span]:
    return draws.documents.begin([] if text is None else [text], keyed_numpy)


def following(writes: Sampler, ids: list[int], plan: Plan) -> dict[int, float]:
    """The law of the token after "red" and `ids`."""
    spans = prompt(writes, "red")
    if ids:
        spans.append(writes.text.span(ids, spans[-1].next_position, predicted=False))
    with torch.no_grad():
        logits = writes.model.logits(Session(writes.model, modalities(), 1, 64).read([spans]))[0]
    logits[sorted(writes.text.tokenizer.specials - {writes.text.tokenizer.end})] = -torch.inf
    law = tempered(logits, plan.temperature, plan.top_p).exp()
    return {i: float(p) for i, p in enumerate(law) if p > 0}


def test_tokens_that_are_taken_back_leave_no_trace():
    """Rows that forget different numbers of tokens go on as rows that never read them, and use their places again."""
    net, parts = model(), modalities()
    rows = [[parts["text"].begin()] for _ in range(3)]
    session = Session(net, parts, 3, 7)
    session.read(rows)
    for tokens, kept in (([5, 6, 7], [1, 3, 0]), ([8, 9, 5], [2, 0, 1])):
        read_ids(session, [tokens] * 3)
        session.forget([3 - num for num in kept])
        rows = [
            [*row, *(parts["text"].span([token], len(row) + i, predicted=False) for i, token in enumerate(tokens[:n]))]
            for row, n in zip(rows, kept, strict=True)
        ]  # fmt: skip
    assert session.cache.lengths == [4, 4, 2]
    last = read_ids(session, [[7, 8]] * 3)
    for row, spans in enumerate(rows):
        fresh = Session(net, parts, 1, 8)
        fresh.read([spans])
        torch.testing.assert_close(last[row], read_ids(fresh, [[7, 8]])[0])


def test_what_is_read_is_written_in_place():
    """Keys and values stay in the tensors that the first pass made, and what is there already stays as it is."""
    net, parts = model(), modalities()
    session = Session(net, parts, 2, 9)
    session.read([[parts["text"].begin()]] * 2)
    held = [[tensor.data_ptr() for tensor in layer.kv] for layer in session.cache.layers]
    for ids, num_kept in (([[5, 6], [7, 8]], [2, 1]), ([[4, 4, 4], [9, 9, 9]], [3, 3])):
        before = [tensor.clone() for pair in session.cache.past() for tensor in pair]
        read_ids(session, ids)
        after = [tensor for pair in session.cache.past() for tensor in pair]
        for a, b in zip(before, after, strict=True):
            for row, length in enumerate(session.cache.lengths):
                old = length - len(ids[row])
                assert torch.equal(a[row, :old], b[row, :old]) and b[row, old:length].ne(0).all()
        session.forget([len(row) - num for row, num in zip(ids, num_kept, strict=True)])
    assert held == [[tensor.data_ptr() for tensor in layer.kv] for layer in session.cache.layers]


def read_ids(session: Session, ids: list[list[int]]) -> torch.Tensor:
    text = session.modalities["text"]
    starts = list(session.positions)
    return session.read_all(
        [[text.span(row, start, predicted=False)] for row, start in zip(ids, starts, strict=True)]
    )


def test_more_tokens_a_pass_than_a_head_says_are_refused():
    with pytest.raises(ValueError, match="tokens_per_pass 2: this model has no joint head"):
        sampler().complete(["red"], Plan(tokens_per_pass=2))
    with pytest.raises(ValueError, match="tokens_per_pass 5: this model has a joint head of 4 tokens"):
        sampler(joint="chain").describe([picture(0)], Plan(tokens_per_pass=5))


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_sampling_calls_what_training_calls(blocks: int):
    """G of the same noisy picture at the same times: from the packed batch of training, and from a session's cache."""
    net = model()
    parts = modalities()
    image = parts["image"]
    items = documents(3, blocks={"counts": [blocks]})
    packer = Packer(PackConfig(1, 256, 128), parts)
    assert all(packer.add(document) for document in items)
    batch = packer.finish()
    x = torch.randn(1, 128, image.channels, dtype=torch.float64)
    t, s = (torch.full((3 * blocks,), time, dtype=torch.float64) for time in (0.7, 0.2))
    _, outputs, _ = net(batch, {"image": x}, t, s, plan_batch(batch, "runs"))
    trained, noisy = (each[0, :48].view(3, 16, -1) for each in (outputs["image"], x))
    session = Session(net, parts, 3, 64)
    session.read([document.spans[:-1] for document in items])
    starts = list(session.positions)
    pictures = [document.spans[-1] for document in items]
    for band in bands(4, 4, blocks):
        spans = [image.noisy_band(4, 4, start, band) for start in starts]
        sampled = session.output(spans, lambda t, s: s)(noisy[:, band], 0.7, 0.2)
        torch.testing.assert_close(sampled, trained[:, band], rtol=1e-9, atol=1e-10)
        if band.stop < 16:
            session.read(
                [
                    [image.finished_band(span, whole.values[band], whole.committed[band])]
                    for span, whole in zip(spans, pictures, strict=True)
                ]
            )


def test_a_picture_in_one_block_is_one_pushforward():
    draws = sampler(objective=MOMENTS)
    drawn = draws.generate(["red square"], Plan(steps=3), seed=5).latents
    image = draws.image
    session = Session(draws.model, draws.modalities, 1, 64)
    condition = prompt(draws, "red square")
    session.read([[*condition, image.size_span(4, 4, condition[-1].next_position, predicted=False)]])
    output = session.output([image.noisy_band(4, 4, session.positions[0], slice(0, 16))], MOMENTS.told_target)
    noise = torch.randn(16, image.channels, generator=keyed_torch(5, "picture")).double()
    x = pushforward(output, MOMENTS.path.jump, noise[None] * 0.5, [0.994 * t for t in (1, 2 / 3, 1 / 3, 0)])
    torch.testing.assert_close(drawn[0], image.unpatchify(x[0].float(), 4, 4), rtol=0, atol=1e-6)


def test_restart_draws_new_noise_for_every_request_block_and_step():
    """Two steps: a jump to the data, noise of the request's own generator at the middle time, and a jump from there."""
    draws = sampler(objective=MOMENTS)
    path, image = MOMENTS.path, draws.image
    drawn = draws.generate(["red square"], Plan(steps=2, solver="restart"), seed=5).latents
    session = Session(draws.model, draws.modalities, 1, 64)
    condition = prompt(draws, "red square")
    session.read([[*condition, image.size_span(4, 4, condition[-1].next_position, predicted=False)]])
    output = session.output([image.noisy_band(4, 4, session.positions[0], slice(0, 16))], MOMENTS.told_target)
    x, fresh = (
        0.5 * torch.randn(1, 16, image.channels, generator=keyed_torch(*key)).double()
        for key in ((5, "picture"), (5, "restart", 0))
    )
    x = path.jump(output(x, 0.994, 0.0), x, 0.994, 0.0)
    x = path.add_noise(x, fresh, 0.497)
    x = path.jump(output(x, 0.497, 0.0), x, 0.497, 0.0)
    torch.testing.assert_close(drawn[0], image.unpatchify(x[0].float(), 4, 4), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="solver restart jumps far"):
        sampler().generate(["red"], Plan(solver="restart"))


def test_steps_outside_of_the_guidance_range_cost_one_call():
    draws = sampler(objective=MOMENTS)
    plan = Plan(steps=4, guidance=2.0)
    both = draws.generate(["red"], plan).cost
    few = draws.generate(["red"], replace(plan, guidance_range=(0.3, 0.8))).cost  # t = .994 .7455 .497 .2485
    assert (both.nfe, few.nfe) == (8, 6)
    assert few.refine_flops < both.refine_flops


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_blocks_through_the_cache_equal_blocks_computed_from_scratch(guidance: float):
    """Every band anew: what is above it is read with the condition, in one go."""
    draws, plan = sampler(objective=MOMENTS), Plan(blocks=3, steps=(2, 1, 3), guidance=guidance)
    drawn = draws.generate(["red square"], plan, seed=5).latents
    image, jump = draws.image, MOMENTS.path.jump
    x = 0.5 * torch.randn(16, image.channels, generator=keyed_torch(5, "picture")).double()
    noise, read = keyed_numpy(5, "commit"), []
    for band, steps in zip(bands(4, 4, 3), plan.block_steps, strict=True):
        outputs = []
        for text in ("red square", None):
            condition = prompt(draws, text)
            size = image.size_span(4, 4, condition[-1].next_position, predicted=False)
            start = size.next_position
            above = [
                image.finished_band(image.noisy_band(4, 4, start, part), values, committed)
                for part, values, committed in read
            ]
            session = Session(draws.model, draws.modalities, 1, 64)
            session.read([[*condition, size, *above]])
            outputs.append(session.output([image.noisy_band(4, 4, start, band)], MOMENTS.told_target))
        times = [0.994 * (1 - i / steps) for i in range(steps + 1)]
        x[band] = pushforward(guided(one_by_one(*outputs), guidance), jump, x[None, band], times)[0]
        values = x[band].float()
        read.append((band, values, image.commit(values, noise)))
    torch.testing.assert_close(drawn[0], image.unpatchify(x.float(), 4, 4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("joint", [None, "chain"])
def test_bfloat16_draws_nearly_the_same_from_half_the_cache(joint: str | None):
    wide = sampler(torch.float32, MOMENTS, joint)
    narrow = Sampler(wide.model, wide.modalities, wide.objective, wide.size, precision="bf16")
    plan = Plan(steps=2, blocks=2, guidance=1.5)
    drawn, other = (draws.generate(PROMPTS, plan, seed=7) for draws in (wide, narrow))
    assert drawn.latents is not None and other.latents is not None
    difference = (drawn.latents - other.latents).norm() / drawn.latents.norm()
    assert 0 < difference < 0.02
    assert (other.cost.memory, other.cost.flops) == (drawn.cost.memory / 2, drawn.cost.flops)
    assert (narrow.facts.value_bytes, wide.facts.value_bytes) == (2, 4)
    kept = copy.deepcopy(wide.model)
    kept.trunk.narrow_weights()
    again = Sampler(kept, wide.modalities, wide.objective, wide.size, precision="bf16")
    assert torch.equal(again.generate(PROMPTS, plan, seed=7).latents, other.latents)
    text = narrow.complete(["red"], Plan(max_tokens=6, tokens_per_pass=1 if joint is None else 4))
    assert text.cost.tokens == 6, "the law of a token is made of wide numbers still"
    nats = [draws.bits(["a red square"])[0] for draws in (wide, narrow)]
    np.testing.assert_allclose(*nats, rtol=1e-2)
    with pytest.raises(ValueError, match="precision 'fp8' must be one of float32, bf16"):
        Sampler(wide.model, wide.modalities, wide.objective, precision="fp8")  # pyright: ignore[reportArgumentType]


def test_more_blocks_than_rows_are_refused():
    with pytest.raises(ValueError, match="blocks 5: a picture of 4 rows of tokens has 1 to 4"):
        sampler().generate(["red"], Plan(blocks=5))
    with pytest.raises(ValueError, match=r"steps \(1, 2\) must be one number, or one for each of 3 blocks"):
        Plan(blocks=3, steps=(1, 2))
    with pytest.raises(ValueError, match=r"steps \(1, 0\) must be at least 1"):
        Plan(blocks=2, steps=(1, 0))


def test_refining_writes_nothing_to_the_context():
    net = model()
    (document,) = documents(1)
    session = Session(net, modalities(), 1, 64)
    session.read([document.spans[:-1]])
    before = [tensor.clone() for pair in session.cache.past() for tensor in pair]
    output = session.output([document.spans[-1]], lambda t, s: s)
    first = output(torch.zeros(1, 16, 48).double(), 0.9, 0.1)
    output(torch.ones(1, 16, 48).double(), 0.5, 0.1)
    assert torch.equal(first, output(torch.zeros(1, 16, 48).double(), 0.9, 0.1))
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, [x for pair in session.cache.past() for x in pair], strict=True)
    )


def test_bits_are_those_of_the_training_batch():
    """The likelihood of a text from `bits` is that of the same document through the training path."""
    writes = sampler()
    text = "a red square on the blue circle"
    nats, num_bytes = writes.bits([text, "red"])
    assert num_bytes.tolist() == [len(text), 3]
    tokenizer = writes.text.tokenizer
    ids = torch.tensor([[tokenizer.begin, *tokenizer.encode(text), tokenizer.end]])
    session = Session(writes.model, modalities(), 1, 64)
    stream_hidden = session.read_all([[writes.text.span(ids[0].tolist(), 0, predicted=False)]])
    log_probs = writes.model.logits(stream_hidden).log_softmax(-1)
    expected = -log_probs[0, :-1].gather(-1, ids[0, 1:, None]).sum().item()
    np.testing.assert_allclose(nats[0], expected, rtol=1e-9)


def test_a_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="17x16 pixels: both must be multiples of 4"):
        sampler().generate(["red"], size=(17, 16))


def test_another_size_is_drawn():
    result = sampler().generate(["red"], Plan(steps=1), size=(8, 24))
    assert result.images[0].size == (24, 8)


def test_texts_hold_no_special_tokens_and_stop_at_the_end():
    writes = sampler()
    tokenizer = writes.text.tokenizer
    with torch.no_grad():  # a model that wants nothing but size tokens, and then the end
        writes.model.text_embedding.weight[tokenizer.height(1)] += 100 * writes.model.trunk.norm.weight
        writes.model.text_embedding.weight[tokenizer.end] += 50 * writes.model.trunk.norm.weight
    tokens_used = []
    original = writes.model.logits
    writes.model.logits = lambda hidden: tokens_used.append(1) or original(hidden)
    text = writes.complete(["red"], Plan(max_tokens=20)).text[0]
    assert len(tokens_used) < 20
    assert "height" not in text


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("overrides", [{}, {"time": "add", "num_kv_heads": 4}])
def test_costs_are_the_flops_that_the_counter_sees(overrides: dict, blocks: int):
    draws = sampler(**overrides)
    plan = Plan(blocks=blocks, steps=3, guidance=2.0)
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        result = draws.generate(PROMPTS, plan)
    assert result.cost.nfe == 6 * blocks
    counted = counter.get_total_flops()
    assert abs(result.cost.flops - counted) / counted < 0.01


@pytest.mark.parametrize("joint", [None, *KINDS])
def test_costs_of_text_are_the_flops_that_the_counter_sees(joint: str | None):
    draws = sampler(joint=joint)
    per_pass = 1 if joint is None else 3
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        result = draws.complete(["a red square"], Plan(max_tokens=6, tokens_per_pass=per_pass), seed=1)
    counted = counter.get_total_flops()
    assert abs(result.cost.flops - counted) / counted < 0.01
