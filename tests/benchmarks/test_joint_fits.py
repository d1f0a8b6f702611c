"""The laws and heads behind the benchmark of joint tokens, where answers are known."""

import pytest
import torch

from benchmarks.joint_fits import (
    HANDS,
    Case,
    even_parity,
    excess_bits,
    fit,
    pair_probabilities,
    parity_by_hand,
    real_mass,
    tokens_per_pass,
)

ONE_CERTAIN = Case("one string", torch.tensor([[0, 1, 1]]), 2)


def test_conditionals_of_a_law() -> None:
    parity = even_parity(3)
    assert parity.strings.tolist() == [[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]]
    found = parity.conditionals(torch.tensor([[1, 0, 0]]))[0]
    assert found.tolist() == [[0.5, 0.5], [0.5, 0.5], [0.0, 1.0]]
    real, none = HANDS.conditionals(torch.tensor([[2, 6], [5, 6]]))
    assert real[0].tolist() == [0.25] * 4 + [0.0] * 4 and real[1].tolist() == [0.0] * 6 + [1.0, 0.0]
    assert none[1].sum() == 0, "no hand begins with a second word"


@pytest.mark.parametrize("num_bits", [2, 3, 4, 9])
def test_four_states_are_enough_for_any_number_of_bits(num_bits: int) -> None:
    model, case = parity_by_hand(num_bits), even_parity(num_bits)
    assert excess_bits(model, case) == pytest.approx(0, abs=1e-12)
    assert real_mass(model, case) == pytest.approx(1, abs=1e-12)
    odd = case.strings.clone()
    odd[:, 0] = 1 - odd[:, 0]
    assert model(odd).exp().sum() < 1e-12
    assert tokens_per_pass(model, case) == pytest.approx(num_bits, abs=1e-12)


def test_independent_words_are_fitted_by_their_marginals() -> None:
    """Two bits, and a quarter of the mass on real hands: the least that any product of two laws leaves."""
    model = fit(HANDS, "independent", 1, seed=0, restarts=2, steps=60)
    assert excess_bits(model, HANDS) == pytest.approx(2, abs=1e-4)
    assert real_mass(model, HANDS) == pytest.approx(0.25, abs=1e-4)
    assert tokens_per_pass(model, HANDS) == pytest.approx(1.25, abs=1e-3)
    torch.testing.assert_close(
        pair_probabilities(model), torch.full((4, 4), 1 / 16).double(), rtol=0, atol=1e-3
    )


def test_a_chain_is_fitted_to_hands_and_a_law_without_a_choice_needs_nothing() -> None:
    chain = fit(HANDS, "chain", 1, seed=0, restarts=2, steps=60)
    assert excess_bits(chain, HANDS) < 1e-3 and tokens_per_pass(chain, HANDS) > 1.99
    table = pair_probabilities(chain)
    assert table.diagonal().min() > 0.24 and (table - table.diag().diag()).max() < 0.01
    certain = fit(ONE_CERTAIN, "independent", 1, seed=0, restarts=2, steps=40)
    assert excess_bits(certain, ONE_CERTAIN) < 1e-3


def test_a_fit_depends_on_its_seed_alone_and_the_best_beginning_counts() -> None:
    few = [excess_bits(fit(even_parity(3), "mixture", 2, seed, 1, 30), even_parity(3)) for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]
    many = excess_bits(fit(even_parity(3), "mixture", 2, 0, 6, 30), even_parity(3))
    assert 0.8 < many <= few[0] + 1e-9
