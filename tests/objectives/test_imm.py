"""Inductive Moment Matching: times, weight, kernel and loss, against their definitions and at their edges."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmgen.config import from_mapping
from mmgen.objectives import IMM, FlowMatching, FlowMatchingConfig, IMMConfig, Path
from mmgen.objectives.imm import laplace_m1, mmd2
from mmgen.rng import keyed_numpy

PATHS = [
    Path("fm", "euler_fm"),
    Path("fm", "simple_edm"),
    Path("fm", "identity"),
    Path("vp_cosine", "simple_edm"),
    Path("vp_cosine", "identity"),
]
by_name = pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.schedule}-{path.prediction}")


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# times


@given(t=st.floats(0, 0.994), share=st.floats(0, 1), k=st.floats(0, 20), gap=st.floats(0, 0.01))
def test_r_lies_between_s_and_t_and_keeps_the_gap(t: float, share: float, k: float, gap: float):
    s = share * t
    imm = IMM(IMMConfig(k=k, gap=gap))
    r = float(imm.target_time(t, s))
    assert s <= r <= t
    assert r == s or t - r >= 0.999999 * gap - 1e-15
    # never more than the decrement, but for the gap
    assert (
        float(imm.path.eta(t) - imm.path.eta(r)) <= imm.decrement() * (1 + 1e-9) + 1e-9 or t - r <= gap + 1e-9
    )


@pytest.mark.parametrize(
    ("k", "t", "expected"),
    [(12, 0.1, 0.034), (12, 0.3, 0.020), (12, 0.5, 0.0103), (12, 0.7, 3.7e-3), (12, 0.994, 1.5e-6), (15, 0.5, 0.00131)],
)  # fmt: skip
def test_the_decrement_is_that_of_the_authors_code(k: int, t: float, expected: float):
    """Gaps t - r as published, with eta's range that of T: 165.7."""
    imm = IMM(IMMConfig(k=k, eta_max=165.6667))
    assert t - float(imm.target_time(t, 0.0)) == pytest.approx(expected, rel=0.05)


def test_the_truth_enters_where_t_is_within_one_decrement():
    imm = IMM(IMMConfig(k=12, eta_max=165.6667))
    assert float(imm.target_time(0.0387, 0.0)) == 0.0
    assert float(imm.target_time(0.0390, 0.0)) > 0.0
    assert float(imm.target_time(0.9, 0.9 - 1e-4)) == 0.9 - 1e-4


def test_the_minimum_gap_binds_late_and_only_there():
    wide, none = IMM(IMMConfig(gap=1e-4)), IMM(IMMConfig())
    t = column(0.3, 0.94, 0.96, 0.994)
    bound = (t - wide.target_time(t, torch.zeros(4)) - 1e-4).abs() < 1e-12
    assert bound.tolist() == [False, False, True, True]
    torch.testing.assert_close(
        wide.target_time(t, torch.zeros(4))[:2], none.target_time(t, torch.zeros(4))[:2], rtol=0, atol=0
    )


def test_eta_min_stops_the_decrement_but_never_beyond_t():
    imm = IMM(IMMConfig(k=4, eta_min=0.5))
    t = column(0.6, 0.2)
    assert imm.target_time(t, torch.zeros(2)).tolist() == pytest.approx(
        [float(imm.path.eta_inverse(0.5)), 0.2]
    )


def test_k_may_rise_over_training():
    imm = IMM(IMMConfig(k=6, k_final=13))
    assert imm.decrement(0.0) == 160 / 2**6 and imm.decrement(1.0) == 160 / 2**13
    assert imm.decrement(0.5) == pytest.approx(160 / 2**9.5)
    assert IMM(IMMConfig(k=6)).decrement(1.0) == 160 / 2**6
    early, late = imm.target_time(0.9, 0.1, 0.0), imm.target_time(0.9, 0.1, 1.0)
    assert early < late < 0.9


