"""`mmgen sample RUN`: draw pictures for prompts, describe a picture, continue a text, or any order of these."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image, UnidentifiedImageError

from mmgen.cli.arguments import check_graphs, parse
from mmgen.evaluation.grid import picture_grid
from mmgen.sampling.adaptive import Policy, answer_adaptively
from mmgen.sampling.plan import Plan
from mmgen.sampling.planner import Budget, Planner
from mmgen.sampling.request import Answer, Event, Kind, Request
from mmgen.sampling.sampler import Sampler, SamplingPrecision
from mmgen.training.run import find_checkpoint, load, run_folder


@dataclass(frozen=True)
class Sample:
    run: Annotated[str, tyro.conf.Positional]
    """folder of a run, or one of its checkpoints"""
    prompt: str | None = None
    """draw pictures of this"""
    prompts: Path | None = None
    """draw a picture of each line of this file"""
    caption: Path | None = None
    """describe this picture"""
    text: str | None = None
    """continue this text"""
    given: tuple[str, ...] | None = None
    """parts in reading order, each a text or the path of a picture; what --ask names follows them"""
    ask: tuple[Kind, ...] | None = None
    """of --given: the kinds of parts that are made, in turn (image)"""
    blocks: int | None = None
    """draw a picture in this many bands of rows, each after those above it"""
    steps: tuple[int, ...] | None = None
    """refinement steps of a picture, or one number for each of its blocks"""
    guidance: float | None = None
    """1 is none; larger follows the prompt more closely and costs two network evaluations a step, in one call"""
    guidance_range: tuple[float, float] | None = None
    """two times of [0, 1] (0: the picture, 1: noise); steps that begin outside have none, and cost one evaluation"""
    picture_guidance: float | None = None
    """the same of pictures in --given, apart from its texts: a third evaluation a step"""
    budget: str | None = None
    """of a picture, as 0.5s, 20ms, 8nfe or 3gflop: the best plan within it of those that mmgen tradeoff measured"""
    adaptive: bool = False
    """of --budget: on average over pictures; one that the scorer dislikes is drawn again, by a dearer plan"""
    solver: str | None = None
    """heun: two network calls a step, for flow matching; restart: noise anew before each step, for imm; or one's own,
    package.module:function"""
    shift: float | None = None
    """above 1: more of the steps near noise; below 1: near the picture"""
    thinking: int | None = None
    """tokens of text, at most, that the model writes before each picture and then reads"""
    candidates: int | None = None
    """of a picture; the one that the scorer likes best is kept"""
    scorer: str | None = None
    """of candidates: likelihood (of the prompt after the picture), or package.module:function"""
    tokens_per_pass: int | None = None
    """of text: written in a pass of the trunk; those after the first are drafted by the model's joint head"""
    verify: bool | None = None
    """of text: keep of a draft what has the law of one token a pass; without it all of it is kept"""
    temperature: float | None = None
    """of text; 0 takes the likeliest token"""
    top_p: float | None = None
    """of text: sample from the fewest tokens whose probabilities reach this"""
    max_tokens: int | None = None
    """of text"""
    num: int = 1
    """pictures or texts for each prompt"""
    seed: int = 0
    """request i draws from seed + i"""
    size: tuple[int, int] | None = None
    """height and width of a picture in pixels"""
    weights: str = "ema"
    """ema (averaged) or model"""
    precision: SamplingPrecision = "float32"
    """of matrix products and the cache: float32 or bf16"""
    graphs: bool = False
    """on a GPU: record what is called again and again as CUDA graphs, and replay it"""
    out: Path | None = None
    """a .png for one grid of all pictures, or a folder for one file each"""
    stream: bool = False
    """show text as it is written and blocks as they are drawn; one answer only"""


def main(argv: Sequence[str]) -> int:
    args = parse(Sample, argv, "mmgen sample")
    modes = ("prompt", "prompts", "caption", "text", "given")
    asked = [name for name in modes if getattr(args, name) is not None]
    if len(asked) != 1:
        given = ", ".join(f"--{name}" for name in asked) or "none"
        raise ValueError(f"give one of {', '.join(f'--{name}' for name in modes)}; given: {given}")
    if args.num < 1:
        raise ValueError(f"--num {args.num} must be at least 1")
    if args.ask is not None and args.given is None:
        raise ValueError(f"--ask says what follows --given; --{asked[0]} has one kind of answer")
    requests = [request for request in _requests(args) for _ in range(args.num)]
    if args.stream and len(requests) > 1:
        raise ValueError(f"--stream shows one answer, and {len(requests)} are asked for")
    if args.stream and (args.adaptive or (args.candidates or 1) > 1):
        other = "--adaptive" if args.adaptive else f"--candidates {args.candidates}"
        raise ValueError(
            f"--stream shows one answer as it is made, and {other} may make several: leave one out"
        )
    draws = "image" in requests[0].asked
    out = args.out or Path("sample.png")
    if out.suffix and out.suffix != ".png":
        raise ValueError(f"--out {out}: a name that ends in .png, or a folder")
    check_graphs(args.graphs)
    sampler = load(args.run, args.weights, args.precision, args.graphs)
    asked_plan = {f.name: value for f in fields(Plan) if (value := getattr(args, f.name)) is not None}
    if args.steps is not None and len(args.steps) == 1:
        asked_plan["steps"] = args.steps[0]
    if args.adaptive and args.budget is None:
        raise ValueError("--adaptive is of a --budget: give one")
    plan = replace(sampler.plan, **asked_plan) if args.budget is None else _within(args, asked_plan, sampler)
    if isinstance(plan, Policy):
        found = answer_adaptively(sampler, requests, plan, args.seed)
    else:
        plan = plan if draws else replace(plan, candidates=1)
        if args.stream and plan.candidates > 1:
            raise ValueError(
                f"--stream shows one answer, and this run's plan draws {plan.candidates} candidates"
            )
        shown = _Shown(plan) if args.stream else None
        found = sampler.answer(requests, plan, args.seed, shown)
        if shown is not None:
            shown.end_line()
    for answer in [] if args.stream else found.answers:
        for thought in answer.thoughts:
            print(f"thought: {thought}")
        for part in answer.parts:
            if isinstance(part, str):
                print(part)
    if draws:
        _save(found.answers, requests, out, args)
    print(f"cost: {found.cost}")
    return 0


