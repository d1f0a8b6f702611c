"""`mmgen sample RUN`: draw pictures for prompts, describe a picture, or continue a text."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image, UnidentifiedImageError

from mmgen.cli.arguments import parse
from mmgen.evaluation.grid import picture_grid
from mmgen.sampling.plan import Plan
from mmgen.sampling.planner import Budget, Planner
from mmgen.sampling.sampler import Sampler
from mmgen.training.run import load, run_folder


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
    blocks: int | None = None
    """draw a picture in this many bands of rows, each after those above it"""
    steps: tuple[int, ...] | None = None
    """refinement steps of a picture, or one number for each of its blocks"""
    guidance: float | None = None
    """1 is none; larger follows the prompt more closely and costs two network calls a step"""
    guidance_range: tuple[float, float] | None = None
    """two times of [0, 1] (0: the picture, 1: noise); steps that begin outside have no guidance and cost one call"""
    budget: str | None = None
    """of a picture, as 0.5s, 20ms, 8nfe or 3gflop: the best plan within it of those that mmgen tradeoff measured"""
    solver: str | None = None
    """heun: two network calls a step, for flow matching; restart: noise anew before each step, for imm"""
    shift: float | None = None
    """above 1: more of the steps near noise; below 1: near the picture"""
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
    out: Path | None = None
    """a .png for one grid of all pictures, or a folder for one file each"""


def main(argv: Sequence[str]) -> int:
    args = parse(Sample, argv, "mmgen sample")
    asked = [name for name in ("prompt", "prompts", "caption", "text") if getattr(args, name) is not None]
    if len(asked) != 1:
        given = ", ".join(f"--{name}" for name in asked) or "none"
        raise ValueError(f"give one of --prompt, --prompts, --caption, --text; given: {given}")
    if args.num < 1:
        raise ValueError(f"--num {args.num} must be at least 1")
    sampler = load(args.run, args.weights)
    asked_plan = {f.name: value for f in fields(Plan) if (value := getattr(args, f.name)) is not None}
    if args.steps is not None and len(args.steps) == 1:
        asked_plan["steps"] = args.steps[0]
    plan = replace(sampler.plan, **asked_plan)
    if args.budget is not None:
        plan = _within(args, asked_plan)
    if args.caption is not None:
        result = sampler.describe([_open(args.caption)] * args.num, plan, args.seed)
    elif args.text is not None:
        result = sampler.complete([args.text] * args.num, plan, args.seed)
    else:
        prompts = _read_prompts(args.prompts) if args.prompts is not None else [args.prompt or ""]
        return _draw(sampler, [prompt for prompt in prompts for _ in range(args.num)], plan, args)
    for text in result.text:
        print(text)
    print(f"cost: {result.cost}")
    return 0


def _within(args: Sample, asked_plan: dict[str, object]) -> Plan:
    """The plan that the budget buys, which is shown."""
    if other := [name for name in asked_plan if name not in ("temperature", "top_p", "max_tokens")]:
        raise ValueError(f"--budget chooses the plan: leave out {', '.join(f'--{name}' for name in other)}")
    if args.caption is not None or args.text is not None:
        raise ValueError("--budget is of pictures: give --prompt or --prompts")
    budget = Budget.parse(args.budget or "")
    folder = run_folder(args.run)
    choice = Planner.load(folder / "tradeoff" / "tradeoff.json").choose(budget)
    plan, (value, low, high) = choice.plan, choice.expected
    print(
        f"plan: blocks {plan.blocks}, steps {plan.steps}, guidance {plan.guidance:g}; when measured "
        f"{1000 * choice.cost['seconds']:.3g} ms a picture and KID-lite0 {value:.3f} ({low:.3f} to {high:.3f})"
    )
    return plan


def _draw(sampler: Sampler, prompts: list[str], plan: Plan, args: Sample) -> int:
    out = args.out or Path("sample.png")
    if out.suffix and out.suffix != ".png":
        raise ValueError(f"--out {out}: a name that ends in .png, or a folder")
    result = sampler.generate(prompts, plan, args.seed, args.size)
    if out.suffix:
        columns = max(args.num, 8) if args.prompt is None else min(args.num, 8)
        rows = [result.images[i : i + columns] for i in range(0, len(result.images), columns)]
        labels = [
            prompts[i * columns] if columns == args.num or args.prompt else "" for i in range(len(rows))
        ]
        titles = prompts[:columns] if args.prompt is None and len(rows) == 1 else ()
        out.parent.mkdir(parents=True, exist_ok=True)
        picture_grid(rows, labels, titles, scale=1 if len(rows) > 8 else 2).save(out)
        print(f"{len(result.images)} pictures: {out}")
    else:
        out.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(result.images):
            picture.save(out / f"{number:05d}.png")
        print(f"{len(result.images)} pictures: {out}/00000.png ... {len(result.images) - 1:05d}.png")
    print(f"cost: {result.cost}")
    return 0


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ValueError(f"--prompts {path} cannot be read: {error.strerror}") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"--prompts {path} holds no prompt: expected one a line")
    return prompts


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"--caption {path} cannot be opened as a picture: {error}") from None
