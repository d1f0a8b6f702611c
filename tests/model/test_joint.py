"""Joint heads by enumeration: a vocabulary of 4 and windows of 3 leave 64 strings, each with a probability."""

import itertools
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from mmgen.config import from_mapping
from mmgen.model.joint import (
    JointConfig,
    JointHead,
    MixtureHead,
    build_joint_head,
    invert,
    label_windows,
    plain,
)
from mmgen.model.trunk import TrunkConfig
from mmgen.model.vocabulary import Vocabulary
from mmgen.rng import keyed_torch
from mmgen.sequence import NO_LABEL
from tests import parts

KINDS = ("independent", "mixture", "hmm", "chain")
V, K, R, WIDTH = 4, 3, 3, 6
TRUNK = TrunkConfig(width=WIDTH, ffn_width=8)
STRINGS = torch.tensor(list(itertools.product(range(V), repeat=K)))

each_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind: str, tokens: int = K, dtype: torch.dtype = torch.float64) -> tuple[JointHead, Vocabulary]:
    """A head with large random weights, far from uniform, and a tied vocabulary."""
    torch.manual_seed(1)
    config = from_mapping({"kind": kind, "tokens": tokens, "components": R, "rank": 5}, JointConfig)
    head = build_joint_head(config, TRUNK).to(dtype)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            scale = 0.3 if name.startswith(("prior", "transition")) else 1.0  # all components in use
            parameter.copy_(scale * torch.randn_like(parameter))
    matrix = torch.randn(V, WIDTH, dtype=dtype)
    return head, Vocabulary(lambda ids: matrix[ids], matrix)


def hidden_states(num: int = 2) -> Tensor:
    return torch.randn(num, WIDTH, dtype=torch.float64, generator=keyed_torch("hidden"))


def sharp(logits: Tensor) -> Tensor:
    """A law with a temperature that keeps two tokens."""
    logits = logits / 0.7
    return logits.where(logits >= logits.topk(2).values[..., -1:], -torch.inf).log_softmax(-1)


def log_probs(head: JointHead, hidden: Tensor, strings: Tensor, vocabulary: Vocabulary) -> Tensor:
    """[rows of hidden, strings]"""
    every = [head.log_prob(row.expand(len(strings), -1), strings, vocabulary) for row in hidden]
    return torch.stack(every)


def chained(head: JointHead, hidden: Tensor, vocabulary: Vocabulary, law=plain) -> Tensor:
    """log q of every string [rows of hidden, V^k], by its conditionals."""
    found = []
    for row in hidden:
        draft, total = head.start(row.expand(len(STRINGS), -1), vocabulary, law), torch.zeros(len(STRINGS))
        for i, tokens in enumerate(STRINGS.unbind(-1)):
            draft = draft.extend(STRINGS[:, i - 1]) if i else draft
            conditional = draft.log_conditional()
            torch.testing.assert_close(conditional.exp().sum(-1), torch.ones(len(STRINGS)).double())
            total = total + conditional.gather(-1, tokens[:, None]).squeeze(-1)
        found.append(total)
    return torch.stack(found)


def latent_sum(head: MixtureHead, hidden: Tensor, vocabulary: Vocabulary, law=plain) -> Tensor:
    """log q of every string by the definition: a sum over all paths of the latent."""
    found = []
    for row in hidden[:, None]:
        laws = [law(vocabulary.logits(head.states(row, i)))[0] for i in range(K)]
        moves = None
        if head.transition is not None:
            moves = head.transition(row).view(K - 1, R, R).softmax(-1)
        total = torch.zeros(len(STRINGS), dtype=torch.float64)
        for path in itertools.product(range(head.num_components), repeat=K):
            weight = head.log_prior(row)[0, path[0]].exp()
            for i in range(K - 1):
                weight = weight * (
                    float(path[i] == path[i + 1]) if moves is None else moves[i][path[i], path[i + 1]]
                )
            total = (
                total + weight * torch.stack([laws[i][path[i], STRINGS[:, i]] for i in range(K)]).sum(0).exp()
            )
        found.append(total.log())
    return torch.stack(found)


