"""Requests of all kinds: what each reads, what it gets, and that it gets the same alone and in a batch."""

from dataclasses import replace
from itertools import pairwise
from typing import cast

import PIL.Image
import pytest
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmgen.modalities import bands
from mmgen.model.joint import JointConfig, JointKind
from mmgen.objectives import IMM, FlowMatching, FlowMatchingConfig, IMMConfig, Objective
from mmgen.rng import keyed_numpy, keyed_torch
from mmgen.sampling.adaptive import Policy, answer_adaptively
from mmgen.sampling.cost import Cost, state_flops
from mmgen.sampling.loops import guided, one_by_one, pushforward
from mmgen.sampling.plan import Plan
from mmgen.sampling.request import Event, Request
from mmgen.sampling.sampler import Sampler
from mmgen.sampling.score import likelihood
from mmgen.sampling.session import Session
from mmgen.sequence import Span, Stream
from tests.parts import TINY, modalities, model, picture

MOMENTS = IMM(IMMConfig())
FLOW = FlowMatching(FlowMatchingConfig())
GREEDY = Plan(steps=2, temperature=0.0, max_tokens=9)


def sampler(
    objective: Objective = MOMENTS, joint: str | None = None, dtype: torch.dtype = torch.float64
) -> Sampler:
    head = None if joint is None else JointConfig(cast(JointKind, joint), tokens=4, components=3, rank=8)
    return Sampler(model(TINY, dtype=dtype, joint=head), modalities(), objective, (16, 16))


REQUESTS = [
    Request(("red square",)),
    Request((picture(0),), ("text",)),
    Request(("a large blue circle",), ("image", "text")),
    Request((), ("image", "image")),
    Request((picture(1), "green")),
    Request(("the small", picture(2), "on the white"), ("text", "image", "text")),
    Request(("a red", "square"), ("image",), (8, 24)),
    Request(("blue",)),
    Request(("small", picture(3)), ("text",)),
]


@pytest.mark.parametrize(
    "plan",
    [
        Plan(steps=2, max_tokens=7),
        Plan(blocks=2, steps=(2, 1), guidance=2.0, thinking=5, max_tokens=7, tokens_per_pass=3),
        Plan(steps=1, guidance=1.5, picture_guidance=3.0, max_tokens=3),
    ],
)
def test_requests_of_all_kinds_get_in_one_batch_what_they_get_alone(plan: Plan):
    draws = sampler(joint="chain")
    together = draws.answer(REQUESTS, plan, seed=7).answers
    for index, (request, answer) in enumerate(zip(REQUESTS, together, strict=True)):
        (alone,) = draws.answer([request], plan, seed=7 + index).answers
        assert [isinstance(part, str) for part in answer.parts] == [kind == "text" for kind in request.asked]
        assert [part for part in alone.parts if isinstance(part, str)] == [
            part for part in answer.parts if isinstance(part, str)
        ]
        assert alone.thoughts == answer.thoughts and len(alone.thoughts) == (
            request.asked.count("image") if plan.thinking else 0
        )
        for mine, others in zip(alone.latents, answer.latents, strict=True):
            torch.testing.assert_close(mine, others, rtol=0, atol=1e-5)


def draw_from(
    draws: Sampler,
    spans: list[Span],
    noise: Float[Tensor, "N C"],
    plan: Plan,
    grid: tuple[int, int] = (4, 4),
    null: list[Span] | None = None,
) -> Float[Tensor, "D h w"]:
    """One block, computed from scratch after `spans`."""
    image = draws.image
    outputs = []
    for own in [spans] if null is None else [spans, null]:
        size = image.size_span(*grid, own[-1].next_position, predicted=False)
        session = Session(draws.model, draws.modalities, 1, 128)
        session.read([[*own, size]])
        span = image.noisy_band(*grid, size.next_position, bands(*grid, 1)[0])
        outputs.append(session.output([span], draws.objective.told_target))
    times = [0.994 * (1 - i / plan.block_steps[0]) for i in range(plan.block_steps[0] + 1)]
    output = guided(one_by_one(*outputs), plan.guidance)
    x = pushforward(output, draws.objective.path.jump, 0.5 * noise[None].double(), times)
    return image.unpatchify(x[0].float(), *grid)


