"""The sampler: requests in, pictures and texts out, batched. Every request has its own random numbers, so that what it
gets does not depend on what it was batched with.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import PIL.Image
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmgen.modalities import Image, Modality, Text, bands
from mmgen.model.model import Model
from mmgen.objectives import Objective
from mmgen.rng import keyed_numpy, keyed_torch
from mmgen.sampling.cost import Cost, context_flops, head_flops, state_flops
from mmgen.sampling.loops import Output, guided, heun, plan_times, pushforward, restart, tempered
from mmgen.sampling.plan import MAX_BATCH, Plan
from mmgen.sampling.session import Session
from mmgen.sampling.text import TextDecoder
from mmgen.sampling.verify import speculate
from mmgen.sequence import Span
from mmgen.tokenization.latents import picture_to_tensor, tensor_to_picture

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """What a batch of requests got, in their order. `latents` are of unit variance, as the codec takes them."""

    images: list[PIL.Image.Image] = field(default_factory=list)
    latents: Float[Tensor, "N D h w"] | None = None
    text: list[str] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)


def _batches(requests: Sequence[T], seed: int, cost: Cost) -> Iterator[tuple[Sequence[T], list[int]]]:
    """Requests and their seeds, MAX_BATCH at a time; what the caller does with a batch is timed."""
    for start in range(0, len(requests), MAX_BATCH):
        chunk = requests[start : start + MAX_BATCH]
        started = time.perf_counter()
        yield chunk, list(range(seed + start, seed + start + len(chunk)))
        cost.seconds += time.perf_counter() - started


class _Counted:
    """An output that counts its calls."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.calls = 0

    def __call__(self, x: Tensor, t: float, s: float) -> Tensor:
        self.calls += 1
        return self.output(x, t, s)


