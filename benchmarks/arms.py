"""Runs of one data set's configuration with settings apart, trained side by side and compared with held-out pictures.

What `headline`, `imm_study`, `emoji` and `surface` share. A run is its configuration file, its folder and its log
beside each other; one that is there is continued, or taken as it is, and refused where its configuration is another.
"""

import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image as Pictures
from sklearn.svm import SVC
from torch import Tensor

from benchmarks import harness
from data_pipelines import digits, fashion_mnist
from mmgen.config import load_yaml, parse_overrides, save_yaml, to_mapping
from mmgen.data.loader import Loader
from mmgen.evaluation.distances import frechet_statistic, kid_statistic
from mmgen.evaluation.features import Lite0Features, picture_features
from mmgen.evaluation.intervals import Estimate, Statistic, proportion
from mmgen.evaluation.memorization import memorization
from mmgen.evaluation.real import SEEN, RealPicture, read_split, real_pictures
from mmgen.modalities import Image
from mmgen.objectives import FlowMatchingConfig
from mmgen.rng import keyed_numpy
from mmgen.sampling.cost import context_flops, state_flops, target_pass_ratio
from mmgen.sampling.plan import Plan
from mmgen.sampling.sampler import Sampler
from mmgen.sequence import PAD
from mmgen.training.checkpoint import latest_checkpoint
from mmgen.training.run import (
    CHECKPOINTS,
    PreviewConfig,
    RunConfig,
    ValidationConfig,
    build,
    default_device,
)

DataName = Literal["digits", "fashion"]
Objective = Literal["imm", "flow_matching"]
HELD_OUT = {"digits": "validation", "fashion": "test"}
COMPONENTS = 64  # of lite0 features
CLASSIFIER_PICTURES = 10_000
SEED_STRIDE = 1_000_000  # of the noise of two runs
CHOOSING_COPIES = 1  # pictures for each held-out one's prompt on which a plan is chosen
HELD_OUT_PICTURES = 2_000  # at most: what is drawn for them is scored again and again
DRAWS = 400  # of a bootstrap


@dataclass(frozen=True)
class Run:
    """One training: an objective, what is set apart from the configuration, a seed, a number of steps."""

    folder: Path
    data: str  # the name of its configuration
    objective: Objective
    seed: int
    steps: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    """key of a configuration -> value"""

    def config(self) -> RunConfig:
        path = Path(f"configs/{self.data}.yaml")
        config = load_yaml(path, RunConfig)
        config = replace(
            config,
            run=str(self.folder),
            seed=self.seed,
            objective=config.objective if self.objective == "imm" else FlowMatchingConfig(),
            train=replace(config.train, steps=self.steps),
            validation=ValidationConfig(),
            preview=PreviewConfig(),
        )
        words = []
        for key, value in self.settings.items():
            words += [f"--{key}", *map(str, value if isinstance(value, tuple) else (value,))]
        return parse_overrides(RunConfig, config, words, str(path))


def prepare(data: DataName) -> RunConfig:
    """The data set's configuration; the data set is built where it is missing."""
    config = load_yaml(Path(f"configs/{data}.yaml"), RunConfig)
    folder = Path(str(next(iter(config.data.sources.values())).path))
    if not folder.exists():
        if data == "digits":
            digits.build(digits.Options(folder, validation=0.3))
        else:
            fashion_mnist.build(fashion_mnist.Options(folder))
    return config


def cost_ratio(config: RunConfig) -> float:
    """FLOPs of a step of IMM over those of one of flow matching, from the tokens of some real batches."""
    context, state, image = _tokens(config)
    return target_pass_ratio(config.model, context, state, image.channels)


def picture_flops(config: RunConfig) -> float:
    """FLOPs of training on one picture by IMM, all of its blocks, from the tokens of some real batches."""
    context, state, image = _tokens(config)
    clean = context_flops(config.model, context, context, image.channels)
    noisy = state_flops(config.model, 1, state, context + state, image.channels, image.channels)
    ratio = target_pass_ratio(config.model, context, state, image.channels)
    height, width = image.token_grid(*config.size)
    return 3 * (clean + noisy) * ratio * height * width / state


def _tokens(config: RunConfig) -> tuple[float, float, Image]:
    """Tokens of the context and of the state for each instance (a block of a picture), and the picture modality."""
    parts = build(config)
    loader = Loader(config.data, parts.modalities, config.seed, parts.objective.grouping)
    counts = np.zeros(3)
    for batch, _ in islice(loader, 4):
        tokens = [int((stream.layout.document != PAD).sum()) for stream in (batch.context, batch.state)]
        counts += [*tokens, len(batch.instances.group)]
    context, state = counts[:2] / counts[2]
    image = parts.modalities["image"]
    assert isinstance(image, Image), "arms draw pictures"
    return context, state, image