def picture_spans(draws: Sampler, latents: Tensor, start: int, noise) -> list[Span]:
    """A finished picture as later parts read it."""
    values, height, width = draws.image.patchify(latents)
    size = draws.image.size_span(height, width, start, predicted=False)
    read = draws.image.span(values, height, width, size.next_position, noise, read=True, predicted=False)
    return [size, read]


def greedy(draws: Sampler, spans: list[Span], end: int, num: int) -> list[int]:
    """Token by token, everything read anew each time."""
    tokenizer, ids = draws.text.tokenizer, []
    never = sorted(tokenizer.specials - {end})
    while len(ids) < num:
        more = [draws.text.span(ids, spans[-1].next_position, predicted=False)] if ids else []
        session = Session(draws.model, draws.modalities, 1, 128)
        with torch.no_grad():
            logits = draws.model.logits(session.read([[*spans, *more]]))[0]
        logits[never] = -torch.inf
        if (token := int(logits.argmax())) == end:
            break
        ids.append(token)
    return ids


@pytest.mark.parametrize(("joint", "per_pass"), [(None, 1), ("chain", 3), ("mixture", 4)])
def test_a_picture_then_a_text_then_a_picture_each_read_all_before_them(joint: str | None, per_pass: int):
    draws = sampler(joint=joint)
    plan = replace(GREEDY, tokens_per_pass=per_pass)
    request = Request(("red square",), ("image", "text", "image", "text"))
    (answer,) = draws.answer([request], plan, seed=5).answers
    spans = draws.documents.begin(["red square"], keyed_numpy)
    drawn = 0
    for number, (kind, part) in enumerate(zip(request.asked, answer.parts, strict=True)):
        if kind == "text":
            end = draws.text.tokenizer.height(4) if number == 1 else draws.text.tokenizer.end
            ids = greedy(draws, spans, end, 9)
            assert part == draws.text.tokenizer.decode(ids) and len(ids) > 2
            spans.append(draws.text.span(ids, spans[-1].next_position, predicted=False))
        else:
            key = (5, "picture", drawn) if drawn else (5, "picture")
            noise = torch.randn(16, draws.image.channels, generator=keyed_torch(*key))
            expected = draw_from(draws, spans, noise, plan)
            torch.testing.assert_close(answer.latents[drawn], expected, rtol=0, atol=1e-6)
            commit = keyed_numpy(5, "commit", drawn) if drawn else keyed_numpy(5, "commit")
            spans += picture_spans(draws, answer.latents[drawn], spans[-1].next_position, commit)
            drawn += 1


@pytest.mark.parametrize(("joint", "per_pass"), [(None, 1), ("chain", 4)])
def test_a_thought_is_text_that_the_picture_reads(joint: str | None, per_pass: int):
    draws = sampler(joint=joint)
    plan = replace(GREEDY, thinking=6, tokens_per_pass=per_pass, guidance=2.0)
    (answer,) = draws.answer([Request(("red square",))], plan, seed=3).answers
    spans = draws.documents.begin(["red square"], keyed_numpy)
    spans.append(draws.text.span(draws.text.separator(), spans[-1].next_position, predicted=False))
    ids = greedy(draws, spans, draws.text.tokenizer.height(4), 6)
    assert answer.thoughts == (draws.text.tokenizer.decode(ids),) and ids
    spans.append(draws.text.span(ids, spans[-1].next_position, predicted=False))
    noise = torch.randn(16, draws.image.channels, generator=keyed_torch(3, "picture"))
    null = draws.documents.begin([], keyed_numpy)
    torch.testing.assert_close(
        answer.latents[0], draw_from(draws, spans, noise, plan, null=null), rtol=0, atol=1e-6
    )
    without = draws.generate(["red square"], replace(plan, thinking=0), seed=3).latents
    assert (without[0] - answer.latents[0]).abs().max() > 1e-3


@pytest.mark.parametrize(("joint", "per_pass"), [(None, 1), ("chain", 2), ("chain", 4)])
def test_a_thought_after_a_text_is_parted_from_it(joint: str | None, per_pass: int):
    """However many of the text's tokens a pass has read."""
    draws = sampler(joint=joint)
    prompts = ["red square", "a large blue circle", "the small", "green"]
    requests = [Request((prompt,), ("text", "image")) for prompt in prompts]
    for num in range(1, 7):
        plan = replace(GREEDY, thinking=4, tokens_per_pass=per_pass, max_tokens=num)
        for prompt, answer in zip(prompts, draws.answer(requests, plan, seed=3).answers, strict=True):
            spans, end = draws.documents.begin([prompt], keyed_numpy), draws.text.tokenizer.height(4)
            for found, limit in ((answer.parts[0], num), (answer.thoughts[0], 4)):
                ids = greedy(draws, spans, end, limit)
                assert found == draws.text.tokenizer.decode(ids)
                more = [*ids, *draws.text.separator()]
                spans.append(draws.text.span(more, spans[-1].next_position, predicted=False))


