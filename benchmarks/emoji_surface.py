"""The surface of one checkpoint on captioned emoji: what blocks, steps, guidance, thoughts and candidates buy.

Trains `configs/surface.yaml` (half an hour of two CPU cores; a run that is there is taken as it is) and measures it
by `mmgen tradeoff`: on held-out (concept, style) pairs over all axes, on training prompts over blocks, steps and
guidance, and on prompts that name a group alone ("an animal"), with thoughts of several lengths. Writes `report.html`
of all three beside the run. Rows are the plans whose guidance was chosen, with the figures of the half of the prompts
on which nothing was chosen, and the table of text.
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks import checkpoint_surface, harness
from benchmarks.checkpoint_surface import Prompts, words

CONFIG = Path("configs/surface.yaml")


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    run: Path = Path("runs/surface")
    """Where the run is kept; one that is finished is taken as it is."""
    blocks: tuple[int, ...] = (1, 2, 4)
    steps: tuple[int, ...] = (1, 2, 4, 8)
    guidance: tuple[float, ...] = (1.0, 2.0)
    thinking: tuple[int, ...] = (0, 12)
    """Of held-out prompts alone."""
    candidates: tuple[int, ...] = (1, 4)
    """Of held-out prompts alone."""
    lengths: tuple[int, ...] = (0, 12, 24)
    """Of thoughts after prompts that name a group alone."""
    num: int = 200
    """Prompts of each split at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checkpoint_surface.refuse_seeds(self)


def measure(arguments: Arguments) -> list[harness.Row]:
    a = arguments
    checkpoint_surface.train(CONFIG, a.run, a.quick)
    both = words(blocks=a.blocks, steps=a.steps)
    shared = words(guidance=a.guidance, num=[a.num])
    chosen = words(thinking=a.thinking, candidates=a.candidates)
    vague = ["--level", "group", *words(steps=(1, 2, 4), thinking=a.lengths)]
    asked = {
        "held-out pairs": Prompts("unseen_pairs", "tradeoff", [*shared, *both, *chosen]),
        "training": Prompts("seen", "tradeoff-seen", [*shared, *both]),
        "groups": Prompts("seen", "tradeoff-group", [*shared, *vague]),
    }
    return checkpoint_surface.measure(a.run, asked)


if __name__ == "__main__":
    harness.run("emoji_surface", Arguments, measure, __doc__)
