"""What the target pass costs: a step of IMM over one of flow matching, on the same trunk and the same batch.

A step is forward and backward of the pictures' loss. Both read the same packed documents, of which the share rho of all
tokens is noisy. Reusing the context's keys and values, the target pass adds one forward of that share to what is three
forwards of everything: 1 + rho / 3. A second whole forward would add a third whatever the share. `counted` is the same
from the operations of the shapes at hand, in which a noisy token costs more than a clean one: it reads more keys, and
passes the head. Steps are timed in turns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks import harness
from mmgen.modalities import Image, Text, build_modalities
from mmgen.modalities.base import text_positions
from mmgen.modalities.layout import BatchWriter, span_lengths
from mmgen.model.model import Model, plan_batch
from mmgen.model.trunk import TrunkConfig
from mmgen.objectives import IMM, FlowMatching, FlowMatchingConfig, IMMConfig, Objective
from mmgen.objectives.draw import draw_state
from mmgen.rng import keyed_numpy
from mmgen.sampling.cost import target_pass_ratio
from mmgen.sequence import Document, Span
from mmgen.tokenization.text import load_text_tokenizer
from mmgen.training.feed import Feed
from mmgen.training.losses import compute_losses
from mmgen.training.run import Parts

SHARES = (0.2, 0.5, 0.8)
SIDE = 8  # tokens of a picture's height and width


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    width: int = 256
    """Of the trunk, with heads of 64 and a feed-forward of three times the width."""
    num_layers: int = 6
    """Of the trunk."""
    documents: int = 16
    """Captions with a picture of 64 tokens each; a multiple of the 4 particles of a group."""
    repeats: int = 15
    """Pairs of steps timed for each share and seed."""
    precision: Literal["bf16", "float32"] = "bf16"
    """Of the matrix products."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.documents < 4 or self.documents % 4:
            raise ValueError(f"documents {self.documents} must be a multiple of 4, the particles of a group")
        if self.width < 64 or self.width % 64:
            raise ValueError(f"width {self.width} must be a multiple of 64, the size of a head")


def measure(arguments: Arguments) -> list[harness.Row]:
    tokenizer = load_text_tokenizer("tokenizers/emoji-text")
    modalities = build_modalities({"text": {}, "image": {"codec": "pixels", "patch": 2}}, tokenizer)
    width, layers = (64, 2) if arguments.quick else (arguments.width, arguments.num_layers)
    heads = width // 64
    trunk = TrunkConfig(width, layers, heads, heads, 64, 3 * width)
    text, image = modalities["text"], modalities["image"]
    assert isinstance(text, Text) and isinstance(image, Image)
    rows: list[harness.Row] = []
    for seed in range(arguments.seeds):
        torch.manual_seed(seed)
        model = Model(trunk, modalities, tokenizer.vocab_size)
        for share in SHARES:
            documents = [_document(text, image, share, seed, i) for i in range(arguments.documents)]
            steps = [
                _step(Parts(tokenizer, modalities, model, objective), documents, seed, arguments.precision)
                for objective in (IMM(IMMConfig()), FlowMatching(FlowMatchingConfig()))
            ]
            repeats = 3 if arguments.quick else arguments.repeats
            timed = harness.compare(steps[0], steps[1], repeats=repeats, seed=seed)
            context, state = (
                sum(lengths) for lengths in zip(*map(span_lengths, documents[0].spans), strict=True)
            )
            expected = 1 + state / (context + state) / 3
            rows.append(
                {
                    "seed": seed,
                    "rho": state / (context + state),
                    "imm_seconds": timed.a,
                    "fm_seconds": timed.b,
                    "imm_over_fm": timed.ratio,
                    "expected": expected,
                    "over_expected": timed.ratio.value / expected,
                    "counted": target_pass_ratio(trunk, context, state, image.channels),
                }
            )
    return rows


def _document(text: Text, image: Image, share: float, seed: int, number: int) -> Document:
    """Begin, a caption of random tokens, the size, and a picture of which nothing is read: `share` of the tokens."""
    draw = keyed_numpy("target_pass", seed, number)
    noisy = SIDE * SIDE
    caption = round(noisy * (1 - share) / share) - 3  # with begin and the two size tokens: the context
    ids = torch.from_numpy(draw.integers(text.tokenizer.vocab_size, size=caption))
    size = image.size_span(SIDE, SIDE, 1 + caption, predicted=False)
    values = (
        torch.from_numpy(draw.standard_normal((noisy, image.channels), dtype="float32")) * image.sigma_data
    )
    picture = image.span(values, SIDE, SIDE, size.next_position, draw, read=False)
    # the loss of text costs the same in both steps, and is left out of them
    caption_span = Span("text", text_positions(1, caption), ids, predicted=False)
    return Document((text.begin(), caption_span, size, picture))


def _step(parts: Parts, documents: list[Document], seed: int, precision: str) -> Callable[[], None]:
    objective: Objective = parts.objective
    context, state = (sum(lengths) for lengths in zip(*map(span_lengths, documents[0].spans), strict=True))
    writer = BatchWriter(len(documents), context, state, parts.modalities, grouping=objective.grouping)
    for row, document in enumerate(documents):
        writer.write(row, document)
    batch = writer.finish()
    noisy = draw_state(batch, parts.modalities, objective, seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts.model.to(device)
    feed = Feed(batch, noisy, plan_batch(batch, "runs"), remarks="")

    def step() -> None:
        compute_losses(parts, feed, precision, device)["image"].mean().backward()
        parts.model.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    harness.run("target_pass", Arguments, measure, __doc__)
