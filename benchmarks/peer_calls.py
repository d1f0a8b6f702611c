"""What `benchmarks/peers.py` times: the same work as a call of mmgen and as a call of a peer, on the CPU.

Two models are matched by `sizes` (width, layers, heads and the weights of a feed-forward); by `blocks`, where mmgen's
have modulations of their own as the peer's do (`time: adaln`), so that they have the same weights in the same places;
or by `parameters`, for which mmgen's feed-forward is made as much wider as the peer has more of them elsewhere. Tables
of embeddings count for neither: a token takes one row of them.
"""

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from mmgen.hub.qwen3 import qwen3_config, to_qwen3
from mmgen.modalities import Image, Modality, Text, build_modalities
from mmgen.modalities.layout import BatchWriter
from mmgen.model.model import Model
from mmgen.model.trunk import TrunkConfig
from mmgen.objectives import FlowMatching, FlowMatchingConfig
from mmgen.objectives.draw import draw_state
from mmgen.rng import keyed_numpy
from mmgen.sampling.plan import Plan
from mmgen.sampling.sampler import Sampler
from mmgen.sequence import Document
from mmgen.tokenization.text import TextTokenizer, load_text_tokenizer
from mmgen.training.feed import make_feed
from mmgen.training.losses import compute_losses, weighted
from mmgen.training.optim import OptimConfig, build_optimizer
from mmgen.training.run import Parts

Matched = Literal["sizes", "blocks", "parameters"]
Precision = Literal["float32", "bf16"]

TOKENIZER = "tokenizers/emoji-text"
PATCH = 2
HEAD_DIM = 64
CLASSES = ("bird", "table", "car", "cat", "fish", "ball", "bell", "book")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Sizes:
    """Of the trunks, and of the work. `side`: tokens of a picture's height and width; `steps`: network evaluations."""

    width: int
    num_layers: int
    documents: int
    side: int
    steps: int
    max_tokens: int

    def trunk(self, ffn_width: int, tied: bool = False) -> TrunkConfig:
        heads = self.width // HEAD_DIM
        return TrunkConfig(self.width, self.num_layers, heads, heads, HEAD_DIM, ffn_width, tied=tied)


@dataclass(frozen=True)
class Case:
    """Two calls that do the same. `tokens`: of texts and pictures, in a call; parameters are without tables."""

    task: str
    peer: str
    matched: str
    precision: Precision
    batch: int
    tokens: int
    parameters: tuple[int, int]
    ours: Callable[[], Any]
    theirs: Callable[[], Any]

    def under(self, precision: Precision) -> "Case":
        """Both calls with matrix products of this precision."""
        ours, theirs = under(precision, self.ours), under(precision, self.theirs)
        return replace(self, precision=precision, ours=ours, theirs=theirs)


def training(
    sizes: Sizes, matched: Sequence[Matched], precisions: Sequence[Precision], seed: int
) -> Iterator[Case]:
    """Steps of flow matching and cross entropy, from documents to moved weights, beside transfusion-pytorch."""
    tokenizer, modalities = _modalities()
    for match in matched:
        theirs = _transfusion(sizes, modalities, seed)
        ours = _matched(theirs, sizes.trunk(3 * sizes.width), modalities, match)
        parts = Parts(tokenizer, modalities, ours, FlowMatching(FlowMatchingConfig()))
        samples = _samples(sizes, modalities, seed)
        tokens = sum(len(ids) + picture[..., 0].numel() for ids, picture in samples)
        for precision in precisions:
            calls = _our_step(parts, samples, precision, seed), _their_step(theirs, samples, precision)
            counts = num_weights(ours), num_weights(theirs)
            yield Case(
                "training step", "transfusion-pytorch", match, precision, len(samples), tokens, counts, *calls
            )