def test_the_contexts_of_guidance_are_read_in_one_pass(monkeypatch: pytest.MonkeyPatch):
    """Prompts of unlike lengths and their null beside them, as if each had been read by itself."""
    draws, plan = sampler(), Plan(steps=2, guidance=2.0)
    prompts = ["red square", "a large blue circle on the white", "green"]
    read, expand = [], draws.model.expand

    def counted(stream: Stream, *others):
        read.append(stream.ids.shape)
        return expand(stream, *others)

    monkeypatch.setattr(draws.model, "expand", counted)
    drawn = draws.generate(prompts, plan, seed=5).latents
    null = draws.documents.begin([], keyed_numpy)
    longest = max(sum(map(len, draws.documents.begin([prompt], keyed_numpy))) for prompt in prompts)
    assert read == [(3, longest + 2 + sum(map(len, null)) + 2)]
    for index, prompt in enumerate(prompts):
        spans = draws.documents.begin([prompt], keyed_numpy)
        noise = torch.randn(16, draws.image.channels, generator=keyed_torch(5 + index, "picture"))
        alone = draw_from(draws, spans, noise, plan, null=null)
        torch.testing.assert_close(drawn[index], alone, rtol=0, atol=1e-6)


def test_pictures_and_texts_of_a_condition_guide_apart():
    draws, given = sampler(), (picture(1), "green")
    one = Plan(steps=1)

    def drawn(parts: tuple, plan: Plan) -> Tensor:
        return draws.answer([Request(parts)], plan, seed=4).answers[0].latents[0].double()

    null, pictures, full = (drawn(parts, one) for parts in ((), given[:1], given))
    # the second picture of a document has a noise of its own, so the null one is drawn with that
    noise = torch.randn(16, draws.image.channels, generator=keyed_torch(4, "picture", 1))
    null = draw_from(draws, draws.documents.begin([], keyed_numpy), noise, one).double()
    apart = drawn(given, replace(one, guidance=2.0, picture_guidance=3.0))
    torch.testing.assert_close(apart, null + 3 * (pictures - null) + 2 * (full - pictures), rtol=0, atol=1e-4)
    both = drawn(given, replace(one, guidance=2.0, picture_guidance=2.0))
    torch.testing.assert_close(both, drawn(given, replace(one, guidance=2.0)), rtol=0, atol=1e-6)
    costs = [
        draws.answer([Request(given)], plan).cost.nfe
        for plan in (one, replace(one, guidance=2.0), replace(one, guidance=2.0, picture_guidance=3.0))
    ]
    assert costs == [1, 2, 3]


def brightest(sampler: Sampler, requests: list[Request], latents: Tensor, cost: Cost) -> Tensor:
    """A scorer of one's own."""
    return latents.flatten(1).mean(1)


def no_scorer() -> None: ...


def test_of_several_candidates_the_one_that_the_scorer_likes_best_is_kept():
    draws = sampler()
    plan = Plan(steps=2, candidates=5, scorer=f"{__name__}:brightest")
    requests = [Request(("red",)), Request(("blue circle",))]
    kept = draws.answer(requests, plan, seed=2)
    for index, (request, answer) in enumerate(zip(requests, kept.answers, strict=True)):
        spans = draws.documents.begin(request.given, keyed_numpy)
        seed = 2 + index
        keys = [(seed, "picture"), *((seed, "candidate", c, "picture") for c in range(1, 5))]
        noises = [torch.randn(16, draws.image.channels, generator=keyed_torch(*key)) for key in keys]
        all_five = [draw_from(draws, spans, noise, plan) for noise in noises]
        best = max(all_five, key=lambda latents: latents.mean())
        torch.testing.assert_close(answer.latents[0], best, rtol=0, atol=1e-6)
        assert answer.score == pytest.approx(best.mean().item(), abs=1e-6)
    one = draws.answer(requests, replace(plan, candidates=1), seed=2)
    assert kept.cost.nfe == 5 * one.cost.nfe
    # but for the modulation, which is made once a step for all that are drawn together
    modulation = 2 * state_flops(draws.model.config, 1, 0, 0, 0, 0)
    assert kept.cost.refine_flops == pytest.approx(5 * one.cost.refine_flops - 4 * modulation)


