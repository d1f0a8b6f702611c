"""What the target pass costs: a step of IMM over one of flow matching, on the same trunk and the same batch.

A step is forward and backward of the pictures' loss. Both read the same packed documents, of which the share rho of all
tokens is noisy. Reusing the context's keys and values, the target pass adds one forward of that share to what is three
forwards of everything (a backward pass takes two): 1 + rho / 3. A second whole forward would add a third whatever the
share. With full checkpointing of activations a block's forward is computed again in the backward pass, so that flow
matching takes four; the target pass saves nothing and is not: 1 + rho / 4. Several particles of a context are noisy
copies of its one picture: nothing of the law changes, only how a share rho comes about. `counted` is the same from the
operations of the shapes at hand, in which a noisy token costs more than a clean one: it reads more keys, and passes the
head. Steps are timed in turns: with the target pass, with a second whole forward in its place, and without a target.
Intervals are over seeds (of one seed: over rounds).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks import harness
from mmgen.evaluation.intervals import Estimate
from mmgen.modalities import build_modalities
from mmgen.model.attention import AttentionBackend
from mmgen.model.model import BatchAttention, Model, StateTensors, Target
from mmgen.model.trunk import Checkpointing, TrunkConfig
from mmgen.objectives import IMM, FlowMatching, FlowMatchingConfig, IMMConfig, Objective
from mmgen.rng import keyed_numpy
from mmgen.sampling.predict import ModelFacts
from mmgen.sequence import PackedBatch
from mmgen.tokenization.text import load_text_tokenizer
from mmgen.training.feed import Feed
from mmgen.training.flops import Work, recomputed_flops, step_flops
from mmgen.training.losses import compute_losses
from mmgen.training.ranks import default_device
from mmgen.training.run import Parts
from mmgen.training.synthetic import AROUND, picture_document, rows_feed

SHARES = (0.2, 0.5, 0.8)
SIDE = 8  # tokens of a picture's height and width
PARTICLES = 4  # of a group
FORWARDS: dict[Checkpointing, int] = {"none": 3, "full": 4}  # that a step of flow matching takes


@dataclass(frozen=True)
class Case:
    """How the noisy share comes about, and what of the activations is kept."""

    checkpointing: Checkpointing = "none"
    copies: int = 1
    """noisy copies of each picture: particles that share one context"""


CASES = (Case(), Case(checkpointing="full"), Case(copies=PARTICLES))


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    width: int = 256
    """Of the trunk, with heads of 64 and a feed-forward of three times the width."""
    num_layers: int = 6
    """Of the trunk."""
    documents: int = 16
    """Noisy pictures of 64 tokens in a batch; a multiple of the 4 particles of a group."""
    repeats: int = 15
    """Rounds of the three steps, for each share and seed."""
    precision: Literal["bf16", "float32"] = "bf16"
    """Of the matrix products."""
    attention: AttentionBackend = "runs"
    """What both steps attend with."""
    compile: bool = False
    """Compile the blocks, which needs dense attention."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.documents < 4 or self.documents % 4:
            raise ValueError(f"documents {self.documents} must be a multiple of 4, the particles of a group")
        if self.width < 64 or self.width % 64:
            raise ValueError(f"width {self.width} must be a multiple of 64, the size of a head")
        if self.compile and self.attention != "dense":
            raise ValueError(f"compile needs attention dense, not {self.attention}: rows are of any length")


class Anew(Model):
    """The weights of another model, whose target is had by a second forward of everything."""

    def __init__(self, model: Model) -> None:
        torch.nn.Module.__init__(self)
        self.__dict__.update(model.__dict__)

    def forward(
        self,
        batch: PackedBatch,
        x: StateTensors,
        t: Tensor,
        s: Tensor,
        attention: BatchAttention,
        target: Target | None = None,
    ):
        hidden, outputs, _ = super().forward(batch, x, t, s, attention)
        assert target is not None
        with torch.no_grad():
            targets = super().forward(batch, target.x, target.r, target.s, attention)[1]
        return hidden, outputs, targets