def joint_sampling(
    sizes: Sizes,
    matched: Sequence[Matched],
    precisions: Sequence[Precision],
    batches: Sequence[int],
    seed: int,
) -> Iterator[Case]:
    """A picture of a text by Euler steps without guidance, beside transfusion-pytorch's `sample_many`."""
    tokenizer, modalities = _modalities()
    for match in matched:
        theirs = _transfusion(sizes, modalities, seed)
        ours = _matched(theirs, sizes.trunk(3 * sizes.width), modalities, match)
        sampler = _sampler(ours, modalities, sizes)
        for batch in batches:
            prompts = _prompts(batch)
            ids = [torch.tensor(tokenizer.encode(prompt)) for prompt in prompts]
            calls = _generate(sampler, prompts, Plan(steps=sizes.steps)), _sample_many(theirs, ids, sizes)
            assert calls[0]().cost.nfe == sizes.steps
            # the prompt is read by a call of its own
            assert _count_calls(theirs.transformer, calls[1]) == sizes.steps + 1
            case = Case(
                "picture of a text",
                "transfusion-pytorch",
                match,
                "float32",
                batch,
                batch * sizes.side**2,
                (num_weights(ours), num_weights(theirs)),
                *calls,
            )
            yield from (case.under(precision) for precision in precisions)


def text_decoding(sizes: Sizes, batches: Sequence[int], seed: int) -> Iterator[Case]:
    """The likeliest tokens after prompts of several lengths, beside transformers' `generate` with the same weights.

    In float32 alone: in bfloat16 the likeliest token is a matter of rounding, and the texts would part.
    """
    from transformers import Qwen3ForCausalLM

    tokenizer, modalities = _modalities()
    torch.manual_seed(seed)
    ours = Model(sizes.trunk(3 * sizes.width, tied=True), modalities, tokenizer.vocab_size)
    with torch.no_grad():
        # as it is initialized a model repeats its last token whatever its layers do, and equal texts would say nothing
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        ours.text_embedding.weight[tokenizer.end] = 0  # a logit of 0 is never the largest: no text ends early
    theirs = Qwen3ForCausalLM(qwen3_config(ours.config, tokenizer.vocab_size)).eval()
    theirs.load_state_dict(to_qwen3(ours), strict=False)  # the head is the embedding
    theirs.tie_weights()
    sampler = _sampler(ours, modalities, sizes)
    plan = Plan(temperature=0.0, max_tokens=sizes.max_tokens)
    text_side = sum(p.numel() for name, p in ours.named_parameters() if name.startswith(("trunk.", "text_")))
    for batch in batches:
        prompts = _prompts(batch)
        own = sampler.complete(prompts, plan)
        generate = _qwen3_generate(theirs, tokenizer, prompts, plan.max_tokens)
        written = [tokenizer.decode(row) for row in generate()]
        if own.text != written or own.cost.tokens != batch * plan.max_tokens:
            raise RuntimeError(
                f"the texts differ, so the work does: {own.cost.tokens} tokens, {own.text} and {written}"
            )
        yield Case(
            "greedy text",
            "transformers",
            "weights",
            "float32",
            batch,
            own.cost.tokens,
            (text_side, sum(p.numel() for p in theirs.parameters())),
            lambda prompts=prompts: sampler.complete(prompts, plan),
            generate,
        )


def pictures(
    sizes: Sizes,
    matched: Sequence[Matched],
    precisions: Sequence[Precision],
    batches: Sequence[int],
    seed: int,
) -> Iterator[Case]:
    """Pictures of a class, without guidance and with, beside diffusers' DiTPipeline: requests in, pictures out.

    To mmgen a class is a prompt of one token.
    """
    tokenizer, modalities = _modalities()
    assert all(len(tokenizer.encode(name)) == 1 for name in CLASSES)
    for match in matched:
        pipeline = _dit_pipeline(sizes, seed)
        theirs = pipeline.transformer
        # a feed-forward of two matrices of four times the width has the weights of three of 8/3 of it
        ours = _matched(theirs, sizes.trunk(8 * round(sizes.width / 3), tied=True), modalities, match)
        sampler = _sampler(ours, modalities, sizes)
        for batch in batches:
            for guidance in (1.0, 2.0):
                plan = Plan(steps=sizes.steps, guidance=guidance)
                classes = [CLASSES[number % len(CLASSES)] for number in range(batch)]
                calls = _generate(sampler, classes, plan), _dit_pictures(pipeline, batch, plan)
                # theirs puts the guided pictures beside the others, in one call
                assert calls[0]().cost.nfe == sizes.steps * (1 if guidance == 1 else 2)
                assert _count_calls(theirs, calls[1]) == sizes.steps
                case = Case(
                    "picture" if guidance == 1 else "guided picture",
                    "diffusers",
                    match,
                    "float32",
                    batch,
                    batch * sizes.side**2,
                    (num_weights(ours), num_weights(theirs)),
                    *calls,
                )
                yield from (case.under(precision) for precision in precisions)


