"""The surface of one checkpoint on handwritten digits: what blocks, steps, guidance and candidates buy.

Trains `configs/digits_surface.yaml` (ten minutes of one CPU core; a run that is there is taken as it is) and measures
it by `mmgen tradeoff` on the captions of held-out digits, with texts of several tokens a pass. Writes `report.html`
beside the run. Rows are the plans whose guidance was chosen, with the figures of the half of the prompts on which
nothing was chosen, and the table of text.
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks import arms, checkpoint_surface, harness
from benchmarks.checkpoint_surface import Prompts, words

CONFIG = Path("configs/digits_surface.yaml")


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    run: Path = Path("runs/digits_surface")
    """Where the run is kept; one that is finished is taken as it is."""
    blocks: tuple[int, ...] = (1, 2, 4)
    steps: tuple[int, ...] = (1, 2, 4, 8)
    guidance: tuple[float, ...] = (1.0, 2.0)
    candidates: tuple[int, ...] = (1, 4)
    num: int = 500
    """Held-out prompts at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checkpoint_surface.refuse_seeds(self)


def measure(arguments: Arguments) -> list[harness.Row]:
    a = arguments
    arms.prepare("digits")
    checkpoint_surface.train(CONFIG, a.run, a.quick)
    axes = words(blocks=a.blocks, steps=a.steps, guidance=a.guidance, candidates=a.candidates, num=[a.num])
    return checkpoint_surface.measure(a.run, {"held-out digits": Prompts("validation", "tradeoff", axes)})


if __name__ == "__main__":
    harness.run("digits_surface", Arguments, measure, __doc__)
