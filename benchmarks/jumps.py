"""The jumps that `benchmarks.blind_jump` measures: closed forms, small networks, tests of a law. No command line.

x_t = (1 - t) x0 + t e; a jump from t to s is x + (s - t) u. It is blind to its target time where u = u(x, t), and told
it where u = u(x, t, s). The three claims T1, T2 and T3 are argued in docs/target_time.md.

Shape letters: I instances (each with its own times), N draws, M items of a data set, D channels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from scipy import optimize, stats
from sklearn import datasets
from sklearn.metrics.pairwise import laplacian_kernel
from torch import Tensor, nn

from mmgen.evaluation.distances import polynomial_kernel
from mmgen.model.time import TimeEmbedding, modulate
from mmgen.model.trunk import TrunkConfig
from mmgen.objectives import FlowMatching, FlowMatchingConfig, Path
from mmgen.rng import keyed_numpy, keyed_torch

UNIT_PATH = Path(sigma_data=1.0)  # of T2 and T3; T1 has mmgen's own scale, 0.5
TESTED = (0.0, 0.25, 0.5, 0.75)  # target times of the tests of T3
TESTS = ("variance", "cubic", "ks", "laplace")
LEVEL = 0.01

Output = Callable[[Float[Tensor, "N D"], float], Float[Tensor, "N D"]]  # (x_t, t) -> G
Jump = Callable[[ndarray, float], ndarray]  # (x at t = 1, s) -> x_s


# ---- T1: one Euler step of flow matching


def data_sets() -> dict[str, Float[Tensor, "M D"]]:
    """Data sets by name, in float64, each shifted and scaled as a whole to mean 0 and standard deviation 0.5."""
    angle = torch.arange(8) * math.pi / 4
    corners = torch.stack([angle.cos(), angle.sin()], dim=-1).double()
    ring = corners.repeat(50, 1) + 0.1 * torch.randn(
        400, 2, dtype=torch.float64, generator=keyed_torch("ring")
    )
    moons, _ = datasets.make_moons(400, noise=0.05, random_state=0)
    found = {"ring": ring, "moons": torch.from_numpy(moons)}
    found |= {"iris": _bundled(datasets.load_iris()), "digits": _bundled(datasets.load_digits())}
    found["cancer"] = _bundled(datasets.load_breast_cancer(), standardize=True)
    return {name: (x - x.mean()) / x.std() * 0.5 for name, x in found.items()}


def _bundled(bunch, standardize: bool = False) -> Float[Tensor, "M D"]:
    x = torch.from_numpy(bunch.data).double()
    return (x - x.mean(0)) / x.std(0) if standardize else x


def optimal_output(path: Path, data: Float[Tensor, "M D"]) -> Output:
    """The G that minimizes flow matching's loss on the empirical law of `data`: E[e - x0 | x_t = x] / sigma_data.

    The posterior of x0 is a softmax over the items, and e - x0 = (x - x0) / t. At t = 1 it is uniform whatever x is.
    """

    def output(x: Float[Tensor, "N D"], t: float) -> Float[Tensor, "N D"]:
        distance = torch.cdist(x, (1 - t) * data).square()
        mean = torch.softmax(-distance / (2 * (t * path.sigma_data) ** 2), dim=1) @ data
        return (x - mean) / (t * path.sigma_data)

    return output


def euler(path: Path, output: Output, x: Float[Tensor, "N D"], num_steps: int) -> Float[Tensor, "N D"]:
    """Samples: `num_steps` equal steps from noise x at t = 1 to t = 0."""
    for i in range(num_steps):
        t, s = 1 - i / num_steps, 1 - (i + 1) / num_steps
        x = path.jump(output(x, t), x, t, s)
    return x


def variance_share(samples: Float[Tensor, "N D"], data: Float[Tensor, "M D"]) -> float:
    """Total variance of the samples over that of the data: 0 where all are one point, 1 where the spread is right."""
    return (samples.var(0, correction=0).sum() / data.var(0, correction=0).sum()).item()


class JumpNetwork(nn.Module):
    """G(x, t, s): two residual layers, modulated by mmgen's embedding of t and t - s. Blind arms are told s = t."""

    def __init__(self, channels: int, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.input = nn.Linear(channels, width)
            self.time = TimeEmbedding(width, TrunkConfig.time_scale)
            self.modulation = nn.Linear(width, 4 * width)
            self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
            self.output = nn.Linear(width, channels)
        for linear in (self.modulation, self.output):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, x: Float[Tensor, "I N D"], t: Float[Tensor, " I"], s: Float[Tensor, " I"]
    ) -> Float[Tensor, "I N D"]:
        instance = torch.arange(len(t))[:, None].expand(x.shape[:2])
        modulation = self.modulation(nn.functional.silu(self.time(t, s))).unflatten(-1, (2, 2, -1))
        h = self.input(x)
        for i, layer in enumerate(self.layers):
            h = h + layer(nn.functional.silu(modulate(h, modulation[:, i], instance)))
        return self.output(h)