def _requests(args: Sample) -> list[Request]:
    """What is asked, each once."""
    if args.caption is not None:
        return [Request((_open(args.caption, "--caption"),), ("text",))]
    if args.text is not None:
        return [Request((args.text,), ("text",))]
    if args.given is not None:
        parts = [_open(Path(part), "--given") if _is_picture(part) else part for part in args.given]
        return [Request(tuple(parts), args.ask or ("image",), args.size)]
    prompts = _read_prompts(args.prompts) if args.prompts is not None else [args.prompt or ""]
    return [Request((prompt,), ("image",), args.size) for prompt in prompts]


def _is_picture(part: str) -> bool:
    return Path(part).suffix.lower() in Image.registered_extensions()


class _Shown:
    """Prints what is new of each event."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.started = time.perf_counter()
        self.shown = ""
        self.part: tuple[int, bool] | None = None  # that is being written

    def __call__(self, event: Event) -> None:
        if event.text is not None:
            if (event.part, event.thought) != self.part:
                self.end_line()
                self.part = event.part, event.thought
                print("thought: " if event.thought else "", end="")
            fresh = event.text.removeprefix(self.shown) if event.text.startswith(self.shown) else event.text
            print(fresh, end="", flush=True)
            self.shown = event.text
            return
        self.end_line()
        seconds = time.perf_counter() - self.started
        print(f"block {event.blocks} of {self.plan.blocks} after {seconds:.2f} s", flush=True)

    def end_line(self) -> None:
        if self.part is not None:
            print()
        self.shown, self.part = "", None


def _within(args: Sample, asked_plan: dict[str, object], sampler: Sampler) -> Plan | Policy:
    """The plan, or policy, that the budget buys, which is shown."""
    if other := [name for name in asked_plan if name not in ("temperature", "top_p", "max_tokens")]:
        raise ValueError(f"--budget chooses the plan: leave out {', '.join(f'--{name}' for name in other)}")
    if args.caption is not None or args.text is not None or "image" not in (args.ask or ("image",)):
        raise ValueError("--budget is of pictures: give --prompt or --prompts")
    if args.size not in (None, sampler.size):
        height, width = sampler.size
        raise ValueError(f"--budget knows pictures of {height} {width} alone: leave out --size")
    budget = Budget.parse(args.budget or "")
    path = run_folder(args.run) / "tradeoff" / "tradeoff.json"
    of = {"checkpoint": find_checkpoint(args.run).name, "weights": args.weights, "precision": args.precision}
    choice = Planner.load(path, adaptive=args.adaptive, of=of).choose(budget)
    plan, (value, low, high) = choice.plan, choice.expected
    if isinstance(plan, Policy):
        said = f"{_said(plan.first)}; where its score is below {plan.threshold:.3g}: {_said(plan.then)}"
    else:
        said = _said(plan)
    print(
        f"plan: {said}; when measured {1000 * choice.cost['seconds']:.3g} ms for a picture alone and "
        f"KID-lite0 {value:.3f} ({low:.3f} to {high:.3f})"
    )
    return plan


def _said(plan: Plan) -> str:
    """Its blocks, steps and guidance, and what else of pictures is not as it is unless said otherwise."""
    usual = Plan()
    more = [
        f", {name} {getattr(plan, name)}"
        for name in ("guidance_range", "solver", "shift", "thinking", "candidates", "scorer")
        if getattr(plan, name) != getattr(usual, name)
    ]
    return f"blocks {plan.blocks}, steps {plan.steps}, guidance {plan.guidance:g}{''.join(more)}"


def _save(answers: Sequence[Answer], requests: Sequence[Request], out: Path, args: Sample) -> None:
    """All pictures, as one grid or as files of a folder."""
    images = [[part for part in answer.parts if not isinstance(part, str)] for answer in answers]
    flat = [picture for own in images for picture in own]
    if not out.suffix:
        out.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(flat):
            picture.save(out / f"{number:05d}.png")
        print(f"{len(flat)} pictures: {out}/00000.png ... {len(flat) - 1:05d}.png")
        return
    prompts = [next((part for part in request.given if isinstance(part, str)), "") for request in requests]
    if args.given is not None:
        # what is given comes first in every row
        rows = [
            [*(part for part in request.given if not isinstance(part, str)), *own]
            for request, own in zip(requests, images, strict=True)
        ]
        labels, titles = prompts, ()
    else:
        columns = max(args.num, 8) if args.prompt is None else min(args.num, 8)
        rows = [flat[i : i + columns] for i in range(0, len(flat), columns)]
        labels = [
            prompts[i * columns] if columns == args.num or args.prompt else "" for i in range(len(rows))
        ]
        titles = prompts[:columns] if args.prompt is None and len(rows) == 1 else ()
    out.parent.mkdir(parents=True, exist_ok=True)
    picture_grid(rows, labels, titles, scale=1 if len(rows) > 8 else 2).save(out)
    print(f"{len(flat)} pictures: {out}")


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ValueError(f"--prompts {path} cannot be read: {error.strerror}") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"--prompts {path} holds no prompt: expected one a line")
    return prompts


def _open(path: Path, option: str) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{option} {path} cannot be opened as a picture: {error}") from None
