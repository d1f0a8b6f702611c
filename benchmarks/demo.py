"""The main job: a joint text-and-picture model on everyday emoji, and what it draws at 1, 2, 4 and 8 steps.

Trains `configs/demo.yaml` once per seed (a run that is there is continued, or taken as it is; `--run` names another),
then asks for the training prompts and for all held-out (concept, style) pairs. Retrieval@1: the nearest real latent
among the prompts' own pictures is the right one; and the same by lite0 features. Ends with a grid of pictures to look
at.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from benchmarks import harness
from mmgen.config import load_yaml
from mmgen.evaluation.alignment import retrieves_own
from mmgen.evaluation.evaluate import SEED_STRIDE, decode, encode
from mmgen.evaluation.features import Lite0Features, picture_features
from mmgen.evaluation.grid import picture_grid
from mmgen.evaluation.intervals import proportion
from mmgen.evaluation.real import SEEN, RealPicture, read_split, real_pictures
from mmgen.files import write_text
from mmgen.sampling.plan import Plan
from mmgen.sampling.sampler import Sampler
from mmgen.training.checkpoint import latest_checkpoint
from mmgen.training.run import CHECKPOINTS, RunConfig, load, load_run_config
from mmgen.training.trainer import train

SECONDS = "training_seconds"  # beside a run that was trained in one go
SPLITS = {SEEN: 200, "unseen_pairs": 1000}


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    seeds: int = 1
    """Runs, with seeds 0, 1, ..."""
    config: Path = Path("configs/demo.yaml")
    """What is trained."""
    run: Path | None = None
    """Judge this run, such as models/emoji, in place of training one."""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """Refinement steps of a picture."""
    guidance: float | None = None
    """1 is none; the config's own plan where it is not given."""
    picture: Path | None = None
    """Where the grid of the first seed goes; the run's folder where it is not given."""


def measure(arguments: Arguments) -> list[harness.Row]:
    rows: list[harness.Row] = []
    for seed in range(arguments.seeds):
        run, seconds = (arguments.run, None) if arguments.run is not None else _train(arguments, seed)
        sampler = load(run)
        for split, limit in SPLITS.items():
            pictures = _pictures(load_run_config(run), split, sampler)[: 8 if arguments.quick else limit]
            rows += [
                {"seed": seed, "split": split, "training_seconds": seconds, **row}
                for row in _retrieval(sampler, pictures, arguments, seed)
            ]
        if seed == 0:
            path = arguments.picture or run / "demo.png"
            _grid(sampler, load_run_config(run), arguments).save(path)
            print(f"what it draws: {path}")
    return rows


def _train(arguments: Arguments, seed: int) -> tuple[Path, float | None]:
    """The run of one seed, trained to its end, and the seconds that took (None where it was cut and continued)."""
    config = load_yaml(arguments.config, RunConfig)
    config = replace(config, seed=seed, run=config.run if seed == 0 else f"{config.run}-seed{seed}")
    if arguments.quick:
        config = replace(config, run=f"{config.run}-quick", train=replace(config.train, steps=20))
    checkpoint = latest_checkpoint(Path(config.run) / CHECKPOINTS)
    if checkpoint is not None and checkpoint.name == f"step-{config.train.steps:08d}":
        return Path(config.run), _seconds_of(Path(config.run))
    started = time.perf_counter()
    last = train(config, resume=checkpoint is not None)
    if last.name != f"step-{config.train.steps:08d}":
        raise ValueError(
            f"stopped at {last.name} of {config.train.steps}; the same command goes on from there"
        )
    if checkpoint is None:
        write_text(Path(config.run) / SECONDS, f"{time.perf_counter() - started:.1f}\n")
    return Path(config.run), _seconds_of(Path(config.run))


def _seconds_of(run: Path) -> float | None:
    return float((run / SECONDS).read_text()) if (run / SECONDS).is_file() else None


def _pictures(config: RunConfig, split: str, sampler: Sampler) -> list[RealPicture]:
    samples = [sample for source in config.data.sources.values() for sample in read_split(source, split)]
    return real_pictures(samples, sampler.size)


def _plan(sampler: Sampler, steps: int, arguments: Arguments) -> Plan:
    guidance = sampler.plan.guidance if arguments.guidance is None else arguments.guidance
    return replace(sampler.plan, steps=steps, guidance=guidance)


def _retrieval(
    sampler: Sampler, pictures: Sequence[RealPicture], arguments: Arguments, seed: int
) -> list[harness.Row]:
    prompts = [picture.prompt for picture in pictures]
    lite0 = Lite0Features()
    latents = encode([picture.picture for picture in pictures], sampler)
    features = picture_features([picture.picture for picture in pictures], lite0)
    decoded = decode(latents, sampler)
    ceiling = proportion(retrieves_own(picture_features(decoded, lite0), features, cosine=True))
    rows: list[harness.Row] = []
    for steps in arguments.steps:
        plan = _plan(sampler, steps, arguments)
        result = sampler.generate(prompts, plan, seed * SEED_STRIDE)
        assert result.latents is not None
        drawn = picture_features(result.images, lite0)
        rows.append(
            {
                "num": len(prompts),
                "steps": steps,
                "guidance": plan.guidance,
                "nfe": result.cost.nfe,
                "retrieval_latent": proportion(retrieves_own(result.latents, latents)),
                "retrieval_latent_cosine": proportion(retrieves_own(result.latents, latents, cosine=True)),
                "retrieval_lite0": proportion(retrieves_own(drawn, features, cosine=True)),
                "ceiling_lite0": ceiling,
                "seconds_per_picture": result.cost.seconds / len(prompts),
            }
        )
    return rows


def _grid(sampler: Sampler, config: RunConfig, arguments: Arguments) -> Image.Image:
    """Columns: six seen and six held-out prompts. Rows: the real picture, then one for each number of steps."""
    columns = [picture for split in SPLITS for picture in _pictures(config, split, sampler)[:6]]
    prompts = [picture.prompt for picture in columns]
    titles = [prompt if index < 6 else f"{prompt} (held out)" for index, prompt in enumerate(prompts)]
    rows, labels = [[picture.picture for picture in columns]], ["real"]
    for steps in arguments.steps:
        plan = _plan(sampler, steps, arguments)
        rows.append(sampler.generate(prompts, plan).images)
        labels.append(f"{steps} step{'s' if steps > 1 else ''}")
    return picture_grid(rows, labels, titles)


if __name__ == "__main__":
    harness.run("demo", Arguments, measure, __doc__)