def fit(
    network: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    seed: int,
    steps: int,
    watch: Callable[[], float] | None = None,
) -> list[tuple[int, float]]:
    """Trains by Adam with a cosine decay. Returns (step, watch()) at some steps, the last included."""
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = keyed_torch("blind_jump", seed)
    watched = {round(steps ** (i / 15)) for i in range(16)} if watch else set()
    curve = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(draw).backward()
        optimizer.step()
        schedule.step()
        if watch and step in watched:
            curve.append((step, watch()))
    return curve


def train_flow_matching(data: Float[Tensor, "M D"], seed: int, steps: int) -> Output:
    """What a network says that mmgen's own flow matching trained on `data`."""
    objective, items = FlowMatching(FlowMatchingConfig()), data.float()
    network = JumpNetwork(data.shape[1], 128, seed)

    def loss(draw: torch.Generator) -> Tensor:
        t = torch.rand(32, generator=draw, dtype=torch.float64)
        x = items[torch.randint(len(items), (32, 16), generator=draw)]
        noise = objective.path.sigma_data * torch.randn(x.shape, generator=draw)
        noisy = objective.path.add_noise(x, noise, _column(t))
        return objective.token_loss(network(noisy, t, objective.told_target(t, t)), x, noise).mean()

    fit(network, loss, seed, steps)

    @torch.no_grad()
    def output(x: Float[Tensor, "N D"], t: float) -> Float[Tensor, "N D"]:
        time = torch.tensor([t], dtype=torch.float64)
        return network(x[None].float(), time, objective.told_target(time, time))[0].to(x.dtype)

    return output


def _column(time: Float[Tensor, " I"]) -> Float[Tensor, "I 1 1"]:
    return time[:, None, None].float()


# ---- T2: jumps on data N(0, d^2)


def scale(u: Tensor, d: float) -> Tensor:
    """S(u), the standard deviation of x_u. The probability flow takes x_t to x_s = x_t S(s) / S(t)."""
    return ((1 - u) ** 2 * d * d + u * u).sqrt()


@dataclass(frozen=True)
class Case:
    """Jumps asked of one network: data N(0, d^2), pairs (t, s), and what the error of each pair counts."""

    name: str
    d: float
    pairs: tuple[tuple[float, float], ...]
    weight: float = 1.0

    @property
    def times(self) -> tuple[Float[Tensor, " I"], Float[Tensor, " I"]]:
        t, s = torch.tensor(self.pairs, dtype=torch.float64).T
        return t, s


def from_noise(d: float, *targets: float) -> Case:
    """The jumps from t = 1 to `targets`; errors are summed."""
    named = ", ".join(f"{s:g}" for s in targets)
    return Case(f"d = {d:g}, s in {{{named}}}", d, tuple((1.0, s) for s in targets))


GRID = (1.0, 0.75, 0.5, 0.25, 0.0)
HEADLINE = from_noise(1.0, 0.0, 0.5)
# dense: at mmgen's time scale a network knows little of a time that lies 0.01 beside those it saw
INTERVAL = Case("d = 1, s from 0 to 1 (mean)", 1.0, tuple((1.0, i / 500) for i in range(501)), 1 / 501)
CASES = (
    from_noise(0.5, 0.0),
    HEADLINE,
    from_noise(0.5, 0.0, 0.5),
    from_noise(2.0, 0.0, 0.5),
    from_noise(1.0, 0.0, 0.25, 0.5, 0.75),
    INTERVAL,
    Case(
        "d = 1, all s < t in {0, 0.25, 0.5, 0.75, 1}", 1.0, tuple((t, s) for t in GRID for s in GRID if s < t)
    ),
)