def num_weights(model: nn.Module) -> int:
    """Parameters of a model but for its tables of embeddings."""
    tables = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding))
    return sum(parameter.numel() for parameter in model.parameters()) - tables


def under(precision: Precision, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with matrix products of this precision."""

    def wrapped() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return call()

    return wrapped


def _modalities() -> tuple[TextTokenizer, dict[str, Modality]]:
    tokenizer = load_text_tokenizer(TOKENIZER)
    return tokenizer, build_modalities({"text": {}, "image": {"codec": "pixels", "patch": PATCH}}, tokenizer)


def _matched(theirs: nn.Module, trunk: TrunkConfig, modalities: dict[str, Modality], match: Matched) -> Model:
    """mmgen's model; matched by parameters, its feed-forward as wide as gives it the peer's (to a multiple of 8)."""
    vocab_size = modalities["text"].tokenizer.vocab_size
    if match == "blocks":
        trunk = replace(trunk, time="adaln")
    model = Model(trunk, modalities, vocab_size)
    if match == "parameters":
        more = (num_weights(theirs) - num_weights(model)) / (3 * trunk.width * trunk.num_layers)
        wider = replace(trunk, ffn_width=trunk.ffn_width + 8 * round(more / 8))
        model = Model(wider, modalities, vocab_size)
    return model


def _sampler(model: Model, modalities: dict[str, Modality], sizes: Sizes) -> Sampler:
    side = PATCH * sizes.side
    return Sampler(model, modalities, FlowMatching(FlowMatchingConfig()), (side, side))


def _generate(sampler: Sampler, prompts: Sequence[str], plan: Plan) -> Callable[[], Any]:
    return lambda: sampler.generate(prompts, plan)


def _prompts(num: int) -> list[str]:
    """Texts of three to ten words."""
    words = ("a", "red", "apple", "on", "the", "green", "table", "with", "small", "birds")
    return [" ".join(words[: 3 + number % 8]) for number in range(num)]


def _count_calls(module: nn.Module, call: Callable[[], Any]) -> int:
    made = []
    handle = module.register_forward_hook(lambda *_: made.append(None))
    call()
    handle.remove()
    return len(made)


Samples = list[tuple[Tensor, Tensor]]
"""captions as ids, and pictures as tokens [side, side, channels]"""


def _samples(sizes: Sizes, modalities: dict[str, Modality], seed: int) -> Samples:
    """Captions of 8 to 23 random tokens, with pictures of noise."""
    image, tokenizer = modalities["image"], modalities["text"].tokenizer
    made = []
    for number in range(sizes.documents):
        draw = keyed_numpy("peers", seed, number)
        ids = torch.from_numpy(draw.integers(tokenizer.vocab_size, size=8 + number % 16))
        picture = draw.standard_normal((sizes.side, sizes.side, image.channels), dtype="float32")
        made.append((ids, torch.from_numpy(picture) * image.sigma_data))
    return made


def _document(sample: tuple[Tensor, Tensor], text: Text, image: Image, seed: int) -> Document:
    ids, picture = sample
    side = len(picture)
    size = image.size_span(side, side, 1 + len(ids), predicted=True)
    draw = keyed_numpy("peers", seed, "commit")  # of which nothing is drawn: no later token reads the picture
    values = picture.flatten(0, 1)
    noisy = image.span(values, side, side, size.next_position, draw, read=False)
    return Document((text.begin(), text.span(ids.tolist(), 1), size, noisy))


def _our_step(parts: Parts, samples: Samples, precision: Precision, seed: int) -> Callable[[], None]:
    text, image = parts.modalities["text"], parts.modalities["image"]
    assert isinstance(text, Text) and isinstance(image, Image)
    optimizer = build_optimizer(parts.model, OptimConfig())

    def step() -> None:
        documents = [_document(sample, text, image, seed) for sample in samples]
        lengths = [span.lengths for document in documents for span in document.spans]
        context, state = (sum(each) for each in zip(*lengths, strict=True))
        writer = BatchWriter(1, context, state, parts.modalities)
        for document in documents:
            writer.write(0, document)
        batch = writer.finish()
        noisy = draw_state(batch, parts.modalities, parts.objective, seed)
        feed = make_feed(batch, noisy, "runs", None, seed, 0)
        weighted(parts, compute_losses(parts, feed, precision, CPU)).backward()
        clip_grad_norm_(parts.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _transfusion(sizes: Sizes, modalities: dict[str, Modality], seed: int) -> Any:
    from loguru import logger  # pyright: ignore[reportMissingImports]
    from transfusion_pytorch import Transfusion  # pyright: ignore[reportMissingImports]

    logger.disable("transfusion_pytorch")  # a line for each sample
    torch.manual_seed(seed)
    return Transfusion(
        num_text_tokens=modalities["text"].tokenizer.vocab_size,
        dim_latent=modalities["image"].channels,
        modality_default_shape=(sizes.side, sizes.side),
        add_pos_emb=True,  # else a picture's tokens are told apart by nothing
        prob_uncond=0.0,
        odeint_kwargs={"method": "euler"},  # a network evaluation a step
        transformer={
            "dim": sizes.width,
            "depth": sizes.num_layers,
            "dim_head": HEAD_DIM,
            "heads": sizes.width // HEAD_DIM,
            "ff_expansion_factor": 4.5,  # two thirds of it: three times the width, as mmgen's
        },
    )


def _their_step(model: Any, samples: Samples, precision: Precision) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    forward = under(precision, lambda: model([[ids, picture] for ids, picture in samples]))

    def step() -> None:
        model.train()
        forward().backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _sample_many(model: Any, prompts: list[Tensor], sizes: Sizes) -> Callable[[], Any]:
    side, num = sizes.side, sizes.side**2

    def sample() -> Any:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            return model.sample_many(
                prompts,
                max_length=num - 1,  # it ends with the picture
                force_modality_at_start=(0, (side, side)),
                modality_steps=sizes.steps + 1,  # it counts times, of which there is one more
                cfg_scale=1.0,
            )

    return sample


def _qwen3_generate(
    model: Any, tokenizer: TextTokenizer, prompts: Sequence[str], max_tokens: int
) -> Callable[[], list[list[int]]]:
    """New tokens of each prompt, padded from the left as `generate` needs it."""
    ids = [[tokenizer.begin, *tokenizer.encode(prompt)] for prompt in prompts]
    longest = max(map(len, ids))
    padded = torch.tensor([[tokenizer.end] * (longest - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    never = sorted(tokenizer.specials - {tokenizer.end})

    @torch.inference_mode()
    def generate() -> list[list[int]]:
        found = model.generate(
            padded,
            attention_mask=mask,
            max_new_tokens=max_tokens,
            do_sample=False,
            suppress_tokens=never,
            eos_token_id=tokenizer.end,
            pad_token_id=tokenizer.end,
        )
        return found[:, longest:].tolist()

    return generate


class _Pixels:
    """In the place of DiTPipeline's autoencoder: pictures of pixels, as mmgen's are here."""

    config = SimpleNamespace(scaling_factor=1.0)

    def decode(self, latents: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=latents)


def _dit_pipeline(sizes: Sizes, seed: int) -> Any:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        num_attention_heads=sizes.width // HEAD_DIM,
        attention_head_dim=HEAD_DIM,
        in_channels=3,
        out_channels=3,
        num_layers=sizes.num_layers,
        sample_size=PATCH * sizes.side,
        patch_size=PATCH,
    )
    pipeline = DiTPipeline(transformer.eval(), _Pixels(), DDIMScheduler())  # pyright: ignore[reportArgumentType]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _dit_pictures(pipeline: Any, batch: int, plan: Plan) -> Callable[[], Any]:
    classes = list(range(batch))
    return lambda: pipeline(classes, plan.guidance, num_inference_steps=plan.steps)
