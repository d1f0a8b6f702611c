"""The sampler: requests in, pictures and texts out, batched. Every request has its own random numbers, so that what it
gets does not depend on what it was batched with.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal, get_args

import numpy as np
import PIL.Image
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmgen.modalities import Image, Modality, Text
from mmgen.model.model import Model
from mmgen.objectives import Objective
from mmgen.sampling.batch import Batch, Made, Row
from mmgen.sampling.context import Context
from mmgen.sampling.cost import Cost
from mmgen.sampling.documents import Documents
from mmgen.sampling.graphs import Graphs
from mmgen.sampling.plan import MAX_BATCH, Plan, batches
from mmgen.sampling.predict import ModelFacts
from mmgen.sampling.request import Answer, Answers, Listener, Part, Request
from mmgen.sampling.score import log_likelihood, score_pictures
from mmgen.tokenization.latents import tensor_to_picture

SamplingPrecision = Literal["float32", "bf16"]


@dataclass(frozen=True)
class Result:
    """What a batch of requests got, in their order. `latents` are of unit variance, as the codec takes them."""

    images: list[PIL.Image.Image] = field(default_factory=list)
    latents: Float[Tensor, "N D h w"] | None = None
    text: list[str] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)


class Sampler:
    """Draws from one model. `size` (of a picture: height, width in pixels) and `plan` hold where a call names none.

    With `precision` bf16 matrix products, attention and the cache are in bfloat16, as in training with bf16; times, the
    state, norms, heads and laws of tokens are what they are without. Raises ValueError for one that is not known.

    `graphs`: calls are recorded on a GPU and replayed (see graphs.py). Weights may then change in place alone.
    """

    def __init__(
        self,
        model: Model,
        modalities: Mapping[str, Modality],
        objective: Objective,
        size: tuple[int, int] = (64, 64),
        plan: Plan | None = None,
        precision: SamplingPrecision = "float32",
        graphs: bool = False,
    ) -> None:
        if precision not in get_args(SamplingPrecision):
            raise ValueError(
                f"precision {precision!r} must be one of {', '.join(get_args(SamplingPrecision))}"
            )
        self.precision = precision
        self.model = model.eval()
        self.modalities = modalities
        self.objective = objective
        self.size = size
        self.plan = plan or Plan()
        self.documents = Documents(modalities)
        self.graphs = Graphs(self.model) if graphs else None

    @property
    def text(self) -> Text:
        return self.documents.text

    @property
    def image(self) -> Image:
        """The picture modality. Raises ValueError where the model has none."""
        return self.documents.image

    @property
    def codec(self):
        """The picture codec: `encode` and `decode` between pixels and latents."""
        return self.image.codec

    @torch.inference_mode()
    def answer(
        self,
        requests: Sequence[Request],
        plan: Plan | None = None,
        seed: int | Sequence[int] = 0,
        listen: Listener | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> Answers:
        """Answers to requests of any kinds; request i draws from seed + i, or from seed[i].

        Those that ask for the same kinds of parts, of one size, are batched. `listen` hears of tokens and blocks as
        they are made, `on_batch` how many requests are done. Raises ValueError where the model cannot do what is asked:
        a size that does not divide into tokens, a solver that the objective does not allow, more tokens a pass than its
        joint head says.
        """
        plan = plan or self.plan
        for request in requests:
            self._check(request, plan)
        seeds = [seed + i for i in range(len(requests))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(requests):
            raise ValueError(
                f"seed: {len(seeds)} of them for {len(requests)} requests; give one, or one for each"
            )
        found: dict[int, Answer] = {}
        total = Cost()

        def kind(index: int) -> tuple:
            request = requests[index]
            return request.asked, self._grid(request), request.gives_pictures

        for (_, grid, _), members in groupby(
            sorted(range(len(requests)), key=lambda i: str(kind(i))), key=kind
        ):
            most = max(1, MAX_BATCH // plan.candidates)
            for indices in batches(list(members), most):
                started = time.perf_counter()
                rows = [Row(requests[i], i, seeds[i], c) for i in indices for c in range(plan.candidates)]
                batch = Batch(
                    self.model, self.objective, self.documents, rows, grid, plan, listen, self.graphs
                )
                try:
                    with self._narrowed():
                        chosen = self._choose(batch.run(), rows, plan, batch.cost)
                finally:
                    if self.graphs is not None:
                        self.graphs.release()
                found |= zip(indices, self._decode(chosen), strict=True)
                batch.cost.nfe *= plan.candidates
                batch.cost.seconds = time.perf_counter() - started
                total.add(batch.cost)
                if on_batch is not None:
                    on_batch(len(found))
        return Answers([found[i] for i in range(len(requests))], total)

    def generate(
        self,
        prompts: Sequence[str | None],
        plan: Plan | None = None,
        seed: int = 0,
        size: tuple[int, int] | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> Result:
        """One picture a prompt; None draws without a condition. Request i draws from seed + i.

        `size` is height and width in pixels. The rest, and what is raised, as of `answer`.
        """
        given = [() if prompt is None else (prompt,) for prompt in prompts]
        requests = [Request(parts, ("image",), size) for parts in given]
        answers = self.answer(requests, plan, seed, on_batch=on_batch)
        images = [part for answer in answers.answers for part in answer.parts if not isinstance(part, str)]
        latents = [answer.latents[0] for answer in answers.answers]
        return Result(images, torch.stack(latents) if latents else None, cost=answers.cost)

    def describe(
        self, pictures: Sequence[PIL.Image.Image], plan: Plan | None = None, seed: int = 0
    ) -> Result:
        """One text a picture. Request i draws from seed + i. Raises ValueError for a size that makes no tokens."""
        return self._texts([Request((picture,), ("text",)) for picture in pictures], plan, seed)

    def complete(self, prompts: Sequence[str], plan: Plan | None = None, seed: int = 0) -> Result:
        """The text that follows each prompt. Request i draws from seed + i."""
        return self._texts([Request((prompt,), ("text",)) for prompt in prompts], plan, seed)

    def _texts(self, requests: Sequence[Request], plan: Plan | None, seed: int) -> Result:
        answers = self.answer(requests, replace(plan or self.plan, candidates=1), seed)
        return Result(text=[str(answer.parts[0]) for answer in answers.answers], cost=answers.cost)

    @torch.inference_mode()
    def bits(self, texts: Sequence[str]) -> tuple[Float[np.ndarray, "N"], Int[np.ndarray, "N"]]:
        """Negative log-likelihood in nats, and UTF-8 bytes, of each text as a whole document (its end included)."""
        nats = []
        for chunk in batches(texts):
            ids = [[*self.documents.join([text]), self.text.tokenizer.end] for text in chunk]
            rows = [[self.text.begin(), self.text.span(own, 1, predicted=False)] for own in ids]
            with self._narrowed():
                hidden = Context(self.model, self.modalities, rows, 0, Cost()).read_all()
            for row, own in enumerate(ids):
                nats.append(-log_likelihood(self.model, hidden[row, : len(own)], own).item())
        return np.array(nats), np.array([len(text.encode()) for text in texts])

    @property
    def facts(self) -> ModelFacts:
        """What its calls cost depends on."""
        return ModelFacts.of(self.model, self.modalities, self.objective, self.precision == "bf16")

    def _narrowed(self) -> AbstractContextManager[object]:
        if self.precision == "float32":
            return nullcontext()  # a caller may have an autocast of its own
        return torch.autocast(self.model.text_embedding.weight.device.type, torch.bfloat16)

    def _grid(self, request: Request) -> tuple[int, int]:
        """Rows and columns of tokens of the pictures that are asked for; none where there are none."""
        return self.image.token_grid(*(request.size or self.size)) if "image" in request.asked else (0, 0)

    def _check(self, request: Request, plan: Plan) -> None:
        self._grid(request)
        needs_target = self.objective.needs_target
        if "image" in request.asked and plan.solver == "heun" and needs_target:
            raise ValueError(
                "solver heun averages velocities, which this model was not trained to give; use euler (its jumps)"
            )
        if "image" in request.asked and plan.solver == "restart" and not needs_target:
            raise ValueError(
                "solver restart jumps far, and this model was trained to give velocities; use euler or heun"
            )
        if plan.candidates > 1 and "image" not in request.asked:
            raise ValueError(f"candidates {plan.candidates}: scorers judge pictures, and none is asked for")
        if "text" in request.asked or plan.thinking:
            head = self.model.joint_head
            if plan.tokens_per_pass > (1 if head is None else head.num_tokens):
                most = "no joint head" if head is None else f"a joint head of {head.num_tokens} tokens"
                raise ValueError(f"tokens_per_pass {plan.tokens_per_pass}: this model has {most}")

    def _choose(
        self, made: Sequence[Made], rows: Sequence[Row], plan: Plan, cost: Cost
    ) -> list[tuple[Made, float | None]]:
        """Of each request's candidates the one that the scorer likes best by its last picture, with its score."""
        num = plan.candidates
        if num == 1:
            return [(own, None) for own in made]
        last = [next(part for part in reversed(own.parts) if not isinstance(part, str)) for own in made]
        scores = score_pictures(self, plan.scorer, [row.request for row in rows], torch.stack(last), cost)
        best = scores.view(-1, num).argmax(1) + num * torch.arange(len(made) // num)
        return [(made[i], scores[i].item()) for i in best.tolist()]

    def _decode(self, chosen: Sequence[tuple[Made, float | None]]) -> list[Answer]:
        latents = [[part for part in own.parts if not isinstance(part, str)] for own, _ in chosen]
        pixels: Iterator[Tensor] = iter(())
        if any(latents):
            pixels = iter(self.codec.decode(torch.stack([each for own in latents for each in own])))
        answers = []
        for (own, score), each in zip(chosen, latents, strict=True):
            parts: list[Part] = [
                part if isinstance(part, str) else tensor_to_picture(next(pixels)) for part in own.parts
            ]
            answers.append(Answer(tuple(parts), tuple(each), tuple(own.thoughts), score))
        return answers