def blind_slopes(case: Case) -> Float[Tensor, " I"]:
    """For each pair the best blind slope k: u(x, t) = k x. It is least squares at each x and t, so that no function
    of x and t, linear or not, does better."""
    t, s = case.times
    asked, stride = scale(s, case.d) / scale(t, case.d) - 1, s - t
    same = (t[:, None] == t).double()
    return (same @ (asked * stride)) / (same @ stride.square())


def floor(case: Case) -> float:
    """The least error of a blind jump, in units of the variance of x_t."""
    t, s = case.times
    left = scale(s, case.d) / scale(t, case.d) - 1 - (s - t) * blind_slopes(case)
    return case.weight * left.square().sum().item()


def relative_error(network: JumpNetwork, case: Case, told: bool, pairs: Tensor, unit: Tensor) -> Tensor:
    """Mean squared distance to the flow's x_s over the variance of x_t = S(t) unit, for each of `pairs` [I, 2]."""
    t, s = pairs.T
    x = unit * _column(scale(t, case.d))
    x_s = UNIT_PATH.jump(network(x, t, s if told else t), x, _column(t), _column(s))
    return ((x_s - unit * _column(scale(s, case.d))) / _column(scale(t, case.d))).square().mean((1, 2))


@dataclass(frozen=True)
class Trained:
    """A network as a map from t = 1, and how its error fell."""

    network: JumpNetwork
    told: bool
    curve: list[tuple[int, float]]
    """(training step, error), in the units of `floor`."""

    @torch.no_grad()
    def __call__(self, x: ndarray, s: float) -> ndarray:
        """x_s from x at t = 1."""
        t, target = torch.ones(1, dtype=torch.float64), torch.tensor([s], dtype=torch.float64)
        start = torch.from_numpy(x).float()[None, :, None]
        output = self.network(start, t, target if self.told else t)
        return UNIT_PATH.jump(output, start, 1.0, s)[0, :, 0].double().numpy()


def train_jump(case: Case, told: bool, seed: int, steps: int) -> Trained:
    """A network asked for the jumps of `case`. Both arms of a seed start from the same weights and see the same
    draws; only what they are told differs."""
    network = JumpNetwork(1, 64, seed)
    pairs = torch.tensor(case.pairs, dtype=torch.float64)
    unit = normal_quantiles(64)
    evaluated = torch.from_numpy(unit / unit.std()).float()[None, :, None].expand(len(pairs), -1, -1)

    def loss(draw: torch.Generator) -> Tensor:
        picked = pairs[torch.randint(len(pairs), (16,), generator=draw)]
        return relative_error(network, case, told, picked, torch.randn(16, 32, 1, generator=draw)).mean()

    @torch.no_grad()
    def error() -> float:
        return case.weight * relative_error(network, case, told, pairs, evaluated).sum().item()

    return Trained(network, told, fit(network, loss, seed, steps, error))


def normal_quantiles(num: int) -> ndarray:
    return stats.norm.ppf((np.arange(num) + 0.5) / num)


# ---- T3: the law of x_s at every s, on data N(0, 1)


def standard_deviation(s: float) -> float:
    return math.hypot(1 - s, s)


def true_map(x: ndarray, s: float) -> ndarray:
    return x * standard_deviation(s)


def _half_of_the_variance(edge: float) -> float:
    # E[x^2; |x| > edge] - 1/2
    return float(2 * (edge * stats.norm.pdf(edge) + stats.norm.sf(edge)) - 0.5)


EDGE = optimize.root_scalar(_half_of_the_variance, bracket=(1.0, 2.0)).root  # 1.538


