"""mmgen: one transformer over text and continuous latents, sampled along two axes of compute.

`mmgen.load(run)` gives a sampler and `mmgen.Plan(...)` says how it spends compute. Both are imported when first used,
so that `import mmgen` stays fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmgen.sampling.plan import Plan
    from mmgen.sampling.planner import Budget, Planner
    from mmgen.sampling.request import Request
    from mmgen.training.run import load

__version__ = "0.1.0"
__all__ = ["Budget", "Plan", "Planner", "Request", "__version__", "load"]

_HOMES = {
    "load": "mmgen.training.run",
    "Plan": "mmgen.sampling.plan",
    "Budget": "mmgen.sampling.planner",
    "Planner": "mmgen.sampling.planner",
    "Request": "mmgen.sampling.request",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mmgen' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
