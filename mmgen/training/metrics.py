"""What a run tells: `metrics.jsonl` (the truth), a live line on a terminal or plain lines elsewhere, wandb on top.

Only the first rank writes. Nothing here decides anything about training.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from torch import Tensor

from mmgen.files import write_text
from mmgen.training.ranks import current_rank, gathered

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class LogConfig:
    """What a run reports and where."""

    every: int = 20
    """Steps between rows of metrics.jsonl."""
    wandb_project: str | None = None
    """Also log to this project of Weights & Biases."""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline: keep the wandb run in the run's folder, for `wandb sync`."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, is {self.every}")


class Meters:
    """Means over the steps between two rows: sums and counts, kept on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Any, Any]] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1) -> None:
        """Adds a `total` over `count` things (tokens, pictures, steps); tensors cause no synchronisation here."""
        total = total.detach() if isinstance(total, Tensor) else total
        old_total, old_count = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (old_total + total, old_count + count)

    def read(self) -> dict[str, float]:
        """Returns the mean of each name over all ranks and starts anew; a name that counted nothing is left out."""
        sums = {name: (float(total), float(count)) for name, (total, count) in self._sums.items()}
        self._sums = {}
        totals: dict[str, tuple[float, float]] = {}
        for name, (total, count) in (item for part in gathered(sums) for item in part.items()):
            old_total, old_count = totals.get(name, (0.0, 0.0))
            totals[name] = (old_total + total, old_count + count)
        return {name: total / count for name, (total, count) in totals.items() if count}


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, `step` first, flushed line by line.

    Opened at `step`, it drops the rows of later steps (they will be written again), so that a resumed run reads as if
    it had never stopped. Rows of the step of a checkpoint must therefore be written before that checkpoint.
    """

    def __init__(self, path: Path | str, step: int = 0):
        self.path = Path(path)
        kept = [row for row in read_metrics(self.path) if row["step"] <= step] if step else []
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl; a last line that a kill cut short is left out, no file gives no rows.

    Raises ValueError where any other line is no row.
    """
    path = Path(path)
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line break was not finished
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int):
                raise TypeError
        except (json.JSONDecodeError, TypeError, KeyError):
            raise ValueError(f"{path}, line {number}: not a row of metrics: {line[:60]!r}") from None
        rows.append(row)
    return rows


class Reporter:
    """Reports a run that begins at `step` of `total_steps`; a context manager.

        with Reporter(run, LogConfig(), total_steps=1000, step=step, config=resolved) as report:
            report.advance(step, samples)                 # each step: moves the live line
            report.row(step, samples, {"loss": ...})      # each `every` steps: metrics.jsonl, wandb, the log
            report.say("saved ...")                       # a line above the live one

    Rows carry `samples_per_second` over the steps since the last one. On a terminal a validation's row is said, not
    kept in the live line.
    """

    def __init__(
        self,
        run: Path | str,
        config: LogConfig,
        *,
        total_steps: int,
        step: int = 0,
        samples: int = 0,
        resolved: Mapping[str, Any] | None = None,
        console: Console | None = None,
    ):
        self.run, self.config, self.total_steps = Path(run), config, total_steps
        self._first = current_rank() == 0
        self._console = console or Console()
        self._start, self._resolved = step, resolved
        self._mark = (time.perf_counter(), step, samples)  # of the last row
        self._file: MetricsFile | None = None
        self._wandb: Any = None
        self._progress: Progress | None = None

    def __enter__(self) -> "Reporter":
        if not self._first:
            return self
        self._file = MetricsFile(self.run / METRICS, self._start)
        self._wandb = self._open_wandb() if self.config.wandb_project else None
        if self._console.is_terminal:
            columns = (
                SpinnerColumn(),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[rate]}"),
                TextColumn("{task.fields[losses]}"),
            )
            self._progress = Progress(*columns, console=self._console)
            self._progress.add_task("", total=self.total_steps, completed=self._start, rate="", losses="")
            self._progress.start()
        self._mark = (time.perf_counter(), *self._mark[1:])
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress:
            self._progress.stop()
        if self._file:
            self._file.close()
        if self._wandb:
            self._wandb.finish(exit_code=0 if exception[0] is None else 1)

    def advance(self, step: int, samples: int) -> None:
        """Moves the live line to `step` (steps done) and `samples` (seen since the run began)."""
        if self._progress:
            self._progress.update(
                self._progress.task_ids[0], completed=step, rate=self._rate(step, samples)[1]
            )

    def row(self, step: int, samples: int, values: Mapping[str, float | int]) -> None:
        """Writes a row: `step, samples`, `values` (whose losses are shown) and, where steps were done, their rate.

        A second row of one step, such as a validation's, has no rate, and the time it took is not counted in the next.
        """
        if not self._first:
            return
        assert self._file, "rows are written within the context"
        row: dict[str, Any] = {"samples": samples, **values}
        rate = ""
        if step > self._mark[1]:
            per_second, rate = self._rate(step, samples)
            row["samples_per_second"] = round(per_second, 3)
        self._file.write(step, row)
        if self._wandb:
            self._wandb.log({"step": step, **row})
        shown = [f"{name} {value:.4g}" for name, value in values.items() if name.endswith("loss")]
        if self._progress and rate:
            task = self._progress.task_ids[0]
            self._progress.update(task, completed=step, rate=rate, losses="  ".join(shown))
        else:
            shown += [f"{name} {values[name]:.3g}" for name in ("grad_norm", "lr") if name in values]
            self._print("  ".join([f"step {step}/{self.total_steps}", *shown, *([rate] if rate else [])]))
        self._mark = (time.perf_counter(), step, samples)

    def say(self, message: str) -> None:
        """Prints one line."""
        if self._first:
            self._print(message)

    def _print(self, message: str) -> None:
        # Plain: no wrapping at the width of a terminal that is not there, no markup in paths.
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def _rate(self, step: int, samples: int) -> tuple[float, str]:
        """Returns samples per second since the last row, and that with the time left as text."""
        time_then, step_then, samples_then = self._mark
        seconds = time.perf_counter() - time_then
        per_second = (samples - samples_then) / max(seconds, 1e-9)
        left = (self.total_steps - step) * seconds / max(step - step_then, 1)
        return per_second, f"{per_second:.1f} samples/s  {_clock(left)} left"

    def _open_wandb(self) -> Any:
        try:
            import wandb
        except ImportError:
            raise ValueError(
                "log.wandb_project is set and wandb is not installed: pip install 'mmgen-pretrain[log]'"
            ) from None
        # One wandb run per run folder, however often it is resumed.
        name = self.run / "wandb_run"
        if not name.exists():
            write_text(name, os.urandom(4).hex())
        run = wandb.init(
            project=self.config.wandb_project,
            dir=str(self.run),
            id=name.read_text(),
            name=self.run.name,
            mode=self.config.wandb_mode,
            resume="allow",
            config=dict(self._resolved or {}),
            settings=wandb.Settings(silent=True),
        )
        # wandb's own step must grow and would drop what a resumed run repeats; ours is a metric like any other.
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        return run


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
