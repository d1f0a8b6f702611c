"""One batch of requests that ask for the same kinds of parts: the loop that interleaves the two verbs.

Rows are requests, or their candidates. What is given is read; then every part that is asked for is made in turn, a text
token by token and a picture block by block. What a later part shall read is appended to the context.

Shape letters: R rows, N tokens of a picture, S of a block, C channels of a token, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from mmgen.modalities import bands
from mmgen.model.model import Model
from mmgen.objectives import Objective
from mmgen.rng import keyed_numpy, keyed_torch
from mmgen.sampling.context import Context
from mmgen.sampling.cost import Cost, head_flops, state_flops
from mmgen.sampling.documents import Documents
from mmgen.sampling.graphs import Graphs
from mmgen.sampling.loops import (
    Outputs,
    guided,
    guided_apart,
    heun,
    plan_times,
    pushforward,
    restart,
    tempered,
)
from mmgen.sampling.plan import SOLVER_ARGUMENTS, Plan, import_function
from mmgen.sampling.request import Event, Listener, Part, Request
from mmgen.sampling.text import TextDecoder
from mmgen.sampling.verify import speculate
from mmgen.sequence import Span


@dataclass(frozen=True)
class Row:
    """A request's line of a batch, or one of its candidates', with random numbers of its own."""

    request: Request
    index: int
    """of the request among all"""
    seed: int
    candidate: int = 0

    def key(self, name: str, *numbers: int) -> tuple[int | str, ...]:
        """Of a draw. The first of everything has the plainest key, whatever else is asked for."""
        mine = (self.seed, "candidate", self.candidate) if self.candidate else (self.seed,)
        return (*mine, name, *numbers)


@dataclass
class Made:
    """What a row has so far: texts and latents, in the order in which they were asked for."""

    parts: list[str | Float[Tensor, "D h w"]] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)


class Batch:
    """Rows that ask for the same kinds of parts, and pictures of `grid` tokens, by one plan."""

    def __init__(
        self,
        model: Model,
        objective: Objective,
        documents: Documents,
        rows: Sequence[Row],
        grid: tuple[int, int],
        plan: Plan,
        listen: Listener | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        self.model = model
        self.objective = objective
        self.documents = documents
        self.rows = rows
        self.grid = grid
        self.plan = plan
        self.listen = listen
        self.graphs = graphs
        self.asked = rows[0].request.asked
        self.cost = Cost()
        self.made = [Made() for _ in rows]
        self._num_given = [sum(not isinstance(part, str) for part in row.request.given) for row in rows]
        self._num_drawn = 0

    def run(self) -> list[Made]:
        given = [list(row.request.given) for row in self.rows]
        full = self._context(given)
        contexts = [full]
        if self._guided_apart:
            contexts.append(self._context([[p for p in parts if not isinstance(p, str)] for parts in given]))
        for number, kind in enumerate(self.asked):
            last = number + 1 == len(self.asked)
            if kind == "text":
                end = self.documents.text.tokenizer.end if last else self._begin_of_picture
                texts = self._write(full, number, self.plan.max_tokens, end)
                for made, text in zip(self.made, texts, strict=True):
                    made.parts.append(text)
            else:
                if self.plan.thinking:
                    self._think(full, number)
                for made, latents in zip(self.made, self._draw(contexts, number, last), strict=True):
                    made.parts.append(latents)
        return self.made

    @property
    def _guided_apart(self) -> bool:
        plan = self.plan
        apart = plan.picture_guidance is not None and plan.picture_guidance != plan.guidance
        return apart and any(row.request.gives_pictures for row in self.rows)

    @property
    def _begin_of_picture(self) -> int:
        """The token that ends a text which a picture follows."""
        return self.documents.text.tokenizer.height(self.grid[0])

    def _context(self, parts: Sequence[Sequence[Part]]) -> Context:
        """One that begins with what each row is given, and has room for all that it asks for."""
        documents = [
            self.documents.begin(own, lambda i, row=row: keyed_numpy(*row.key("commit", *_number(i))))
            for own, row in zip(parts, self.rows, strict=True)
        ]
        plan, more = self.plan, 0
        # a row that has ended may hold a pass beyond its limit, and go through another
        beyond = 2 * plan.tokens_per_pass
        for kind in self.asked:
            if kind == "text":
                more += plan.max_tokens + beyond
            else:
                parted = len(self.documents.text.separator())
                more += 2 + (parted + plan.thinking + beyond if plan.thinking else 0)
                # the last block of the last picture, which nobody reads, stands here too while it is noisy
                more += self.grid[0] * self.grid[1]
        return self._reads(documents, more)

    def _reads(self, documents: Sequence[Sequence[Span]], more: int) -> Context:
        modalities = self.documents.modalities
        return Context(self.model, modalities, documents, more, self.cost, graphs=self.graphs)

    def _think(self, context: Context, number: int) -> None:
        """Text between what is there and a picture; where that ends with a text, a new line parts the two, as in
        training."""
        for row, own in enumerate(self.rows):
            given = own.request.given
            if self.asked[number - 1] == "text" if number else given and isinstance(given[-1], str):
                separator = self.documents.text.separator()
                start = context.next_position(row)
                context.append(row, self.documents.text.span(separator, start, predicted=False))
        thoughts = self._write(context, number, self.plan.thinking, self._begin_of_picture, thought=True)
        for made, thought in zip(self.made, thoughts, strict=True):
            made.thoughts.append(thought)

    def _write(
        self, context: Context, number: int, max_tokens: int, end: int, thought: bool = False
    ) -> list[str]:
        """The text of each row that follows its context, which then holds it."""
        plan, cost, tokenizer = self.plan, self.cost, self.documents.text.tokenizer
        hidden = context.read()
        before = context.lengths
        logits = self.model.logits(hidden)
        cost.decode_flops += head_flops(self.model.config, len(self.rows), logits.shape[-1])
        never = torch.tensor(sorted(tokenizer.specials - {end}), device=logits.device)

        def law(logits: Float[Tensor, "... V"]) -> Float[Tensor, "... V"]:
            return tempered(logits.index_fill(-1, never, -torch.inf), plan.temperature, plan.top_p)

        def told(row: int, ids: list[int]) -> None:
            if self.listen is not None:
                # of a character of several tokens nothing is shown before it is whole
                self._tell(row, number, text=tokenizer.decode(ids).rstrip("\ufffd"), thought=thought)

        name = "thought" if thought else "text"
        written = speculate(
            self.model.joint_head,
            self.model.vocabulary,
            TextDecoder(context.session, cost),
            logits,
            hidden,
            law,
            [keyed_numpy(*row.key(name, *_number(number))) for row in self.rows],
            max_tokens,
            end,
            tokens_per_pass=plan.tokens_per_pass,
            lossless=plan.verify,
            told=told,
        )
        context.settle(before, written.tokens, self.documents.text)
        cost.memory = max(cost.memory, context.session.cache.num_bytes)
        cost.tokens += sum(map(len, written.tokens))
        cost.passes += sum(written.passes)
        return [tokenizer.decode(ids) for ids in written.tokens]

    def _draw(self, contexts: Sequence[Context], number: int, last: bool) -> list[Float[Tensor, "D h w"]]:
        """A picture of each row, which its contexts then hold unless it is the last of what is asked for."""
        image, plan, grid = self.documents.image, self.plan, self.grid
        contexts = list(contexts)
        num_lasting = len(contexts)
        if plan.guidance != 1 or num_lasting > 1:
            # the condition is dropped whole in training, what was drawn before included
            null = [[self.documents.text.begin()]] * len(self.rows)
            room = 2 + bands(*grid, plan.blocks)[-1].start
            contexts.append(self._reads(null, room))
        for context in contexts:
            for row in range(len(self.rows)):
                context.append(row, self.documents.size(grid, context.next_position(row)))
        Context.read_each(contexts)
        starts = [[context.next_position(row) for row in range(len(self.rows))] for context in contexts]
        pictures = [own + self._num_drawn for own in self._num_given]
        keys = [_number(own) for own in pictures]
        shape = (grid[0] * grid[1], image.channels)
        noise = [
            torch.randn(shape, generator=keyed_torch(*row.key("picture", *key)))
            for row, key in zip(self.rows, keys, strict=True)
        ]
        draws = [keyed_numpy(*row.key("commit", *key)) for row, key in zip(self.rows, keys, strict=True)]
        # the state stays in float64 over a network that is not, as IMM's own sampler keeps it
        x = torch.stack(noise).to(contexts[0].device, torch.float64) * image.sigma_data
        parts = bands(*grid, plan.blocks)
        for block, (band, steps) in enumerate(zip(parts, plan.block_steps, strict=True)):
            noisy = [[image.noisy_band(*grid, start, band) for start in own] for own in starts]
            outputs = self._outputs(contexts, noisy)
            generators = [
                keyed_torch(*row.key("restart", block, *key))
                for row, key in zip(self.rows, keys, strict=True)
            ]
            x[:, band] = self._refine(outputs, len(contexts), x[:, band], steps, generators)
            if self.listen is not None:
                for row, tokens in enumerate(x.float().cpu()):
                    self._tell(row, number, latents=image.unpatchify(tokens, *grid), blocks=block + 1)
            finished = block + 1 == len(parts)
            if finished and last:
                break
            values = x[:, band].float().cpu()
            read = [image.commit(own, draw) for own, draw in zip(values, draws, strict=True)]
            for context, spans in zip(contexts[: num_lasting if finished else None], noisy, strict=False):
                for row, each in enumerate(zip(spans, values, read, strict=True)):
                    context.append(row, image.finished_band(*each), finished=True)
                if not finished:
                    context.read()
        self._num_drawn += 1
        return [image.unpatchify(tokens, *grid) for tokens in x.float().cpu()]

    def _outputs(self, contexts: Sequence[Context], noisy: Sequence[Sequence[Span]]) -> Outputs:
        """Of a block, whose noisy spans are those of each context's rows; what they cost is counted."""
        first, *others = (context.session for context in contexts)
        outputs = first.outputs(noisy, self.objective.told_target, others)
        held = sum(context.session.cache.num_bytes for context in contexts)
        channels = self.documents.image.channels, contexts[0].channels

        def counted(x: Tensor, t: float, s: float, num: int) -> Sequence[Tensor]:
            rows, tokens = num * len(x), x.shape[1]
            seen = max(context.session.cache.length for context in contexts[:num]) + tokens
            # one instance: all rows are at one time
            self.cost.refine_flops += state_flops(self.model.config, 1, rows * tokens, seen, *channels)
            self.cost.nfe += num
            found = outputs(x, t, s, num)
            self.cost.memory = max(self.cost.memory, held + outputs.num_bytes)
            return found

        return counted

    def _refine(
        self,
        outputs: Outputs,
        num: int,
        x: Float[Tensor, "R S C"],
        steps: int,
        generators: list[torch.Generator],
    ) -> Float[Tensor, "R S C"]:
        """A block of noise moved to the data, by `num` conditions: full, of its pictures alone, none."""
        plan, path = self.plan, self.objective.path
        times = plan_times(steps, plan.shift, path.time_range)
        if num > 2:
            assert plan.picture_guidance is not None, "two contexts last only where it is set"
            output = guided_apart(outputs, plan.guidance, plan.picture_guidance, plan.guidance_range)
        else:
            output = guided(outputs, plan.guidance, plan.guidance_range)
        if plan.solver == "restart":
            sigma = self.documents.image.sigma_data

            def fresh(_: int) -> Float[Tensor, "R S C"]:
                drawn = [torch.randn(x.shape[1:], generator=each) for each in generators]
                return torch.stack(drawn).to(x) * sigma

            return restart(output, path.jump, path.add_noise, x, times, fresh)
        own = {"euler": pushforward, "heun": heun}
        solve = own.get(plan.solver) or import_function(plan.solver, "solver", SOLVER_ARGUMENTS)
        return solve(output, path.jump, x, times)

    def _tell(self, row: int, number: int, **what) -> None:
        assert self.listen is not None, "somebody listens"
        own = self.rows[row]
        self.listen(Event(own.index, number, candidate=own.candidate, **what))


def _number(number: int) -> tuple[int, ...]:
    """What a key gets of the second, third, ... thing of its name."""
    return (number,) if number else ()