@by_name
def test_times_are_uniform_and_in_order(path: Path):
    imm = IMM(IMMConfig(path=path, k=8))
    draw = keyed_numpy("times")
    drawn = [imm.draw_times(lambda d: d.random(), draw) for _ in range(4000)]
    t, s, r = (np.array([getattr(times, name) for times in drawn]) for name in "tsr")
    assert (s <= r).all() and (r <= t).all() and (s < t).all()
    first, last = path.time_range
    for share in (t - first) / (last - first), (s - first) / (t - first):
        assert share.min() >= 0 and share.max() < 1
        np.testing.assert_allclose(np.quantile(share, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.03)
    np.testing.assert_allclose(r, imm.target_time(torch.tensor(t), torch.tensor(s)), rtol=0, atol=1e-15)


def test_times_follow_the_modalitys_distribution_and_the_schedule_of_k():
    imm = IMM(IMMConfig(path=Path(t_min=0.1, t_max=0.9), k=4, k_final=12))
    early, late = (imm.draw_times(lambda d: 0.5, keyed_numpy(0), fraction) for fraction in (0.0, 1.0))
    assert early.t == late.t == 0.5 and early.s == late.s
    assert early.r < late.r < 0.5


def test_the_network_is_told_where_the_jump_ends():
    t, s = torch.tensor([0.9]), torch.tensor([0.1])
    assert IMM(IMMConfig()).told_target(t, s) is s


# weight


@pytest.mark.parametrize(
    ("a", "expected"),
    [
        (1, [0.565, 2.90, 4.91, 5.23, 3.93, 2.46, 1.36, 1.03]),
        (2, [0.560, 2.76, 4.42, 3.66, 1.96, 0.736, 0.136, 0.0103]),
    ],
)
def test_the_weight_has_the_published_values(a: int, expected: list[float]):
    t = column(0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
    np.testing.assert_allclose(IMM(IMMConfig(a=a)).weight(t), expected, rtol=6e-3)


@by_name
@pytest.mark.parametrize("a", [0.0, 1.0, 2.0])
def test_the_weight_is_its_definition_and_finite_where_that_is_not(path: Path, a: float):
    imm = IMM(IMMConfig(path=path, a=a, b=5.0))

    def defined(t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = path.alpha(t), path.sigma(t)
        slope = -path.log_snr_derivative(t)
        return 0.5 * torch.sigmoid(5.0 - path.log_snr(t)) * slope * alpha**a / (alpha**2 + sigma**2)

    t = torch.linspace(1e-5, 0.999, 500, dtype=torch.float64)
    torch.testing.assert_close(imm.weight(t), defined(t), rtol=1e-10, atol=0)
    assert defined(column(0.0)).isnan(), "the product as it is written"
    assert imm.weight(0.0) == 0
    small = 1e-300
    assert float(imm.weight(small)) == pytest.approx(path.rate**2 * math.exp(5.0) * small, rel=1e-9)


# kernel and MMD


def particles(groups: int, count: int, dim: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 0.5 * torch.randn(groups, count, dim, dtype=dtype)


def test_mmd_is_the_sum_over_all_pairs():
    y, z, bandwidth = particles(2, 3, 5), particles(2, 3, 5), column(0.1, 0.3)

    def k(a: torch.Tensor, b: torch.Tensor, h: float) -> float:
        return math.exp(-max(float((a - b).norm()), 1e-8) / (5 * h))

    for group, h in enumerate(bandwidth.tolist()):
        total = 0.0
        for j in range(3):
            for l in range(3):  # noqa: E741
                pairs = ((y, y, 1), (z, z, 1), (y, z, -2))
                total += sum(sign * k(p[group, j], q[group, l], h) for p, q, sign in pairs) / 9
        assert float(mmd2(y, z, bandwidth)[group]) == pytest.approx(total, rel=1e-12)


def test_equal_samples_have_no_distance_and_no_gradient():
    y = particles(2, 4, 6).requires_grad_()
    value = mmd2(y, y.detach().clone(), column(0.2, 1e-6))
    value.sum().backward()
    torch.testing.assert_close(value.detach(), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(y.grad, torch.zeros_like(y), rtol=0, atol=1e-15)


def test_particles_that_match_are_at_rest_and_a_u_statistic_would_drive_them_apart():
    y = particles(1, 4, 6).requires_grad_()
    z, bandwidth = y.detach().clone(), column(0.2)
    own, both = laplace_m1(y, y, bandwidth), laplace_m1(y, z, bandwidth)
    (rest,) = torch.autograd.grad(mmd2(y, z, bandwidth).sum(), y, retain_graph=True)
    (push,) = torch.autograd.grad((own.sum() / 12 - 2 * both.mean()), y)
    assert rest.abs().max() < 1e-15 and push.abs().max() > 1e-3


def test_the_gradient_is_that_of_finite_differences():
    y, z = particles(2, 3, 4).requires_grad_(), particles(2, 3, 4)
    assert torch.autograd.gradcheck(lambda y: mmd2(y, z, column(0.1, 0.5)), (y,))


def test_samples_nearer_than_the_floor_feel_nothing():
    z = torch.zeros(1, 1, 4, dtype=torch.float64)
    for distance, felt in ((1e-9, False), (1e-7, True)):
        y = torch.full_like(z, distance / 2).requires_grad_()
        mmd2(y, z, column(1e-3), floor=1e-8).sum().backward()
        assert y.grad is not None and y.grad.isfinite().all() and bool(y.grad.any()) == felt


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_duplicates_give_no_nan(dtype: torch.dtype):
    y = particles(2, 4, 8, dtype)
    y[:, 1] = y[:, 0]
    z = y.clone()
    y.requires_grad_()
    value = mmd2(y, z, column(0.1, 1e-6))
    value.sum().backward()
    assert value.isfinite().all() and y.grad is not None and y.grad.isfinite().all()


def test_float32_keeps_what_bfloat16_would_lose():
    """At image size the kernel is within 1e-3 of 1, where bfloat16 has no number in between."""
    y, z = particles(1, 4, 4096), particles(1, 4, 4096)
    z = y + 0.01 * z
    bandwidth = column(0.25)
    exact = mmd2(y, z, bandwidth)
    torch.testing.assert_close(mmd2(y.float(), z.float(), bandwidth).double(), exact, rtol=1e-3, atol=0)
    # rounded after exp, as plain code under autocast would
    narrow = [1 + laplace_m1(p, q, bandwidth).bfloat16() for p, q in ((y, y), (z, z), (y, z))]
    lost = (narrow[0] + narrow[1] - 2 * narrow[2]).mean((-2, -1))
    assert abs(float(lost / exact) - 1) > 0.1
    with torch.autocast("cpu", torch.bfloat16):
        inside = mmd2(y.float(), z.float(), bandwidth)
    assert torch.equal(inside, mmd2(y.float(), z.float(), bandwidth))


def test_narrow_samples_are_compared_in_float32():
    y, z = (particles(2, 4, 64, torch.bfloat16) for _ in range(2))
    bandwidth = column(0.1, 0.25)
    assert torch.equal(laplace_m1(y, z, bandwidth), laplace_m1(y.float(), z.float(), bandwidth))


def test_near_samples_keep_their_distance_in_float32():
    """Differences, not a product of matrices: |a|^2 + |b|^2 - 2 a b loses everything below 1e-3."""
    a = particles(1, 1, 1024, torch.float32)
    b = a + 1e-5 * torch.randn_like(a)
    distance = -laplace_m1(a, b, column(1.0)).double() * 1024
    exact = (a.double() - b.double()).norm(dim=-1)[..., None]
    torch.testing.assert_close(distance, exact, rtol=1e-5, atol=0)
    product = torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist").double()
    assert (product / exact - 1).abs().max() > 0.05


# loss


def draw_groups(imm: IMM, groups: int, dim: int, dtype: torch.dtype = torch.float32):
    """x, noise [G, M, D] and times [G] as training draws them, t spread evenly."""
    x, noise = (particles(groups, imm.particles, dim, dtype) for _ in range(2))
    draw = keyed_numpy("groups", groups, dim)
    drawn = [imm.draw_times(lambda _, i=i: (i + 0.5) / groups, draw) for i in range(groups)]
    t, s, r = (torch.tensor([getattr(times, name) for times in drawn], dtype=torch.float64) for name in "tsr")
    return x, noise, t, s, r


def loss_of(imm: IMM, student, target, x, noise, t, s, r) -> torch.Tensor:
    x_t, x_r = (imm.path.add_noise(x, noise, time[:, None, None]) for time in (t, r))
    return imm.group_loss(student, target, x_t, x_r, t, s, r)


@by_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_and_gradients_are_finite_at_every_edge(path: Path, dtype: torch.dtype):
    imm = IMM(IMMConfig(path=path, particles=4))
    last = path.time_range[1]
    t = column(0.0, 0.5, last, last, 1e-12, 0.5, 1.0)
    s = column(0.0, 0.5, last, 0.0, 0.0, 0.5 - 1e-12, 0.0)
    r = imm.target_time(t, s)
    x, noise = particles(7, 4, 16, dtype), particles(7, 4, 16, dtype)
    x[:, 1], noise[:, 1] = x[:, 0], noise[:, 0]
    student = torch.zeros(7, 4, 16, dtype=dtype, requires_grad=True)
    loss = loss_of(imm, student, torch.zeros_like(student), x, noise, t, s, r)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad is not None and student.grad.isfinite().all()
    # where there is nowhere to jump, or nothing to weigh, nothing is learned
    assert loss[:3].abs().max() < 1e-4 and student.grad[:3].abs().max() < 1e-4


def test_near_its_own_time_the_gradient_stays_bounded():
    imm = IMM(IMMConfig())
    sizes = []
    for gap in (1e-3, 1e-5, 1e-7, 1e-9, 1e-12):
        x, noise = particles(1, 4, 64), particles(1, 4, 64)
        student = torch.zeros_like(x, requires_grad=True)
        t, s = column(0.5), column(0.5 - gap)
        loss_of(imm, student, torch.zeros_like(x), x, noise, t, s, s).sum().backward()
        assert student.grad is not None
        sizes.append(float(student.grad.norm()))
    assert max(sizes) <= 1.1 * sizes[0]


@by_name
def test_the_loss_vanishes_where_every_jump_is_right(path: Path):
    """Four data points, each its own condition: with its own G every particle lands where its target does."""
    imm = IMM(IMMConfig(path=path, k=6))
    x, noise, t, s, r = draw_groups(imm, 32, 16, torch.float64)
    student, target = (path.target(x, noise, time[:, None, None]) for time in (t, r))
    right = loss_of(imm, student, target, x, noise, t, s, r)
    assert right.abs().max() < 1e-9
    wrong = loss_of(imm, student + 0.1, target, x, noise, t, s, r)
    assert (wrong[r > 0.05] > 1e-4).all()


def test_where_r_is_s_the_target_is_the_data_itself():
    imm = IMM(IMMConfig(particles=2))
    x, noise = particles(1, 2, 8), particles(1, 2, 8)
    t, s = column(0.03), column(0.0)
    r = imm.target_time(t, s)
    assert torch.equal(r, s)
    student = torch.randn_like(x)
    one, other = (loss_of(imm, student, torch.full_like(x, g), x, noise, t, s, r) for g in (0.0, 9.0))
    assert torch.equal(one, other)
    x_t = imm.path.add_noise(x, noise, t[:, None, None])
    y = imm.path.jump(student, x_t, t[:, None, None], s[:, None, None])
    expected = imm.scale(8) * imm.weight(t) * mmd2(y, x, imm.bandwidth(t, s))
    torch.testing.assert_close(one, expected, rtol=1e-12, atol=0)


def test_no_gradient_reaches_the_target_pass():
    imm = IMM(IMMConfig())
    x, noise, t, s, r = draw_groups(imm, 3, 8)
    student, target = (torch.randn(3, 4, 8, requires_grad=True) for _ in range(2))
    loss_of(imm, student, target, x, noise, t, s, r).sum().backward()
    assert student.grad is not None and student.grad.any() and target.grad is None


# scale


def gradient_ratio(total: int, count: int, blocks: int, scale_of: str = "sqrt", **config) -> float:
    """RMS gradient on G of IMM over flow matching's, G = 0, on pictures of `total` numbers in `blocks` blocks."""
    imm = IMM(IMMConfig(particles=count, **config))
    dim, channels, pictures = total // blocks, 8, 64
    x, noise, t, s, r = draw_groups(imm, pictures * blocks, dim)
    tokens = count * dim // channels  # of a group
    student = torch.zeros_like(x, requires_grad=True)
    loss = loss_of(imm, student, torch.zeros_like(x), x, noise, t, s, r)
    if scale_of == "constant":
        loss = loss * imm.scale(256) / imm.scale(dim)
    (loss.sum() * tokens / (len(t) * tokens)).backward()
    velocity = torch.zeros(len(t), tokens, channels, requires_grad=True)
    shaped = (values.reshape(velocity.shape) for values in (x, noise))
    FlowMatching(FlowMatchingConfig()).token_loss(velocity, *shaped).mean().backward()
    assert student.grad is not None and velocity.grad is not None
    return float(student.grad.square().mean().sqrt() / velocity.grad.square().mean().sqrt())


@pytest.mark.parametrize("total", [64, 1024, 4096])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_the_gradient_on_g_is_flow_matchings_whatever_the_size(total: int, count: int, blocks: int):
    """Within 10 %: a little less where D is small, since the kernel is not quite linear there."""
    ratio = gradient_ratio(total, count, blocks)
    assert abs(ratio - 1) < (0.1 if total == 64 else 0.04), ratio


@pytest.mark.parametrize(
    "config",
    [
        {"a": 2.0, "b": 5.0},
        {"bandwidth": 8.0},
        {"path": Path("fm", "simple_edm")},
        {"path": Path("vp_cosine", "simple_edm")},
    ],
    ids=str,
)
def test_the_gradient_on_g_does_not_depend_on_weight_kernel_or_path(config: dict):
    assert abs(gradient_ratio(1024, 4, 1, **config) - 1) < 0.04


def test_without_the_root_of_d_the_gradient_on_g_depends_on_the_size():
    ratios = [gradient_ratio(total, 4, 1, scale_of="constant") for total in (64, 1024, 4096)]
    assert ratios[0] / ratios[1] > 3.5 and ratios[1] / ratios[2] > 1.9
    halves = gradient_ratio(1024, 4, 2, scale_of="constant") / ratios[1]
    assert abs(halves - 2**0.5) < 0.05


# configuration


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"particles": 0}, "particles 0 must be at least 1"),
        ({"k": -1.0}, "k -1.0 must be in"),
        ({"k_final": 99.0}, "k_final 99.0 must be in"),
        ({"gap": -1e-4}, "gap -0.0001 must be in"),
        ({"gap": 0.994}, "gap 0.994 must be in"),
        ({"eta_min": 160.0}, "eta_min 160.0 and eta_max 160.0"),
        ({"eta_max": math.inf}, "eta_max inf"),
        ({"a": -1.0}, "a -1.0 must be at least 0"),
        ({"b": math.nan}, "b nan must be in"),
        ({"bandwidth": 0.0}, "bandwidth 0.0 must be positive"),
        ({"floor": 0.0}, "floor 0.0 must be positive"),
        ({"path": Path(t_max=1.0)}, "path.t_max 1.0 must be below 1"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_in_one_line(change: dict, message: str):
    with pytest.raises(ValueError) as error:
        IMMConfig(**change)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_configuration_is_read_whole():
    given = {
        "name": "imm",
        "path": {"prediction": "simple_edm", "schedule": "vp_cosine"},
        "k": 6,
        "k_final": 13,
    }
    config = from_mapping(given, IMMConfig)
    assert config == IMMConfig(path=Path("vp_cosine", "simple_edm"), k=6.0, k_final=13.0)
    assert IMM(config).path.time_range == (0.0, 0.996)
    with pytest.raises(ValueError, match="path: prediction euler_fm needs the schedule fm"):
        from_mapping({"path": {"schedule": "vp_cosine"}}, IMMConfig)


# contexts and anchors


def test_a_kernel_on_contexts_too_leaves_each_context_its_own_distance():
    """Where nothing is compared across contexts, the groups of two contexts are two groups."""
    y, z, bandwidth = particles(3, 4, 6), particles(3, 4, 6), column(0.1, 0.3, 0.5)
    same = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)).bool().expand(3, -1, -1)
    apart = mmd2(y, z, bandwidth, share=torch.where(same, 1.0, 0.0))
    halves = [mmd2(y[:, half], z[:, half], bandwidth) / 4 for half in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(apart, halves[0] + halves[1], rtol=1e-12, atol=0)
    between = mmd2(y, z, bandwidth, share=torch.where(same, 1.0, 0.25))
    torch.testing.assert_close(between, 0.75 * apart + 0.25 * mmd2(y, z, bandwidth), rtol=1e-12, atol=0)
    assert (between >= -1e-15).all(), "a product of kernels is a kernel"


def test_particles_are_compared_across_contexts_as_far_as_is_asked():
    imm, joint = IMM(IMMConfig()), IMM(IMMConfig(across_contexts=0.0))
    x, noise, t, s, r = draw_groups(imm, 3, 8)
    x_t, x_r = (imm.path.add_noise(x, noise, time[:, None, None]) for time in (t, r))
    student, target = torch.randn_like(x), torch.randn_like(x)
    arguments = (student, target, x_t, x_r, t, s, r)
    same, other = torch.ones(3, 4, 4, dtype=torch.bool), torch.eye(4, dtype=torch.bool).expand(3, -1, -1)
    plain = imm.group_loss(*arguments)
    assert torch.equal(imm.group_loss(*arguments, same_context=other), plain)
    assert torch.equal(joint.group_loss(*arguments, same_context=same), plain)
    alone = joint.group_loss(*arguments, same_context=other)
    # only the coupled pairs are left: k(y, y) = k(z, z) = 1
    y, z = (
        imm.path.jump(student, x_t, *(c[:, None, None] for c in (t, s))),
        imm.path.jump(target, x_r, *(c[:, None, None] for c in (r, s))),
    )
    coupled = -2 * laplace_m1(y, z, imm.bandwidth(t, s)).diagonal(dim1=-2, dim2=-1).sum(-1) / 16
    torch.testing.assert_close(
        alone.double(), imm.scale(8) * imm.weight(t) * coupled.double(), rtol=1e-4, atol=1e-9
    )


def test_anchors_are_drawn_by_their_share_and_learn_the_velocity():
    imm = IMM(IMMConfig(anchors=0.75, anchors_final=0.25))
    for fraction, share in ((0.0, 0.75), (0.5, 0.5), (1.0, 0.25)):
        draw = keyed_numpy("anchors", int(4 * fraction))
        drawn = [imm.draw_times(lambda draw: draw.random(), draw, fraction) for _ in range(2000)]
        at_t = sum(times.s == times.r == times.t for times in drawn)
        assert at_t / 2000 == pytest.approx(share, abs=0.04)
    x, noise = particles(2, 4, 8), particles(2, 4, 8)
    t, s = column(0.6, 0.6), column(0.6, 0.2)
    r = imm.target_time(t, s)
    x_t, x_r = (imm.path.add_noise(x, noise, time[:, None, None]) for time in (t, r))
    velocity = imm.path.target(x, noise, t[:, None, None])
    student, target = torch.randn_like(x), torch.randn_like(x)
    loss = imm.group_loss(student, target, x_t, x_r, t, s, r, velocity)
    plain = imm.group_loss(student, target, x_t, x_r, t, s, r)
    torch.testing.assert_close(loss[0], (student[0] - velocity[0]).square().mean(), rtol=1e-12, atol=0)
    assert torch.equal(loss[1], plain[1]) and plain[0].abs() < 1e-4


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_s_is_nearer_to_the_data_with_a_higher_power(power: float):
    draw = keyed_numpy("power")
    imm = IMM(IMMConfig(s_power=power))
    drawn = [imm.draw_times(lambda draw: draw.random(), draw) for _ in range(4000)]
    share = np.array([times.s / times.t for times in drawn])
    assert share.mean() == pytest.approx(1 / (1 + power), abs=0.02)
    assert all(times.s <= times.r <= times.t for times in drawn)


@pytest.mark.parametrize("t_min", [0.0, 0.01])
def test_the_ends_of_the_path_have_their_shares(t_min: float):
    draw = np.random.default_rng(0)
    path = Path(t_min=t_min, t_max=0.99)
    imm = IMM(IMMConfig(path=path, from_noise=0.2, to_data=0.5))
    drawn = [imm.draw_times(lambda draw: draw.random(), draw) for _ in range(4000)]
    assert np.mean([times.t == 0.99 for times in drawn]) == pytest.approx(0.2, abs=0.03)
    assert np.mean([times.s == t_min for times in drawn]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([times.t == 0.99 and times.s == t_min for times in drawn]) == pytest.approx(0.1, abs=0.02)
    assert all(times.s <= times.r <= times.t for times in drawn)
    plain = IMM(IMMConfig(path=path))
    assert not any(
        times.t == 0.99 or times.s == t_min
        for times in (plain.draw_times(lambda draw: draw.random(), draw) for _ in range(4000))
    ), "by chance they are never drawn"
