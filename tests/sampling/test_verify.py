"""Verification by enumeration: whatever was drafted, what is committed has the trunk's law, not nearly but exactly."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from mmgen.config import from_mapping
from mmgen.model.joint import Drawn, JointConfig, JointHead, build_joint_head, plain
from mmgen.model.trunk import TrunkConfig
from mmgen.model.vocabulary import Vocabulary
from mmgen.rng import keyed_numpy, keyed_torch
from mmgen.sampling.loops import tempered
from mmgen.sampling.verify import Speculated, acceptance, correction, speculate, verify

V, D = 3, 3
DRAFTS = torch.tensor(list(itertools.product(range(V), repeat=D)))
KINDS = ("independent", "mixture", "hmm", "chain")
LAWS = {
    "plain": plain,
    "cold": partial(tempered, temperature=0.5, top_p=1.0),
    "nucleus": partial(tempered, temperature=1.3, top_p=0.7),
    "greedy": partial(tempered, temperature=0.0, top_p=1.0),
}

each_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)


@dataclass(frozen=True)
class Tables:
    """Laws of D + 1 tokens given all before: `laws[i]` is [V] * (i + 1)."""

    laws: list[Tensor]

    @classmethod
    def random(cls, key: str, law=plain, scale: float = 2.0) -> "Tables":
        draw = keyed_torch("tables", key)
        shapes = [[V] * (i + 1) for i in range(D + 1)]
        return cls([law(scale * torch.randn(s, dtype=torch.float64, generator=draw)).exp() for s in shapes])

    def along(self, drafts: Tensor, num: int) -> Tensor:
        """The first `num` laws [N, num, V] along the tokens of each row."""
        rows = [self.laws[i][tuple(drafts[:, :i].unbind(-1))] for i in range(num)]
        return torch.stack([row.expand(len(drafts), -1) for row in rows], 1)

    def joint(self) -> Tensor:
        """The law of D + 1 tokens, [V] * (D + 1)."""
        total = torch.ones((), dtype=torch.float64)
        for law in self.laws:
            total = total[..., None] * law
        return total


def committed(drawn_with: Tensor, judged_with: Tensor, p: Tables) -> Tensor:
    """The law of D + 1 tokens, the first of them committed by one cycle and the rest drawn from `p`; by enumeration.

    `drawn_with` and `judged_with` [V^D, D, V] are the drafts' conditionals and those that the verification is told.
    """
    along = p.along(DRAFTS, D + 1)
    index = DRAFTS[..., None]
    drafted = drawn_with.gather(-1, index).squeeze(-1).prod(-1)
    # a draft of probability 0 does not occur; its judgement may be 0 / 0
    keep = acceptance(Drawn(DRAFTS, judged_with), along).nan_to_num(0)
    total = torch.zeros([V] * (D + 1), dtype=torch.float64)
    for kept in range(D + 1):
        q = judged_with[:, kept] if kept < D else torch.zeros(len(DRAFTS), V, dtype=torch.float64)
        follows = correction(along[:, kept], q)
        probability = drafted * keep[:, :kept].prod(-1)
        if kept < D:
            probability = probability * (1 - keep[:, kept])
        for tokens, weight, law in zip(DRAFTS.tolist(), probability, follows, strict=True):
            here = tuple(tokens[:kept])
            tail = (weight * law).view(-1, *[1] * (D - kept)).expand([V] * (D + 1 - kept)).clone()
            for i in range(kept + 1, D + 1):
                shape = [V] * (i - kept + 1) + [1] * (D - i)
                tail *= p.laws[i][here].reshape(shape)
            total[here] += tail
    return total


def head_conditionals(kind: str, law=plain) -> tuple[Tensor, Tensor]:
    """Exact conditionals of x_2..x_k along every draft given x_1, and in their place the marginals: [V^D, D, V]."""
    head, vocabulary = build(kind)
    hidden = torch.randn(1, 6, dtype=torch.float64, generator=keyed_torch("h"))
    draft = head.start(hidden.expand(len(DRAFTS), -1), vocabulary, law)
    draft, exact = draft.extend(torch.ones(len(DRAFTS), dtype=torch.long)), []
    for i in range(D):
        draft = draft.extend(DRAFTS[:, i - 1]) if i else draft
        exact.append(draft.log_conditional().exp())
    conditionals = torch.stack(exact, 1).detach()
    joint = conditionals.gather(-1, DRAFTS[..., None]).squeeze(-1).prod(-1).view([V] * D)
    marginals = [joint.sum([j for j in range(D) if j != i]) for i in range(D)]
    return conditionals, torch.stack(marginals).expand(len(DRAFTS), D, V)


def build(kind: str, tokens: int = D + 1) -> tuple[JointHead, Vocabulary]:
    torch.manual_seed(4)  # heads whose tokens depend on each other
    config = from_mapping({"kind": kind, "tokens": tokens, "components": 3, "rank": 5}, JointConfig)
    head = build_joint_head(config, TrunkConfig(width=6, ffn_width=8)).double()
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            scale = 0.3 if name.startswith("prior") else 1.0
            parameter.copy_(scale * torch.randn_like(parameter))
    matrix = torch.randn(V, 6, dtype=torch.float64)
    return head, Vocabulary(lambda ids: matrix[ids], matrix)


@each_law
@pytest.mark.parametrize("drafting", LAWS.values(), ids=LAWS)
def test_any_draft_leaves_the_law_of_the_trunk(law, drafting) -> None:
    """Laws with zeros on either side among them: greedy trunks with random drafts, random trunks with greedy ones."""
    for seed in range(3):
        p, q = Tables.random(f"p{seed}", law), Tables.random(f"q{seed}", drafting)
        along = q.along(DRAFTS, D)
        found = committed(along, along, p)
        torch.testing.assert_close(found, p.joint(), rtol=0, atol=1e-12)


@each_law
@pytest.mark.parametrize("kind", KINDS)
def test_any_head_leaves_the_law_of_the_trunk(kind: str, law) -> None:
    p = Tables.random("p", law)
    conditionals, _ = head_conditionals(kind, law)
    torch.testing.assert_close(committed(conditionals, conditionals, p), p.joint(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["mixture", "hmm", "chain"])
def test_marginals_in_the_place_of_conditionals_are_another_law(kind: str) -> None:
    """The plausible mistake: each drafted token judged by its own softmax, as if the tokens were independent."""
    p = Tables.random("p")
    conditionals, marginals = head_conditionals(kind)
    error = (committed(conditionals, marginals, p) - p.joint()).abs().sum() / 2
    assert error > 5e-3


def test_for_independent_heads_marginals_are_the_conditionals() -> None:
    conditionals, marginals = head_conditionals("independent")
    torch.testing.assert_close(conditionals, marginals.clone(), rtol=0, atol=1e-14)


def test_what_verify_does_with_its_numbers_is_that_law() -> None:
    """Every ratio below is a multiple of 1 / 12, so middles of twelfths are all outcomes in true proportion."""
    q = torch.tensor([[0.5, 0.5], [0.75, 0.25]], dtype=torch.float64)
    p = torch.tensor([[0.25, 0.75], [0.25, 0.75], [0.25, 0.75]], dtype=torch.float64)
    middles = (torch.arange(12, dtype=torch.float64) + 0.5) / 12
    uniform = torch.cartesian_prod(middles, middles, middles)
    total = torch.zeros(2, 2, 2, dtype=torch.float64)
    for tokens in itertools.product(range(2), repeat=2):
        drawn = Drawn(torch.tensor(tokens).expand(len(uniform), -1), q.expand(len(uniform), -1, -1))
        verdict = verify(drawn, p.expand(len(uniform), -1, -1), uniform)
        weight = q[0, tokens[0]] * q[1, tokens[1]] / len(uniform)
        for kept, token in zip(verdict.kept.tolist(), verdict.token.tolist(), strict=True):
            tail = weight
            for i in range(kept + 1, 3):
                tail = tail[..., None] * p[i]
            total[(*tokens[:kept], token)] += tail
    expected = p[0][:, None, None] * p[1][:, None] * p[2]
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)


def test_a_draft_from_the_trunks_own_law_is_kept_whole_and_one_that_it_rules_out_never() -> None:
    p = Tables.random("p").along(DRAFTS, D + 1)
    last = torch.full((len(DRAFTS), D + 1), 1 - 2.0**-53, dtype=torch.float64)
    same = Drawn(DRAFTS, p[:, :D])
    assert (verify(same, p, last).kept == D).all()
    nearly = replace(same, probabilities=same.probabilities * (1 + 1e-15))
    assert verify(nearly, p, last).token.lt(V).all(), "a difference by rounding leaves a law to draw from"
    ruled_out = p.clone()
    ruled_out[:, 1].scatter_(-1, DRAFTS[:, 1:2], 0.0)
    verdict = verify(same, ruled_out / ruled_out.sum(-1, keepdim=True), torch.zeros_like(last))
    assert (verdict.kept == 1).all() and (verdict.token != DRAFTS[:, 1]).all()


class Toy:
    """A trunk whose law depends on the last two tokens. It checks what it is asked, as a cache would not."""

    def __init__(self, rows: int, key: str = "toy") -> None:
        draw = keyed_torch(key)
        self.logits = 1.5 * torch.randn(V, V, V, dtype=torch.float64, generator=draw)
        self.hidden = torch.randn(V, V, 6, dtype=torch.float64, generator=draw)
        self.read = [[0, 1] for _ in range(rows)]
        self.last = 0

    def now(self) -> tuple[Tensor, Tensor]:
        before, last = torch.tensor([row[-2:] for row in self.read]).unbind(-1)
        return self.logits[before, last], self.hidden[before, last]

    def advance(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for column in tokens.T.tolist():
            self.read = [[*row, token] for row, token in zip(self.read, column, strict=True)]
            found.append(self.now())
        self.last = tokens.shape[1]
        logits, hidden = zip(*found, strict=True)
        return torch.stack(logits, 1), torch.stack(hidden, 1)

    def truncate(self, num_tokens: Sequence[int]) -> None:
        assert all(0 <= num <= self.last for num in num_tokens)
        self.read = [
            row[: len(row) - self.last + num] for row, num in zip(self.read, num_tokens, strict=True)
        ]


def run(kind: str, law, seeds: range, max_tokens: int, end: int | None = None) -> tuple[Speculated, Toy]:
    head, vocabulary = build(kind, 3)
    toy = Toy(len(seeds))
    draws = [keyed_numpy(seed, "verify") for seed in seeds]
    with torch.inference_mode():
        return speculate(head, vocabulary, toy, *toy.now(), law, draws, max_tokens, end), toy


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_gets_in_a_batch_what_it_gets_alone(kind: str) -> None:
    for end in (None, 2):
        found, _ = run(kind, LAWS["nucleus"], range(6), 11, end)
        for row in range(6):
            alone, _ = run(kind, LAWS["nucleus"], range(row, row + 1), 11, end)
            assert alone.tokens == [found.tokens[row]] and alone.passes == [found.passes[row]]
        assert len({tuple(tokens) for tokens in found.tokens}) > 1
        assert end is None or 2 not in itertools.chain(*found.tokens)
        assert end is not None or {len(tokens) for tokens in found.tokens} == {11}


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_drafts_leave_the_greedy_text(kind: str) -> None:
    found, toy = run(kind, LAWS["greedy"], range(3), 20)
    text = [0, 1]
    while len(text) < 22:
        text.append(int(toy.logits[text[-2], text[-1]].argmax()))
    assert found.tokens == [text[2:]] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_several_cycles_leave_the_law_of_the_trunk(kind: str) -> None:
    num, length = 3000, 4
    found, toy = run(kind, plain, range(num), length)
    weights = torch.tensor([V**i for i in range(length)])
    counts = torch.bincount(torch.tensor(found.tokens) @ weights, minlength=V**length)
    expected = torch.zeros(V**length, dtype=torch.float64)
    law = toy.logits.softmax(-1)
    for tokens in itertools.product(range(V), repeat=length):
        text = [0, 1, *tokens]
        chances = [law[text[i], text[i + 1], text[i + 2]] for i in range(length)]
        expected[int(torch.tensor(tokens) @ weights)] = num * torch.stack(chances).prod()
    frequent = expected > 5
    seen, due = (torch.cat([x[frequent], x[~frequent].sum(0, keepdim=True)]) for x in (counts, expected))
    assert stats.chisquare(seen, due).pvalue > 1e-3
    assert set(found.passes) == {1, 2, 3} and np.mean(found.passes) < 2.7


def test_the_cache_holds_what_was_committed() -> None:
    """But for the last token, which needs no reading; and what was kept of the last pass may go beyond the limit."""
    found, toy = run("chain", plain, range(5), 9)
    for tokens, read in zip(found.tokens, toy.read, strict=True):
        shared = min(len(tokens), len(read) - 2)
        assert read[2 : 2 + shared] == tokens[:shared] and shared >= len(tokens) - 1


def test_an_end_that_the_trunk_draws_first_needs_no_pass() -> None:
    toy = Toy(2)
    head, vocabulary = build("mixture")
    logits, hidden = toy.now()
    logits = torch.full_like(logits, -torch.inf).index_fill(-1, torch.tensor([2]), 0.0)
    draws = [keyed_numpy(i) for i in range(2)]
    assert speculate(head, vocabulary, toy, logits, hidden, plain, draws, 5, end=2) == Speculated(
        [[], []], [0, 0]
    )
    assert speculate(head, vocabulary, toy, logits, hidden, plain, draws, 1) == Speculated([[2], [2]], [0, 0])
    assert toy.read == [[0, 1]] * 2


def test_a_nucleus_is_the_fewest_likeliest_tokens_that_reach_its_share() -> None:
    logits = torch.log(torch.tensor([[0.15, 0.5, 0.05, 0.3], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64))
    for top_p, kept in ((0.4, [1]), (0.5, [1]), (0.51, [1, 3]), (0.9, [0, 1, 3]), (1.0, [0, 1, 2, 3])):
        law = tempered(logits, 1.0, top_p).exp()
        assert law[0].nonzero().squeeze(-1).tolist() == kept
        torch.testing.assert_close(law.sum(-1), torch.ones(2).double())
        torch.testing.assert_close(law[0, kept] / law[0, 1], (logits[0, kept] - logits[0, 1]).exp())
    assert (tempered(logits, 1.0, 0.5).exp()[1] > 0).tolist() == [True, True, False, False]
    torch.testing.assert_close(tempered(logits, 0.5, 1.0), plain(2 * logits))
    assert tempered(logits.half(), 0.0, 0.5).exp().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