@each_kind
def test_a_head_is_a_normalized_law_and_its_conditionals_chain_to_it(kind: str) -> None:
    head, vocabulary = build(kind)
    joint = log_probs(head, hidden_states(), STRINGS, vocabulary)
    assert joint.shape == (2, V**K) and joint.exp().max() > 3 / V**K, "far from uniform"
    torch.testing.assert_close(joint.exp().sum(-1), torch.ones(2).double(), rtol=0, atol=1e-13)
    torch.testing.assert_close(chained(head, hidden_states(), vocabulary), joint, rtol=0, atol=1e-12)


@each_kind
def test_a_window_that_ends_early_has_the_probability_of_its_beginning(kind: str) -> None:
    head, vocabulary = build(kind)
    joint = log_probs(head, hidden_states(), STRINGS, vocabulary).exp().view(2, *[V] * K)
    for length in range(K):
        cut = STRINGS.clone()
        cut[:, length:] = NO_LABEL
        marginal = joint.sum(tuple(range(length + 1, K + 1)), keepdim=True).expand_as(joint).flatten(1)
        found = log_probs(head, hidden_states(), cut, vocabulary).exp()
        torch.testing.assert_close(found, marginal, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["independent", "mixture", "hmm"])
@pytest.mark.parametrize("law", [plain, sharp])
def test_a_latent_head_is_the_sum_over_its_latent(kind: str, law) -> None:
    """With a temperature and a truncation too, which belong to the components: drawing the latent and then all tokens
    at once, each from its truncated component, has the law of the conditionals."""
    head, vocabulary = build(kind)
    assert isinstance(head, MixtureHead) and head.num_components == (1 if kind == "independent" else R)
    joint = latent_sum(head, hidden_states(), vocabulary, law)
    possible = joint.isfinite()
    assert bool(possible.all()) == (law is plain)
    found = chained(head, hidden_states(), vocabulary, law)
    torch.testing.assert_close(found[possible], joint[possible], rtol=0, atol=1e-12)
    assert found[~possible].isneginf().all()


def test_truncating_the_conditionals_instead_is_another_law() -> None:
    head, vocabulary = build("mixture")
    hidden = hidden_states(1)
    conditional = head.start(hidden, vocabulary).log_conditional()
    wrong = sharp(conditional)
    right = head.start(hidden, vocabulary, sharp).log_conditional()
    assert (right.exp() - wrong.exp()).abs().max() > 0.05


def test_the_chain_begins_with_the_trunks_own_law_and_truncates_each_conditional() -> None:
    head, vocabulary = build("chain")
    hidden = hidden_states()
    draft = head.start(hidden, vocabulary, sharp)
    torch.testing.assert_close(draft.log_conditional(), sharp(vocabulary.logits(hidden)))
    token = torch.tensor([3, 1])
    after = head.start(hidden, vocabulary).extend(token).log_conditional()
    torch.testing.assert_close(draft.extend(token).log_conditional(), sharp(after))


def test_independent_tokens_say_nothing_of_each_other_and_the_others_do() -> None:
    for kind in KINDS:
        head, vocabulary = build(kind)
        joint = log_probs(head, hidden_states(1), STRINGS, vocabulary).exp().view([V] * K)
        first, rest = joint.sum((1, 2)), joint.sum(0)
        information = (joint * (joint / (first[:, None, None] * rest)).log()).sum()
        assert (information < 1e-12) if kind == "independent" else (information > 3e-3), (kind, information)


@each_kind
@pytest.mark.parametrize("law", [plain, sharp])
@torch.no_grad()
def test_samples_have_the_law_of_the_head(kind: str, law) -> None:
    head, vocabulary = build(kind)
    hidden, num = hidden_states(1), 20_000
    uniform = torch.rand(num, K, dtype=torch.float64, generator=keyed_torch("samples"))
    tokens = head.sample(hidden.expand(num, -1), uniform, vocabulary, law)
    counts = torch.bincount(tokens @ torch.tensor([V * V, V, 1]), minlength=V**K)
    expected = num * chained(head, hidden, vocabulary, law)[0].exp()
    assert counts[expected == 0].sum() == 0
    frequent = expected > 5
    seen, due = (torch.cat([x[frequent], x[~frequent].sum(0, keepdim=True)]) for x in (counts, expected))
    possible = due > 0
    assert stats.chisquare(seen[possible], due[possible]).pvalue > 1e-3


