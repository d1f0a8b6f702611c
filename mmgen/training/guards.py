"""What stops a run in good order: values that are not finite, and signals.

Nothing here repairs anything. A step whose loss or gradient is not finite is left out whole, never set to zero.
"""

import os
import signal
import threading
from types import FrameType

import torch
from torch import Tensor

from mmgen.training.ranks import in_all, in_any


class FiniteGuard:
    """Decides before the optimizer's step whether to take it, and stops a run that fails too often.

        norm = clip_grad_norm_(model.parameters(), config.grad_clip)
        if guard.passes(step, loss=loss, grad_norm=norm):
            optimizer.step()
        else:
            guard.check("where it can be found")

    `skipped` counts the steps left out; it belongs into the checkpoint's scalars, so that resuming does not renew the
    budget.
    """

    def __init__(self, budget: int, skipped: int = 0):
        if budget < 0:
            raise ValueError(f"the budget of skipped steps must be at least 0, is {budget}")
        self.budget, self.skipped = budget, skipped
        self._last = ""

    def passes(self, step: int, **values: Tensor) -> bool:
        """Returns whether all `values` (scalars) are finite on every rank; counts the step as left out where not.

        Reduced on the device: one synchronisation.
        """
        flags = torch.stack([value.detach().isfinite().all() for value in values.values()])
        finite = in_all(flags).tolist()
        if all(finite):
            return True
        self.skipped += 1
        names = " and ".join(name for name, ok in zip(values, finite, strict=True) if not ok)
        shown = ", ".join(f"{name} {float(value):.4g}" for name, value in values.items())
        self._last = f"step {step}: {names} not finite ({shown})"
        return False

    def check(self, kept: str) -> None:
        """Raises FloatingPointError where more steps were left out than may; `kept` says where the last one is."""
        if self.skipped > self.budget:
            raise FloatingPointError(
                f"{self._last}; {self.skipped} steps failed so, {self.budget} may. Its batch is {kept}. "
                "Begin a run with a lower learning rate, or allow more with train.skip_budget"
            )


class Interrupt:
    """While entered, Ctrl-C and SIGTERM set a flag that the loop polls; a second one acts at once.

        with Interrupt() as interrupt:
            for step in steps:
                ...
                if interrupt.requested():
                    save; break

    Handlers are the process's own again afterwards. Outside the main thread, where Python allows no handlers, the flag
    is never set.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def requested(self) -> bool:
        """Returns whether any rank was asked to stop; with a process group every rank must call it."""
        return in_any(self.received is not None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self._restore()
            os.kill(os.getpid(), number)
            return
        self.received = signal.Signals(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._previous = {}