def test_the_likelihood_of_a_text_after_a_picture_is_the_trunks():
    draws = sampler()
    latents = torch.stack([draws.generate(["red"], Plan(steps=1), seed=i).latents[0] for i in range(3)])
    requests = [Request(("red square",)), Request(("a large blue circle",)), Request(("red square",))]
    cost = Cost()
    scores = likelihood(draws, requests, latents, cost)
    for request, own, score in zip(requests, latents, scores, strict=True):
        begin = draws.documents.begin([], keyed_numpy)
        ids = [*draws.text.tokenizer.encode(str(request.given[0])), draws.text.tokenizer.end]
        spans = [*begin, *picture_spans(draws, own, 1, keyed_numpy("score"))]
        text = draws.text.span(ids, spans[-1].next_position, predicted=False)
        with torch.no_grad():
            hidden = Session(draws.model, draws.modalities, 1, 64).read_all([[*spans, text]])[0]
            log_probs = draws.model.logits(hidden[-len(ids) - 1 : -1]).log_softmax(-1)
        expected = log_probs.gather(-1, torch.tensor(ids)[:, None]).sum()
        torch.testing.assert_close(score, expected, rtol=1e-9, atol=1e-9)
    assert cost.score_flops > 0 and cost.prefill_flops == 0
    with pytest.raises(ValueError, match="without a text has none to be likely"):
        draws.answer([Request()], Plan(candidates=2))


def test_candidates_of_what_is_no_picture_and_scorers_that_are_none_are_refused():
    draws = sampler()
    with pytest.raises(ValueError, match="candidates 2: scorers judge pictures"):
        draws.answer([Request(("red",), ("text",))], Plan(candidates=2))
    with pytest.raises(ValueError, match="scorer 'mmgen.nowhere:best' cannot be imported"):
        draws.answer([Request(("red",))], Plan(candidates=2, scorer="mmgen.nowhere:best"))
    with pytest.raises(ValueError, match="scorer 'best' is none of likelihood, nor package.module:function"):
        Plan(scorer="best")
    with pytest.raises(ValueError, match="thinking -1 must be at least 0"):
        Plan(thinking=-1)


def twice(output, jump, x, times):
    """A solver of one's own: every jump is made again from where it began, and the two are averaged."""
    for t, s in pairwise(times):
        first, second = (jump(output(x, t, s), x, t, s) for _ in range(2))
        x = (first + second) / 2
    return x


def test_a_solver_of_ones_own_is_called_as_pushforward_is():
    draws = sampler(FLOW)
    plan = Plan(steps=3)
    mine = draws.generate(["red"], replace(plan, solver=f"{__name__}:twice"))
    torch.testing.assert_close(mine.latents, draws.generate(["red"], plan).latents)
    assert mine.cost.nfe == 6
    with pytest.raises(ValueError, match="solver 'eular' is none of euler, heun, restart"):
        Plan(solver="eular")
    with pytest.raises(
        ValueError, match="solver 'mmgen.sampling.plan:SOLVERS' is tuple, which cannot be called"
    ):
        draws.generate(["red"], replace(plan, solver="mmgen.sampling.plan:SOLVERS"))
    with pytest.raises(ValueError, match=r"no_scorer' must take \(output, jump, x, times\): too many"):
        draws.generate(["red"], replace(plan, solver=f"{__name__}:no_scorer"))


def scores_badly(sampler: Sampler, requests: list[Request], latents: Tensor, cost: Cost) -> Tensor:
    return latents.flatten(1).mean(1) / 0


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ("no_scorer", r"scorer '.*no_scorer' must take \(sampler, requests, latents, cost\): too many"),
        ("scores_badly", "scores_badly must give 2 finite scores, one a request, not tensor"),
    ],
)
def test_a_scorer_that_cannot_be_used_is_refused(scorer: str, message: str):
    with pytest.raises(ValueError, match=message):
        sampler().generate(["red"], Plan(steps=1, candidates=2, scorer=f"{__name__}:{scorer}"))