def train(runs: Sequence[Run], workers: int) -> None:
    """Trains what is not finished, `workers` at a time with a thread each. Raises ValueError where one fails, or is
    there with another configuration."""
    for run in runs:
        check(run)

    def one(run: Run) -> None:
        last = latest_checkpoint(run.folder / CHECKPOINTS)
        if last is not None and last.name == f"step-{run.steps:08d}":
            return
        log, path = run.folder.with_suffix(".log"), run.folder.with_suffix(".yaml")
        log.parent.mkdir(parents=True, exist_ok=True)
        save_yaml(run.config(), path)
        command = [sys.executable, "-m", "mmgen", "train", str(path)]
        if last is not None:
            command.append("--resume")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("w", encoding="utf-8") as out:
            done = subprocess.run(command, env=environment, stdout=out, stderr=out, check=False)
        if done.returncode:
            raise ValueError(f"training {run.folder} failed; see {log}")

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, runs))


def plans(objective: Objective, evaluations: int, shifts: Sequence[float]) -> list[Plan]:
    """Plans of so many network evaluations: every time grid, and for flow matching Heun's solver too."""

    def grids(steps: int, solver: str) -> list[Plan]:
        # one step has no grid
        return [Plan(steps=steps, solver=solver, shift=shift) for shift in (shifts if steps > 1 else (1.0,))]

    found = grids(evaluations, "euler")
    if objective == "flow_matching" and evaluations % 2 == 0:
        found += grids(evaluations // 2, "heun")
    return found


def check(run: Run) -> None:
    """Raises ValueError where what is there of a run was made with another configuration."""
    path = run.folder.with_suffix(".yaml")
    if not path.is_file():
        return
    there, asked = (to_mapping(each) for each in (load_yaml(path, RunConfig), run.config()))
    other = [name for name in asked if there.get(name) != asked[name]]
    if other:
        raise ValueError(
            f"{path} has another {', '.join(other)} than is asked for: remove {path.with_suffix('.*')} and the run, or "
            "name another folder with --runs"
        )


class Extract(Protocol):
    def __call__(self, images: Sequence[Pictures.Image], /, cached: bool = False) -> Float[Tensor, "N F"]: ...


@dataclass(frozen=True)
class Real:
    """The real side, in features: what is compared with, and what judges labels and copies."""

    held_out: list[RealPicture]
    features: Float[Tensor, "M F"]
    training: Float[Tensor, "T F"]
    classifier: SVC
    extract: Extract

    @property
    def prompts(self) -> list[str]:
        return [picture.prompt for picture in self.held_out]


def side_by_side(workers: int) -> ProcessPoolExecutor:
    """Processes of one thread each, to score runs in; not forked, which a GPU's context does not survive."""
    return ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )


@cache
def real(data: DataName) -> Real:
    """Features are grey levels of small pictures, of others the leading components of lite0's."""
    config = prepare(data)
    source = next(iter(config.data.sources.values()))
    training, held_out = (
        real_pictures(read_split(source, split), config.size) for split in (SEEN, HELD_OUT[data])
    )
    held_out = held_out[:HELD_OUT_PICTURES]
    some = training[:CLASSIFIER_PICTURES]
    extract = pixels if data == "digits" else _components([picture.picture for picture in some])
    classifier = SVC(gamma="scale", C=10.0).fit(
        pixels([picture.picture for picture in some]).numpy(), [picture.prompt for picture in some]
    )
    features, trained = (
        extract([picture.picture for picture in part], cached=True) for part in (held_out, training)
    )
    return Real(held_out, features, trained, classifier, extract)


def pixels(images: Sequence[Pictures.Image], /, cached: bool = False) -> Float[Tensor, "N F"]:
    """Grey levels in [0, 1]; there is nothing to gain by keeping them."""
    levels = (np.asarray(image.convert("L"), dtype=np.float64) / 255 for image in images)
    return torch.stack([torch.from_numpy(each).flatten() for each in levels])


def _components(images: Sequence[Pictures.Image]) -> Extract:
    network = Lite0Features(default_device())
    base = picture_features(images, network, cached=True).double()
    centre = base.mean(0)
    axes = torch.linalg.svd(base - centre, full_matrices=False)[2][:COMPONENTS]

    def extract(images: Sequence[Pictures.Image], /, cached: bool = False) -> Float[Tensor, "N F"]:
        return (picture_features(images, network, cached).double() - centre) @ axes.T

    return extract