def sign_flip(x: ndarray, s: float) -> ndarray:
    """The decoy: u = 2 x outside EDGE, where half of the variance of N(0, 1) lies, and 0 inside.

    E[x u] = 1 and E[u^2] = 2, as on the path, so that the variance is right at every s. At s = 0 the law is right too
    (outer x change their sign); at s = 1/2 they all sit at 0.
    """
    return x + (s - 1) * np.where(np.abs(x) > EDGE, 2 * x, 0.0)


def low_digits(pieces: int) -> Jump:
    """u = x - x0 where x0 is a second normal number, made from the digits of x that `pieces` does not resolve.

    Blind and deterministic, and with more pieces as near to the law of x_s as one likes: what T3 rules out is an
    exact match, and a match by a function that a network could be.
    """

    def jump(x: ndarray, s: float) -> ndarray:
        fraction = np.modf(stats.norm.cdf(x) * pieces)[0]
        x0 = stats.norm.ppf(fraction.clip(1e-12, 1 - 1e-12))
        return x + (s - 1) * (x - x0)

    return jump


def train_on_laws(seed: int, steps: int) -> Trained:
    """A blind network that minimizes the squared Wasserstein-2 distance to p_s over s uniform in [0, 1], by any map."""
    network = JumpNetwork(1, 64, seed)
    t, num = torch.ones(8, dtype=torch.float64), 256
    wanted = torch.from_numpy(normal_quantiles(num)).float()

    def loss(draw: torch.Generator) -> Tensor:
        s = torch.rand(8, generator=draw, dtype=torch.float64)
        spread = (torch.arange(num) + torch.rand(8, num, generator=draw, dtype=torch.float64)) / num
        x = torch.special.ndtri(spread)[..., None].float()
        x_s = UNIT_PATH.jump(network(x, t, t), x, _column(t), _column(s))[..., 0]
        return (x_s.sort(dim=1).values - wanted * scale(s, 1.0)[:, None].float()).square().mean()

    fit(network, loss, seed, steps)
    return Trained(network, False, [])


def ks_distance(jump: Jump, s: float) -> float:
    """The largest gap between the distribution functions of x_s as `jump` makes it and of p_s."""
    drawn = jump(normal_quantiles(20_000), s)
    return float(stats.kstest(drawn, stats.norm(scale=standard_deviation(s)).cdf, method="asymp").statistic)


def p_values(jump: Jump, s: float, num: int, seed: int) -> dict[str, float]:
    """Four tests of x_s against p_s: its variance; its first three moments (the kernel of KID); Kolmogorov-Smirnov;
    and the MMD of a Laplace kernel, as IMM's, by permutation against as many draws of p_s."""
    draw, true = keyed_numpy("blind_jump", "test", f"{s}", seed), standard_deviation(s)
    drawn, real = jump(draw.standard_normal(num), s), true * draw.standard_normal(num)
    chi2, law = (num - 1) * drawn.var(ddof=1) / true**2, stats.chi2(num - 1)
    both = (np.concatenate([drawn, real]) / true)[:, None]
    cubic = polynomial_kernel(torch.from_numpy(both), torch.from_numpy(both)).numpy()
    return {
        "variance": float(2 * min(law.cdf(chi2), law.sf(chi2))),
        "cubic": permutation_test(cubic, draw),
        "ks": float(stats.kstest(drawn, stats.norm(scale=true).cdf).pvalue),
        "laplace": permutation_test(laplacian_kernel(both, gamma=1.0), draw),
    }


def permutation_test(kernel: ndarray, draw: np.random.Generator, permutations: int = 499) -> float:
    """The p-value of the squared MMD between the first and the second half of the kernel's items."""
    half = len(kernel) // 2
    signs = np.repeat([1.0, -1.0], half)
    rows = np.vstack([signs, draw.permuted(np.tile(signs, (permutations, 1)), axis=1)]).astype(np.float32)
    mmd = ((rows @ kernel.astype(np.float32)) * rows).sum(1)
    return float((mmd >= mmd[0]).mean())


def rejected(jump: Jump, num: int, seed: int) -> dict[str, bool]:
    """Whether each test rejects the map at LEVEL, over all TESTED times together (Bonferroni)."""
    found = [p_values(jump, s, num, seed) for s in TESTED]
    return {name: min(p[name] for p in found) * len(TESTED) < LEVEL for name in TESTS}