def measure(arguments: Arguments) -> Iterator[harness.Row]:
    width, layers = (64, 2) if arguments.quick else (arguments.width, arguments.num_layers)
    repeats = 3 if arguments.quick else arguments.repeats
    heads = width // 64
    trunk = TrunkConfig(width, layers, heads, heads, 64, 3 * width)
    for case in CASES:
        for share in SHARES:
            facts, timed = {}, []
            for seed in range(arguments.seeds):
                facts, seconds = _time(trunk, case, share, arguments, repeats, seed)
                timed.append(seconds)
            yield {
                "checkpointing": case.checkpointing,
                "copies": case.copies,
                **facts,
                **_ratios(timed, facts),
            }


def _ratios(timed: list[Float[np.ndarray, "R 3"]], facts: harness.Row) -> harness.Row:
    imm, anew, flow = np.median(np.concatenate(timed), 0).tolist()

    def over(a: int, b: int, expected: float = 1.0) -> Estimate:
        ratios = [seconds[:, a] / seconds[:, b] / expected for seconds in timed]
        if len(ratios) == 1:
            return harness.median(ratios[0], "target_pass")
        return harness.over_seeds([float(np.median(each)) for each in ratios])

    return {
        "imm_seconds": imm,
        "whole_forward_seconds": anew,
        "fm_seconds": flow,
        "imm_over_fm": over(0, 2),
        "whole_forward_over_fm": over(1, 2),
        "over_expected": over(0, 2, facts["expected"]),
    }


def _time(
    trunk: TrunkConfig, case: Case, share: float, arguments: Arguments, repeats: int, seed: int
) -> tuple[harness.Row, Float[np.ndarray, "R 3"]]:
    """What is expected, and the seconds of steps with a target pass, with a second forward, without either."""
    torch.manual_seed(seed)
    imm = _parts(trunk, case, IMM(IMMConfig(grouping="within" if case.copies > 1 else "across")))
    anew, flow = (
        replace(imm, model=Anew(imm.model)),
        replace(imm, objective=FlowMatching(FlowMatchingConfig())),
    )
    imm.model.trunk.checkpoint_blocks(case.checkpointing)
    if arguments.compile:
        torch.compiler.reset()  # other shapes than the case before
        imm.model.trunk.compile_blocks()
    noisy = SIDE * SIDE * case.copies
    caption = round(noisy * (1 - share) / share) - AROUND
    documents = [
        # the loss of text costs the same in both steps, and is left out of them
        picture_document(imm, caption, (SIDE, SIDE), keyed_numpy("target_pass", seed, i), predicted=False)
        for i in range(arguments.documents // case.copies)
    ]
    arms = imm, anew, flow
    feeds = [rows_feed(parts, documents, arguments.attention, seed) for parts in arms]
    steps = [_step(parts, feed, arguments.precision) for parts, feed in zip(arms, feeds, strict=True)]
    seconds = harness.in_turns(steps, repeats=repeats, warmup=1 if default_device().type == "cpu" else 2)
    context, state = documents[0].lengths
    rho = state / (context + state)
    facts = {
        "rho": rho,
        "expected": 1 + rho / FORWARDS[case.checkpointing],
        "counted": _counted(imm, feeds[0].batch, case.checkpointing),
    }
    return facts, seconds


def _counted(parts: Parts, batch: PackedBatch, checkpointing: Checkpointing) -> float:
    """Operations of a step with a target pass over those of one without."""
    facts, work = ModelFacts.of(parts.model, parts.modalities, parts.objective), Work.attended(batch)
    again = recomputed_flops(facts, work) if checkpointing == "full" else 0.0
    imm, flow = (step_flops(facts, work, target).total + again for target in (True, False))
    return imm / flow


def _parts(trunk: TrunkConfig, case: Case, objective: Objective) -> Parts:
    tokenizer = load_text_tokenizer("tokenizers/emoji-text")
    image = {"codec": "pixels", "patch": 2, "copies": case.copies}
    modalities = build_modalities({"text": {}, "image": image}, tokenizer)
    return Parts(tokenizer, modalities, Model(trunk, modalities, tokenizer.vocab_size), objective)


def _step(parts: Parts, feed: Feed, precision: str) -> Callable[[], None]:
    device = default_device()
    parts.model.to(device)

    def step() -> None:
        compute_losses(parts, feed, precision, device)["image"].mean().backward()
        parts.model.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    harness.run("target_pass", Arguments, measure, __doc__)
