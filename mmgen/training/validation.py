"""What a run looks at on its way, with the averaged weights: losses on held-out data, and pictures for some prompts.

Every rank takes part, since each holds a part of the weights; only the first writes.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from mmgen.data.loader import DataConfig, build_loaders
from mmgen.evaluation.grid import picture_grid
from mmgen.model.attention import choose_backend
from mmgen.sampling.sampler import Sampler
from mmgen.training.feed import feeds
from mmgen.training.losses import compute_losses
from mmgen.training.metrics import Meters
from mmgen.training.ranks import Ranks
from mmgen.training.run import Parts, RunConfig


@torch.no_grad()
def validate(
    parts: Parts, config: RunConfig, ranks: Ranks, stop: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """Mean losses on the held-out sources, with draws that do not depend on the step: schedules are at their end.
    Those of no batch once `stop` says so, which is asked before each.

    The batches do not depend on the ranks, which compute them in turn; all compute equally many.
    """
    parts.model.eval()
    data = DataConfig(config.validation.sources, config.data.compose, config.data.pack)
    meters = Meters()
    ready = feeds(
        build_loaders(data, parts.modalities, config.seed + 1, parts.objective.grouping),
        parts.objective,
        config.seed + 1,
        choose_backend(config.train.attention, ranks.device),
        step=1,
        total_steps=1,
        joint=config.joint,
    )
    rounds = -(-config.validation.batches // ranks.num_ranks)
    for number, (feed, _) in enumerate(islice(ready, rounds * ranks.num_ranks)):
        if number % ranks.num_ranks == 0 and stop():
            meters.read()
            return {}
        if number % ranks.num_ranks != ranks.rank:
            continue
        losses = compute_losses(parts, feed, config.train.precision, ranks.device)
        if number < config.validation.batches:
            for name, loss in losses.items():
                meters.add(f"validation_{name}_loss", loss.total, loss.count)
    return meters.read()


def preview(
    parts: Parts, config: RunConfig, ranks: Ranks, step: int, stop: Callable[[], bool] = lambda: False
) -> Path | None:
    """Draws the preview prompts with each number of steps: one grid under the run's `previews`. None, and no grid,
    where `stop` says so, which is asked before each number of steps.
    """
    sampler = Sampler(parts.model, parts.modalities, parts.objective, config.size, config.plan)
    # where matrices travel in bfloat16 there are no others to draw with
    narrow = config.train.precision == "bf16" and ranks.num_ranks > 1
    autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=narrow)
    with (
        autocast,
        torch.compiler.set_stance("force_eager"),
    ):  # a cache grows: every shape would be compiled anew
        rows = []
        for steps in config.preview.steps:
            if stop():
                return None
            plan = replace(config.plan, steps=steps, guidance=config.preview.guidance)
            rows.append(sampler.generate(config.preview.prompts, plan).images)
    path = Path(config.run) / "previews" / f"step-{step:08d}.png"
    if ranks.rank == 0:
        path.parent.mkdir(exist_ok=True)
        labels = [f"{steps} step{'s' if steps > 1 else ''}" for steps in config.preview.steps]
        picture_grid(rows, labels, config.preview.prompts).save(path)
    return path