@each_kind
def test_drafted_tokens_come_with_the_conditionals_that_they_were_drawn_from(kind: str) -> None:
    head, vocabulary = build(kind, dtype=torch.float32)
    hidden, first = hidden_states(5).float(), torch.tensor([0, 1, 2, 3, 0])
    uniform = torch.rand(5, K - 1, generator=keyed_torch("drafts"))
    drawn = head.start(hidden, vocabulary).extend(first).draw(uniform)
    assert drawn.tokens.shape == (5, K - 1) and drawn.probabilities.dtype == torch.float64
    torch.testing.assert_close(drawn.probabilities.sum(-1), torch.ones(5, K - 1).double(), rtol=0, atol=1e-14)
    window = torch.cat([first[:, None], drawn.tokens], 1)
    alone = head.log_prob(
        hidden, torch.cat([first[:, None], torch.full((5, K - 1), NO_LABEL)], 1), vocabulary
    )
    expected = head.log_prob(hidden, window, vocabulary) - alone
    found = drawn.probabilities.gather(-1, drawn.tokens[..., None]).log().sum((1, 2))
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["independent", "mixture", "hmm"])
def test_evidence_outside_of_every_nucleus_is_weighed_without_truncation(kind: str) -> None:
    head, vocabulary = build(kind)

    def first_only(logits: Tensor) -> Tensor:
        return torch.full_like(logits, -torch.inf).index_fill(-1, torch.tensor([0]), 0.0)

    hidden, token = hidden_states(), torch.tensor([2, 2])
    start = head.start(hidden, vocabulary, first_only)
    assert start.log_conditional()[:, 2].isneginf().all()
    draft = start.extend(token)
    untruncated = head.start(hidden, vocabulary).extend(token)
    torch.testing.assert_close(draft.log_weights, untruncated.log_weights)
    torch.testing.assert_close(draft.log_conditional().exp().sum(-1), torch.ones(2).double())


@each_kind
@pytest.mark.parametrize("tokens", [2, 5])
def test_the_training_loss_is_summed_over_whole_and_cut_windows(kind: str, tokens: int) -> None:
    head, vocabulary = build(kind, tokens)
    labels = torch.randint(V, (2, 9), generator=keyed_torch("labels"))
    labels[0, 4], labels[1, 7:] = NO_LABEL, NO_LABEL
    windows = label_windows(labels, tokens).flatten(0, 1)
    hidden = hidden_states(18).requires_grad_()
    loss = head.training_loss(hidden, windows, vocabulary)
    loss.backward()
    assert hidden.grad is not None
    silent = windows[:, 0] == NO_LABEL
    assert hidden.grad.isfinite().all() and (hidden.grad[~silent].abs().sum(-1) > 0).all()
    assert silent.sum() == 3 and hidden.grad[silent].abs().max() < 1e-15
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        used = parameter.grad.abs().max() > 0
        assert used or (kind == "independent" and name == "prior.weight"), name
    if kind in ("independent", "chain"):
        torch.testing.assert_close(loss, -head.log_prob(hidden, windows, vocabulary).sum())
    some = torch.tensor([0, 3, 12])
    first, last = (head.log_prob(hidden[part], windows[part], vocabulary) for part in (some[:1], some[1:]))
    torch.testing.assert_close(torch.cat([first, last]), head.log_prob(hidden, windows, vocabulary)[some])


@each_kind
def test_a_batch_with_nothing_to_predict_costs_nothing(kind: str) -> None:
    head, vocabulary = build(kind)
    loss = head.training_loss(hidden_states(), torch.full((2, K), NO_LABEL), vocabulary)
    loss.backward()
    assert loss.abs() < 1e-12
    assert all(p.grad is None or p.grad.abs().max() < 1e-12 for p in head.parameters())