class Sampler:
    """Draws from one model. `size` (of a picture: height, width in pixels) and `plan` hold where a call names none."""

    def __init__(
        self,
        model: Model,
        modalities: Mapping[str, Modality],
        objective: Objective,
        size: tuple[int, int] = (64, 64),
        plan: Plan | None = None,
    ) -> None:
        self.model = model.eval()
        self.modalities = modalities
        self.objective = objective
        self.size = size
        self.plan = plan or Plan()
        text = modalities["text"]
        assert isinstance(text, Text)
        self.text = text

    @property
    def image(self) -> Image:
        """The picture modality. Raises ValueError where the model has none."""
        image = self.modalities.get("image")
        if not isinstance(image, Image):
            raise ValueError(f"this model has no pictures: its modalities are {list(self.modalities)}")
        return image

    @property
    def codec(self):
        """The picture codec: `encode` and `decode` between pixels and latents."""
        return self.image.codec

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str | None],
        plan: Plan | None = None,
        seed: int = 0,
        size: tuple[int, int] | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> Result:
        """One picture a prompt; None draws without a condition. Request i draws from seed + i.

        `size` is height and width in pixels. `on_batch` is told how many are done. Raises ValueError where the size
        does not divide into tokens, and for a solver that the objective does not allow.
        """
        plan = plan or self.plan
        if plan.solver == "heun" and self.objective.needs_target:
            raise ValueError(
                "solver heun averages velocities, which this model was not trained to give; use euler (its jumps)"
            )
        if plan.solver == "restart" and not self.objective.needs_target:
            raise ValueError(
                "solver restart jumps far, and this model was trained to give velocities; use euler or heun"
            )
        grid = self.image.token_grid(*(size or self.size))
        images, latents, cost = [], [], Cost()
        for chunk, seeds in _batches(prompts, seed, cost):
            latents.append(self._draw_pictures(chunk, plan, seeds, grid, cost))
            images += [tensor_to_picture(pixels) for pixels in self.codec.decode(latents[-1])]
            if on_batch is not None:
                on_batch(len(images))
        return Result(images, torch.cat(latents) if latents else None, cost=cost)

    @torch.inference_mode()
    def describe(
        self, pictures: Sequence[PIL.Image.Image], plan: Plan | None = None, seed: int = 0
    ) -> Result:
        """One text a picture. Request i draws from seed + i. Raises ValueError for a size that makes no tokens."""
        plan = plan or self.plan
        self._check_text(plan)
        texts, cost = [], Cost()
        for chunk, seeds in _batches(pictures, seed, cost):
            rows = [self._picture_document(picture, own) for picture, own in zip(chunk, seeds, strict=True)]
            texts += self._draw_texts(rows, plan, seeds, cost)
        return Result(text=texts, cost=cost)

    @torch.inference_mode()
    def complete(self, prompts: Sequence[str], plan: Plan | None = None, seed: int = 0) -> Result:
        """The text that follows each prompt. Request i draws from seed + i."""
        plan = plan or self.plan
        self._check_text(plan)
        texts, cost = [], Cost()
        for chunk, seeds in _batches(prompts, seed, cost):
            texts += self._draw_texts([self._prompt(prompt) for prompt in chunk], plan, seeds, cost)
        return Result(text=texts, cost=cost)

    @torch.inference_mode()
    def bits(self, texts: Sequence[str]) -> tuple[Float[np.ndarray, "N"], Int[np.ndarray, "N"]]:
        """Negative log-likelihood in nats, and UTF-8 bytes, of each text as a whole document (its end included)."""
        nats = []
        for chunk, _ in _batches(texts, 0, Cost()):
            rows = [[*self._prompt(text), self._end(text)] for text in chunk]
            session = self._session(rows)
            hidden = session.read_all(rows)
            for row, spans in enumerate(rows):
                ids = torch.cat([span.ids for span in spans if span.ids is not None]).to(hidden.device)
                log_probs = self.model.logits(hidden[row, : len(ids) - 1]).double().log_softmax(-1)
                nats.append(-log_probs.gather(-1, ids[1:, None]).sum().item())
        return np.array(nats), np.array([len(text.encode()) for text in texts])

    def _prompt(self, text: str | None) -> list[Span]:
        spans = [self.text.begin()]
        if text is not None:
            spans.append(self.text.span(self.text.tokenizer.encode(text), 1, predicted=False))
        return spans

    def _end(self, text: str) -> Span:
        position = self._prompt(text)[-1].next_position
        return self.text.span([self.text.tokenizer.end], position, predicted=False)

    def _picture_document(self, picture: PIL.Image.Image, seed: int) -> list[Span]:
        image = self.image
        self.image.token_grid(picture.height, picture.width)
        latents = image.codec.encode(picture_to_tensor(picture)[None])[0]
        values, height, width = image.patchify(latents)
        size = image.size_span(height, width, 1, predicted=False)
        draw = keyed_numpy(seed, "commit")
        span = image.span(values, height, width, size.next_position, draw, read=True, predicted=False)
        return [self.text.begin(), size, span]

    def _session(self, rows: Sequence[Sequence[Span]], more: int = 0) -> Session:
        longest = max(sum(map(len, row)) for row in rows)
        return Session(self.model, self.modalities, len(rows), longest + more)

    def _draw_pictures(
        self,
        prompts: Sequence[str | None],
        plan: Plan,
        seeds: Sequence[int],
        grid: tuple[int, int],
        cost: Cost,
    ) -> Float[Tensor, "R D h w"]:
        image, path = self.image, self.objective.path
        parts = bands(*grid, plan.blocks)
        # what each row has read, with its condition and without
        contexts = [self._context([self._prompt(prompt) for prompt in prompts], grid, plan, cost)]
        if plan.guidance != 1:
            contexts.append(self._context([self._prompt(None)] * len(prompts), grid, plan, cost))
        starts = [list(session.positions) for session in contexts]
        shape = (grid[0] * grid[1], image.channels)
        noise = torch.stack([torch.randn(shape, generator=keyed_torch(seed, "picture")) for seed in seeds])
        draws = [keyed_numpy(seed, "commit") for seed in seeds]
        # the state stays in float64 over a network that is not, as IMM's own sampler keeps it
        x = noise.to(self._device, torch.float64) * image.sigma_data
        nfe = 0
        for number, (band, steps) in enumerate(zip(parts, plan.block_steps, strict=True)):
            noisy = [[image.noisy_band(*grid, start, band) for start in own] for own in starts]
            outputs = [
                _Counted(session.output(spans, self.objective.told_target))
                for session, spans in zip(contexts, noisy, strict=True)
            ]
            times = plan_times(steps, plan.shift, path.time_range)
            output = guided(outputs[0], outputs[-1], plan.guidance, plan.guidance_range)
            state = x[:, band]
            if plan.solver == "restart":
                generators = [keyed_torch(seed, "restart", number) for seed in seeds]

                def fresh(_: int, generators=generators, like=state) -> Float[Tensor, "R S D"]:
                    drawn = [torch.randn(like.shape[1:], generator=each) for each in generators]
                    return torch.stack(drawn).to(like) * image.sigma_data

                x[:, band] = restart(output, path.jump, path.add_noise, state, times, fresh)
            else:
                solve = heun if plan.solver == "heun" else pushforward
                x[:, band] = solve(output, path.jump, state, times)
            tokens = band.stop - band.start
            for session, counted in zip(contexts, outputs, strict=True):
                keys = session.cache.length + tokens
                rows = len(prompts)
                config, channels = self.model.config, self._context_channels
                flops = state_flops(config, rows, rows * tokens, keys, image.channels, channels)
                cost.refine_flops += counted.calls * flops
                nfe += counted.calls
            if number + 1 < len(parts):
                values = x[:, band].float().cpu()
                read = [image.commit(own, draw) for own, draw in zip(values, draws, strict=True)]
                for session, spans in zip(contexts, noisy, strict=True):
                    finished = [image.finished_band(*each) for each in zip(spans, values, read, strict=True)]
                    self._read_band(session, finished, cost)
        cost.nfe = nfe
        return torch.stack([image.unpatchify(tokens, *grid) for tokens in x.float().cpu()])

    def _with_size(self, spans: list[Span], grid: tuple[int, int]) -> list[Span]:
        return [*spans, self.image.size_span(*grid, spans[-1].next_position, predicted=False)]

    def _context(self, documents: list[list[Span]], grid: tuple[int, int], plan: Plan, cost: Cost) -> Session:
        """A session that has read what comes before a picture, with room for all of its blocks but the last."""
        rows = [self._with_size(spans, grid) for spans in documents]
        session = self._session(rows, bands(*grid, plan.blocks)[-1].start)
        session.read(rows)
        length = session.cache.length
        cost.prefill_flops += context_flops(
            self.model.config, len(rows) * length, length, self._context_channels
        )
        return session

    def _read_band(self, session: Session, spans: list[Span], cost: Cost) -> None:
        session.read([[span] for span in spans])
        tokens = sum(map(len, spans))
        cost.commit_flops += context_flops(
            self.model.config, tokens, session.cache.length, self._context_channels
        )

    def _draw_texts(self, rows: list[list[Span]], plan: Plan, seeds: Sequence[int], cost: Cost) -> list[str]:
        tokenizer, config = self.text.tokenizer, self.model.config
        # a row that has ended may hold a pass beyond its limit, and go through another
        session = self._session(rows, plan.max_tokens + 2 * plan.tokens_per_pass)
        hidden = session.read(rows)
        length, channels = session.cache.length, self._context_channels
        cost.prefill_flops += context_flops(config, len(rows) * length, length, channels)
        logits = self.model.logits(hidden)
        cost.decode_flops += head_flops(config, len(rows), logits.shape[-1])
        not_text = torch.tensor(sorted(tokenizer.specials - {tokenizer.end}), device=logits.device)

        def law(logits: Float[Tensor, "... V"]) -> Float[Tensor, "... V"]:
            return tempered(logits.index_fill(-1, not_text, -torch.inf), plan.temperature, plan.top_p)

        decoder = TextDecoder(session, self.text, channels, cost)
        written = speculate(
            self.model.joint_head,
            self.model.vocabulary,
            decoder,
            logits,
            hidden,
            law,
            [keyed_numpy(seed, "text") for seed in seeds],
            plan.max_tokens,
            tokenizer.end,
            tokens_per_pass=plan.tokens_per_pass,
            lossless=plan.verify,
        )
        cost.tokens += sum(map(len, written.tokens))
        cost.passes += sum(written.passes)
        return [tokenizer.decode(ids) for ids in written.tokens]

    def _check_text(self, plan: Plan) -> None:
        head = self.model.joint_head
        if plan.tokens_per_pass > (1 if head is None else head.num_tokens):
            most = "no joint head" if head is None else f"a joint head of {head.num_tokens} tokens"
            raise ValueError(f"tokens_per_pass {plan.tokens_per_pass}: this model has {most}")

    @property
    def _context_channels(self) -> int:
        return sum(modality.channels for modality in self.modalities.values())

    @property
    def _device(self) -> torch.device:
        return self.model.text_embedding.weight.device
