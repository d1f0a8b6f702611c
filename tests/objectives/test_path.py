"""The path: schedules, parameterizations, DDIM and the jump."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmgen.config import from_mapping
from mmgen.objectives.path import Path

PATHS = [
    Path("fm", "euler_fm"),
    Path("fm", "simple_edm"),
    Path("fm", "identity"),
    Path("vp_cosine", "simple_edm"),
    Path("vp_cosine", "identity"),
]
by_name = pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.schedule}-{path.prediction}")
TIMES = [(1.0, 0.0), (1.0, 0.4), (0.994, 0.993), (0.8, 0.3), (0.5, 0.0), (1e-4, 0.0), (1e-9, 0.0)]


def pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    x, noise = 0.5 * torch.randn(2, *shape, dtype=dtype)
    return x, noise


@by_name
def test_a_jump_with_the_pairs_own_target_lands_on_the_path(path: Path):
    x, noise = pair(7)
    for t, s in TIMES:
        landed = path.jump(path.target(x, noise, t), path.add_noise(x, noise, t), t, s)
        torch.testing.assert_close(landed, path.add_noise(x, noise, s), rtol=0, atol=1e-14)


@by_name
@given(t=st.floats(0, 1), s=st.floats(0, 1))
def test_a_jump_to_any_earlier_time_is_finite_and_exactly_nothing_at_its_own_time(
    path: Path, t: float, s: float
):
    t, s = max(t, s), min(t, s)
    x, output = torch.randn(2, 3, dtype=torch.float64)
    assert path.jump(output, x, t, s).isfinite().all()
    assert torch.equal(path.jump(output, x, t, t), x)
    assert torch.equal(path.jump(output.float(), x.float(), s, s), x.float())


@by_name
def test_the_ends_are_pure_noise_and_pure_data(path: Path):
    x, noise = pair(5)
    assert torch.equal(path.add_noise(x, noise, 0.0), x)
    assert torch.equal(path.add_noise(x, noise, 1.0), noise)
    assert path.eta(1.0) == torch.inf and path.eta(0.0) == 0
    assert path.eta_inverse(torch.inf) == 1 and path.eta_inverse(0.0) == 0


@by_name
def test_functions_of_time_agree_with_each_other(path: Path):
    t = torch.linspace(1e-6, 1 - 1e-6, 1001, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(path.log_snr(t), -2 * path.eta(t).log(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(path.eta_inverse(path.eta(t)), t, rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(path.log_snr(t).sum(), t)
    torch.testing.assert_close(path.log_snr_derivative(t), slope, rtol=1e-9, atol=0)
    (slope,) = torch.autograd.grad(path.eta(t).sum(), t)
    torch.testing.assert_close(path.rate / path.alpha(t).square(), slope, rtol=1e-9, atol=0)


@by_name
def test_the_network_gets_and_gives_numbers_of_order_one(path: Path):
    x, noise = pair(50_000)
    for t in (0.0, 0.3, 0.5, 0.9, 1.0):
        assert abs(float((path.c_in(t) * path.add_noise(x, noise, t)).std()) - 1) < 0.02
        spread = {"simple_edm": 1.0, "euler_fm": 2**0.5, "identity": 0.5}[path.prediction]
        assert abs(float(path.target(x, noise, t).std()) - spread) < 0.02


def test_ddim_reuses_the_pairs_noise_and_takes_the_source_before_the_target():
    x, noise = pair(6)
    for path, (t, r, s) in product(PATHS, [(0.9, 0.6, 0.2), (1.0, 0.5, 0.0), (0.3, 0.3, 0.1)]):
        x_t, x_s = path.add_noise(x, noise, t), path.add_noise(x, noise, s)
        torch.testing.assert_close(path.ddim(x_t, x, t, s), x_s, rtol=0, atol=1e-14)
        via = path.ddim(path.ddim(x_t, x, t, r), x, r, s)
        torch.testing.assert_close(via, x_s, rtol=0, atol=1e-14)
        assert (path.ddim(x_t, x, max(s, 1e-3), t) - x_s).abs().max() > 0.01, "the paper's order of times"
        assert torch.equal(path.ddim(x_s, x, s, s), x_s)


def test_c_out_needs_both_times():
    """|c_out(t, 0)|, the coefficient of a jump all the way, is what a re-implementation took for |c_out(t, s)|."""
    path = Path()
    assert path.c_out(0.8, 0.3) == -0.25
    assert path.c_out(0.8, 0.0) == -0.4


def test_only_the_straight_line_has_a_velocity_of_its_own():
    with pytest.raises(ValueError, match="euler_fm needs the schedule fm, not vp_cosine"):
        Path("vp_cosine")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Path(sigma_data=0.0), "sigma_data 0.0"),
        (lambda: Path(t_min=0.995), "t_min 0.995 and t_max 0.994"),
        (lambda: Path(t_max=1.01), "t_max 1.01"),
        (lambda: Path(t_min=-0.1), "t_min -0.1"),
    ],
)
def test_a_path_that_cannot_be_is_refused(make: Callable, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_range_of_times_is_the_schedules_own_unless_told():
    assert Path().time_range == (0.0, 0.994)
    assert Path("vp_cosine", "simple_edm").time_range == (0.0, 0.996)
    assert Path(t_min=0.006, t_max=1.0).time_range == (0.006, 1.0)
    for path, last in ((Path(), 165.667), (Path("vp_cosine", "simple_edm"), 159.153)):
        assert float(path.eta(path.time_range[1])) == pytest.approx(last, rel=1e-5)


def test_a_path_is_read_from_a_configuration():
    path = from_mapping({"schedule": "vp_cosine", "prediction": "simple_edm", "t_min": 0.006}, Path)
    assert path == Path("vp_cosine", "simple_edm", t_min=0.006)
    with pytest.raises(ValueError, match="prediction: expected .* did you mean 'euler_fm'"):
        from_mapping({"prediction": "euler"}, Path)


@by_name
def test_the_state_keeps_its_precision_and_is_never_below_float32(path: Path):
    x, output = torch.randn(2, 4)
    for state, network, expected in (
        (torch.float64, torch.float32, torch.float64),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ):
        for t in (0.7, torch.tensor(0.7), torch.full((4,), 0.7, dtype=torch.float64)):
            assert path.jump(output.to(network), x.to(state), t, 0.2).dtype == expected
            assert path.add_noise(x.to(state), output.to(network), t).dtype == expected
            assert path.target(x.to(state), output.to(network), t).dtype == expected


@by_name
def test_times_broadcast_and_floats_mean_the_same(path: Path):
    x, output = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    t, s = torch.tensor([0.9, 0.5, 0.3]), torch.tensor([0.1, 0.5, 0.0])
    together = path.jump(output, x, t[:, None, None], s[:, None, None])
    for i in range(3):
        alone = path.jump(output[i], x[i], float(t[i]), float(s[i]))
        torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-15)


def test_a_gap_that_float32_times_would_lose_is_kept():
    """At k = 12 the target starts 1.5e-6 nearer to the data at t = 0.994: times rounded to float32 err by percents."""
    path, gap = Path(), 1.5e-6
    t = torch.linspace(0.99, 0.994, 100, dtype=torch.float64)
    nothing, one = torch.zeros(100), torch.ones(100)
    expected = torch.full((100,), -gap * path.sigma_data)
    torch.testing.assert_close(path.jump(one, nothing, t, t - gap), expected, rtol=1e-6, atol=0)
    rounded = path.jump(one, nothing, t.float(), (t - gap).float())
    assert (rounded / expected - 1).abs().max() > 0.02