def test_the_balance_term_is_zero_for_even_use_and_log_r_for_one_component() -> None:
    head, vocabulary = build("mixture")
    assert isinstance(head, MixtureHead)
    hidden, windows = hidden_states().abs(), STRINGS[:2]

    def penalty() -> float:
        loss = (
            head.training_loss(hidden, windows, vocabulary) + head.log_prob(hidden, windows, vocabulary).sum()
        )
        return loss.item() / windows.numel() / head.balance

    with torch.no_grad():
        head.prior.weight.zero_()
        assert penalty() == pytest.approx(0, abs=1e-6)
        head.prior.weight[1] = 1000.0
        assert penalty() == pytest.approx(math.log(R), abs=1e-6)


@each_kind
def test_probabilities_are_float32_under_autocast(kind: str) -> None:
    head, vocabulary = build(kind, dtype=torch.float32)
    hidden = hidden_states(len(STRINGS)).float()
    exact = head.log_prob(hidden, STRINGS, vocabulary)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = head.log_prob(hidden, STRINGS, vocabulary)
        head.training_loss(hidden, STRINGS, vocabulary).backward()
        conditional = head.start(hidden, vocabulary).log_conditional()
    assert exact.dtype == rounded.dtype == conditional.dtype == torch.float32
    torch.testing.assert_close(conditional.exp().sum(-1), torch.ones(len(STRINGS)), rtol=0, atol=1e-5)
    assert 0 < (rounded - exact).abs().mean() < 0.3


@each_kind
def test_a_model_lends_its_vocabulary(kind: str) -> None:
    model = parts.model(dtype=torch.float32)
    head = build_joint_head(
        from_mapping({"kind": kind, "components": 2, "rank": 4}, JointConfig), model.config
    )
    vocabulary = model.vocabulary
    hidden = torch.randn(6, model.config.width, requires_grad=True)
    tokens = torch.randint(parts.tokenizer().vocab_size, (6, 4))
    loss = head.training_loss(hidden, tokens, vocabulary)
    loss.backward()
    assert loss.item() / tokens.numel() == pytest.approx(math.log(parts.tokenizer().vocab_size), rel=0.5)
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0
    assert model.text_embedding.weight.grad is not None
    assert not any(p.shape[0] == parts.tokenizer().vocab_size for p in head.parameters()), (
        "no matrix of its own"
    )


def test_windows_end_with_their_text() -> None:
    labels = torch.tensor([[5, 6, NO_LABEL, 7, 8, 9]])
    none = NO_LABEL
    assert label_windows(labels, 3).tolist() == [
        [[5, 6, none], [6, none, none], [none, none, none], [7, 8, 9], [8, 9, none], [9, none, none]]
    ]


def test_inversion_takes_no_token_of_probability_zero() -> None:
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    last = 1 - 2.0**-53
    for scale in (1.0, 3.7, 1e-30):
        numbers = torch.tensor([0.0, 0.2499, 0.25, 0.9, last], dtype=torch.float64)
        taken = invert((scale * probabilities).expand(5, -1), numbers)
        assert taken.tolist() == [1, 1, 3, 3, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "cp"}, "kind: expected one of 'independent', 'mixture', 'hmm', 'chain', got 'cp'"),
        ({"tokens": 1}, "tokens 1 must be at least 2: the trunk itself predicts one"),
        ({"components": 1}, "components 1 must be at least 2; one component is kind independent"),
        ({"rank": 0}, "rank 0 must be at least 1"),
        ({"weight": 0.0}, "weight 0.0 must be positive; without it the head is not trained"),
        ({"share": 1.5}, "share 1.5 must be in (0, 1]; 1 trains at every position"),
        ({"balance": -0.1}, "balance -0.1 must be at least 0 (0 is none)"),
    ],
)
def test_mistakes_are_one_line(change: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        from_mapping({"kind": "chain", **change}, JointConfig)
    assert str(error.value) == message