def test_what_is_no_request_is_refused():
    with pytest.raises(ValueError, match=r"given 'red' must be parts in reading order, such as \('red',\)"):
        Request("red")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="asked 'text' must be parts"):
        Request(("red",), "text")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="seed: 1 of them for 2 requests"):
        sampler().answer(REQUESTS[:2], GREEDY, [3])


def test_whoever_listens_hears_every_token_and_every_block():
    draws, heard = sampler(joint="chain"), []
    plan = Plan(blocks=2, steps=1, thinking=4, max_tokens=6, tokens_per_pass=2)
    requests = [Request(("red",), ("image", "text")), Request(("a large blue",), ("image", "text"))]
    answers = draws.answer(requests, plan, seed=1, listen=heard.append).answers

    def of(request: int, thought: bool = False, text: bool = False) -> list[Event]:
        events = [event for event in heard if event.request == request and event.thought == thought]
        return [event for event in events if (event.text is not None) == (text or thought)]

    for index, answer in enumerate(answers):
        texts = of(index, text=True)
        assert texts[-1].text == answer.parts[1].rstrip("\ufffd") and {event.part for event in texts} == {1}
        assert all(answer.parts[1].startswith(event.text) for event in texts) and len(texts) > 2
        assert of(index, thought=True)[-1].text == answer.thoughts[0].rstrip("\ufffd")
        blocks = of(index)
        assert [event.blocks for event in blocks] == [1, 2]
        torch.testing.assert_close(blocks[1].latents, answer.latents[0])
        torch.testing.assert_close(blocks[0].latents[:, :8], answer.latents[0][:, :8])
        assert (blocks[0].latents[:, 8:] - answer.latents[0][:, 8:]).abs().max() > 1e-3


def test_costs_of_all_parts_are_the_flops_that_the_counter_sees():
    draws = sampler(joint="chain")
    plan = Plan(blocks=2, steps=2, guidance=2.0, thinking=4, max_tokens=5, tokens_per_pass=2, candidates=2)
    request = Request(("a red square", picture(0)), ("image", "text"))
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        cost = draws.answer([request], plan).cost
    counted = counter.get_total_flops()
    assert abs(cost.flops - counted) / counted < 0.01
    assert cost.nfe == 2 * 2 * 2 * 2


def test_requests_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="asked .* must be one or more of 'text' and 'image'"):
        Request(("red",), ())
    with pytest.raises(ValueError, match="two texts in turn are one"):
        Request(("red",), ("text", "text"))
    with pytest.raises(ValueError, match="given int: a part is a text or a picture"):
        Request((1,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="17x16 pixels: both must be multiples of 4"):
        sampler().answer([Request((PIL.Image.new("RGB", (16, 17)),), ("text",))])


def test_a_policy_draws_again_what_its_scorer_dislikes():
    draws = sampler()
    requests = [Request((text,)) for text in ("red", "a large blue", "green", "the white square")]
    first, then = Plan(steps=1), Plan(steps=3, guidance=2.0)
    scorer = f"{__name__}:brightest"

    def scored(plan: Plan) -> tuple[list[Tensor], list[float]]:
        latents = [answer.latents[0] for answer in draws.answer(requests, plan, seed=4).answers]
        return latents, [each.mean().item() for each in latents]

    (few, low), (many, high) = scored(first), scored(then)
    threshold = sorted(low)[1] + 1e-9  # two of four are drawn again
    found = answer_adaptively(draws, requests, Policy(first, then, threshold, scorer), seed=4)
    again = [score < threshold for score in low]
    assert sum(again) == 2
    for i, answer in enumerate(found.answers):
        expected = many[i] if again[i] and high[i] > low[i] else few[i]
        torch.testing.assert_close(answer.latents[0], expected, rtol=0, atol=1e-6)
        assert answer.score == pytest.approx(expected.mean().item(), abs=1e-6)
    alone = [draws.answer(requests, plan, seed=4).cost for plan in (first, then)]
    assert found.cost.nfe == 1 + 6
    # rows are padded to the longest of their batch
    both = alone[0].refine_flops + alone[1].refine_flops / 2
    assert found.cost.refine_flops == pytest.approx(both, rel=0.05)
    none = answer_adaptively(draws, requests, Policy(first, then, min(low), scorer), seed=4)
    assert none.cost.nfe == 1
    with pytest.raises(ValueError, match="goes by scores of pictures, and a request asks for none"):
        answer_adaptively(draws, [Request(("red",), ("text",))], Policy(first, then, 0.0))