def floor(side: Real, num: int) -> harness.Row:
    """What `num` training pictures (or all there are) score in place of drawn ones, and the classifier on real ones."""
    order = keyed_numpy("arms", "floor").permutation(len(side.training))
    some = side.training[order[:num]]
    predicted = side.classifier.predict(pixels([picture.picture for picture in side.held_out]).numpy())
    return {
        "objective": "floor",
        "frechet": distance(frechet_statistic, some, side.features),
        "kid": distance(kid_statistic, some, side.features),
        "label_agreement": proportion(list(predicted == np.array(side.prompts))),
    }


def distance(statistic: Any, features: Float[Tensor, "N F"], others: Float[Tensor, "M F"]) -> float:
    """A statistic of `mmgen.evaluation.distances` of two whole sets."""
    ones = [torch.ones(1, len(each), dtype=torch.float64) for each in (features, others)]
    return statistic(features, others)(*ones).item()


@dataclass(frozen=True)
class Drawn:
    """Pictures of one plan, in features, and their scores."""

    plan: Plan
    features: Float[Tensor, "N F"]
    row: harness.Row


def draw(sampler: Sampler, plans: Sequence[Plan], side: Real, copies: int, seed: int) -> Drawn:
    """`copies` pictures for each held-out one's prompt, of the plan with the least Frechet distance; where there is a
    choice it is made by other pictures and by their distance to training pictures, so that the best of many is not
    better by chance."""
    seed *= SEED_STRIDE
    chosen = plans[0]
    if len(plans) > 1:
        several = side.prompts * CHOOSING_COPIES

        def scored(plan: Plan) -> float:
            drawn = side.extract(sampler.generate(several, plan, seed + SEED_STRIDE // 2).images)
            return distance(frechet_statistic, drawn, side.training)

        chosen = min(plans, key=scored)
    prompts = side.prompts * copies
    images = sampler.generate(prompts, chosen, seed).images
    features = side.extract(images)
    predicted = side.classifier.predict(pixels(images).numpy())
    row = {
        "frechet": distance(frechet_statistic, features, side.features),
        "kid": distance(kid_statistic, features, side.features),
        "label_agreement": proportion(list(predicted == np.array(prompts))),
        "memorization": memorization(features, side.training, side.features).share,
    }
    return Drawn(chosen, features, row)


def resampled(features: Float[Tensor, "N F"], real: Float[Tensor, "M F"], seed: int) -> dict[str, np.ndarray]:
    """Both distances, first as they are and then for every bootstrap draw. Real pictures are drawn alike for all runs,
    and drawn ones alike for both objectives of a seed: their noise and captions are the same.

    Fewer different pictures are further away: the mean over the draws, which says by how much, is put back at the
    distance itself.
    """
    counts = []
    for key, number in ((("drawn", seed), len(features)), (("real", 0), len(real))):
        drawn = keyed_numpy("headline", *key).multinomial(number, [1 / number] * number, size=DRAWS)
        counts.append(torch.cat([torch.ones(1, number).double(), torch.from_numpy(drawn).double()]))
    found: dict[str, np.ndarray] = {}
    statistics: dict[str, Statistic] = {
        "frechet": frechet_statistic(features, real),
        "kid": kid_statistic(features, real),
    }
    for name, statistic in statistics.items():
        values = statistic(*counts).numpy()
        values[1:] += values[0] - values[1:].mean()
        found[name] = values
    return found


def difference(one: np.ndarray, other: np.ndarray) -> Estimate:
    """Mean over seeds of one less other; both [1 + draws, seeds]: as they are, and for every bootstrap draw."""
    return _estimate((one - other).mean(1), one[0] - other[0])


def ratio(one: np.ndarray, other: np.ndarray) -> Estimate:
    """Mean of one over mean of other; both [1 + draws, seeds]: as they are, and for every bootstrap draw."""
    values = one.mean(1) / other.mean(1)
    # what a seed adds to it, to first order
    return _estimate(values, values[0] + (one[0] - values[0] * other[0]) / other[0].mean())


def _estimate(values: np.ndarray, by_seed: np.ndarray) -> Estimate:
    """The first value with a 95 % interval: Student's over few seeds, and the bootstrap's over prompts and real
    pictures, which all seeds share. They are added as independent errors, though each has a part of the other."""
    value, num = float(values[0]), len(by_seed)
    of_seeds = value - harness.over_seeds(by_seed.tolist()).low if num > 1 else 0.0
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Estimate(
        value, value - math.hypot(value - low, of_seeds), value + math.hypot(high - value, of_seeds), num
    )
