"""Counts broken input by reason and stops when there is too much of it.

Every reader of foreign data shares this, so that "a few pictures of the web are corrupt" goes on and "the data set is
not what you think" ends with one line that names the file.
"""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Rejects:
    """Kept and broken samples and shards of one pass or one run.

    `max_rate` is the share of broken samples (and of broken shards) above which `ValueError` is raised. It applies to
    samples once `min_samples` and to shards once `min_shards` were seen, so that one corrupt picture at the very start
    does not stop a run; `finish` applies it to shards whatever their number.
    """

    max_rate: float = 0.05
    min_samples: int = 100
    min_shards: int = 20
    num_samples: int = 0
    num_shards: int = 0
    samples: Counter[str] = field(default_factory=Counter)
    shards: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if not 0 <= self.max_rate <= 1:
            raise ValueError(f"max_rate is a share of the samples between 0 and 1, not {self.max_rate}")

    @property
    def num_kept(self) -> int:
        return self.num_samples - self.samples.total()

    def keep(self) -> None:
        """Counts one good sample."""
        self.num_samples += 1

    def reject(self, reason: str, file: str) -> None:
        """Counts one broken sample of `file`. Raises ValueError when the rate is above `max_rate`."""
        self.num_samples += 1
        self.samples[reason] += 1
        if self.num_samples >= self.min_samples:
            self._check(self.samples, self.num_samples, "samples", file)

    def drop(self, reason: str, file: str) -> None:
        """Counts as broken one sample that was kept and then proved of no use. Raises ValueError as `reject` does."""
        self.num_samples -= 1
        self.reject(reason, file)

    def keep_shard(self) -> None:
        """Counts one shard that was read to its end."""
        self.num_shards += 1

    def reject_shard(self, reason: str, file: str) -> None:
        """Counts one broken shard. Raises ValueError when the rate is above `max_rate`."""
        self.num_shards += 1
        self.shards[reason] += 1
        if self.num_shards >= self.min_shards:
            self._check(self.shards, self.num_shards, "shards", file)

    def finish(self, where: str) -> None:
        """Ends a pass. Raises ValueError where not one sample was kept or too many shards of `where` were broken."""
        if self.num_kept == 0:
            raise ValueError(f"no usable sample in {where}: {self.summary()}")
        self._check(self.shards, self.num_shards, "shards", where)

    def summary(self) -> str:
        """One line: "2 of 120 samples broken (corrupt picture 2)"."""
        return summary(self.samples, self.num_samples, self.shards, self.num_shards)

    def _check(self, broken: Counter[str], seen: int, what: str, file: str) -> None:
        if broken.total() > self.max_rate * seen:
            raise ValueError(
                f"too much broken input, last in {file}: {self.summary()}: "
                f"{broken.total() / seen:.1%} of the {what}, where at most {self.max_rate:.1%} are accepted"
            )


def summary(samples: Counter[str], num_samples: int, shards: Counter[str], num_shards: int) -> str:
    """One line on broken samples, and on broken shards where there are any: how many for each reason, of how many."""
    lines = []
    for broken, seen, what in ((samples, num_samples, "samples"), (shards, num_shards, "shards")):
        if broken or what == "samples":
            reasons = ", ".join(f"{reason} {count}" for reason, count in broken.most_common())
            lines.append(f"{broken.total()} of {seen} {what} broken" + (f" ({reasons})" if reasons else ""))
    return "; ".join(lines)
