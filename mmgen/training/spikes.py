"""Where a loss comes from: of which source of the data, and of which times. Says so where a step's loss leaps up."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from mmgen.training.feed import Feed
from mmgen.training.losses import Loss

NUM_TIMES = 5  # buckets of equal width in [0, 1]
WINDOW = 100  # steps that a loss is compared with
FEWEST = 20  # before that many nothing is a leap
SIGMAS = 6.0
LEAST = 1.2  # times the mean: a loss that hardly varies leaps by less than anybody minds
DECAY = 0.98  # of what a cell usually is


@dataclass(frozen=True, order=True)
class Cell:
    """A modality's tokens from one source, at times from `time` / NUM_TIMES on; None where they have no time."""

    modality: str
    source: str
    time: int | None = None

    def __str__(self) -> str:
        times = (
            "" if self.time is None else f" at t {self.time / NUM_TIMES:g} to {(self.time + 1) / NUM_TIMES:g}"
        )
        return f"{self.modality} of source {self.source}{times}"


Tally = dict[Cell, tuple[float, float]]
"""the sum of a cell's losses and the number of its tokens"""


def tally(feeds: Sequence[Feed], losses: Sequence[Mapping[str, Loss]]) -> Tally:
    """The losses of some batches by cell. One copy from the device for each loss."""
    found: Tally = {}
    for feed, of_batch in zip(feeds, losses, strict=True):
        names = sorted(set(feed.batch.sources))
        source = np.array([names.index(each) for each in feed.batch.sources], dtype=np.int64)
        for modality, loss in of_batch.items():
            if loss.shares is None or not len(loss.shares.document):
                continue
            shares = loss.shares
            index = source[shares.document.cpu().numpy()]
            if shares.time is not None:
                bucket = (shares.time.cpu().double().numpy() * NUM_TIMES).astype(int).clip(0, NUM_TIMES - 1)
                index = index * NUM_TIMES + bucket
            totals = np.bincount(index, shares.total.cpu().double().numpy())
            counts = np.bincount(index, shares.count.cpu().double().numpy())
            for place in np.flatnonzero(counts).tolist():
                if shares.time is None:
                    cell = Cell(modality, names[place])
                else:
                    cell = Cell(modality, names[place // NUM_TIMES], place % NUM_TIMES)
                total, count = found.get(cell, (0.0, 0.0))
                found[cell] = (total + float(totals[place]), count + float(counts[place]))
    return found


def merged(tallies: Sequence[Tally]) -> Tally:
    """Those of several ranks together."""
    found: Tally = {}
    for each in tallies:
        for cell, (total, count) in each.items():
            old = found.get(cell, (0.0, 0.0))
            found[cell] = (old[0] + total, old[1] + count)
    return found


@dataclass(frozen=True)
class Spike:
    """A step whose loss leapt up: what it was and is, and the cell that bears most of the difference."""

    loss: float
    usual: float
    cell: Cell
    cell_loss: float
    cell_usual: float | None
    """None where no step before had such tokens"""
    share: float
    """of what all cells together add to the loss"""

    def row(self) -> dict[str, float | str]:
        """What a row of metrics says of it."""
        return {
            "spike_loss": self.loss,
            "spike_usual": self.usual,
            "spike_of": str(self.cell),
            "spike_share": self.share,
        }

    def __str__(self) -> str:
        usual = "never seen before" if self.cell_usual is None else f"{self.cell_usual:.4g} as a rule"
        return (
            f"loss {self.loss:.4g} where {self.usual:.4g} is usual; {self.share:.0%} of the difference is {self.cell}: "
            f"{self.cell_loss:.4g} a token, {usual}"
        )


class Spikes:
    """Watches the losses of a run, step by step; keeps no state that a resumed run would need.

    `weights` is what the mean over each modality's tokens counts in the loss (`losses.loss_weights`).
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._usual: dict[Cell, float] = {}

    def is_leap(self, loss: float) -> bool:
        """Whether this step's loss is far above those of the steps before."""
        if len(self._losses) < FEWEST or not np.isfinite(loss):
            return False
        mean = fmean(self._losses)
        return loss > max(mean + SIGMAS * stdev(self._losses), LEAST * mean)

    def see(self, loss: float, cells: Tally) -> Spike | None:
        """Takes in a step; what is said of it where its loss leapt up. Such a step changes nothing of what is usual."""
        if self.is_leap(loss):
            return self._explained(loss, cells)
        if np.isfinite(loss):
            self._losses.append(loss)
        for cell, (total, count) in cells.items():
            mean = total / count
            if np.isfinite(mean):
                self._usual[cell] = DECAY * self._usual.get(cell, mean) + (1 - DECAY) * mean
        return None

    def _explained(self, loss: float, cells: Tally) -> Spike | None:
        """The cell that adds most to the loss above what is usual for it."""
        tokens: dict[str, float] = {}
        for cell, (_, count) in cells.items():
            tokens[cell.modality] = tokens.get(cell.modality, 0.0) + count
        above = {
            cell: self._weights[cell.modality]
            / tokens[cell.modality]
            * (total - self._usual.get(cell, 0.0) * count)
            for cell, (total, count) in cells.items()
        }
        if not above:
            return None
        cell = max(above, key=lambda each: above[each])
        total, count = cells[cell]
        whole = sum(max(value, 0.0) for value in above.values())
        share = above[cell] / whole if whole else 0.0
        return Spike(loss, fmean(self._losses), cell, total / count, self._usual.get(cell), share)
