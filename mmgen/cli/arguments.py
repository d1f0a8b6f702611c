"""Arguments of a command: tyro over a frozen dataclass, with mistakes as a ValueError of one line."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Sequence
from typing import TypeVar

import torch
import tyro

from mmgen.config import load_yaml, parse_overrides

T = TypeVar("T")
C = TypeVar("C")


def parse(cls: type[T], argv: Sequence[str], prog: str) -> T:
    """Returns the `cls` that `argv` describes; `--help` prints its field docstrings and exits with 0.

    `prog` is how the command is called ("mmgen sample"). Raises ValueError where tyro refuses the arguments.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(cls, args=list(argv), prog=prog)
    except SystemExit as stop:
        if not stop.code:
            raise
    raise ValueError(_one_line(box.getvalue(), prog))


def check_graphs(asked: bool) -> None:
    """Raises ValueError where CUDA graphs are asked for on a machine without CUDA."""
    if asked and not torch.cuda.is_available():
        raise ValueError("--graphs needs a CUDA device, and there is none here: leave it out")


def split(cls: type, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words for the dataclass `cls`, and words for a configuration, each flag with the values that follow it."""
    names = {field.name for field in dataclasses.fields(cls)}
    own: list[str] = []
    others: list[str] = []
    target = others
    for word in argv:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            target = own if name in names or name == "help" else others
        target.append(word)
    return own, others


def config_path(argv: Sequence[str], prog: str) -> tuple[str, list[str]]:
    """The YAML file, which is the first word after `prog`, and the words after it."""
    path, *rest = argv
    if path.startswith("-"):
        raise ValueError(f"the first word after `{prog}` is the YAML file, not {path}")
    return path, rest


def parse_with_config(cls: type[T], config: type[C], argv: Sequence[str], prog: str) -> tuple[T, C, str]:
    """`prog CONFIG [--flag ...] [--a.b value ...]`: the dataclass `cls`, the configuration, and the path of its file.

    Explains the flags and exits where nothing else is asked. Raises ValueError for bad values.
    """
    if not argv or argv[0] in ("-h", "--help"):
        parse(cls, ["--help"], f"{prog} CONFIG")
    path, rest = config_path(argv, prog)
    own, others = split(cls, rest)
    args = parse(cls, own, prog)
    return args, parse_overrides(config, load_yaml(path, config), others, f"{prog} {path}"), path


def _one_line(box: str, prog: str) -> str:
    """The message within tyro's box: its first part, and the nearest option where it suggests one."""
    lines = [line.strip(" │") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    # Rules part the title, the message, suggestions and so on; they are ASCII where stdout is not UTF-8.
    parts: list[list[str]] = [[]]
    for line in lines:
        if re.match(r"[╭╰─]|-{4,}$", line):
            parts.append([])
        elif line:
            parts[-1].append(line)
    message = " ".join(parts[1])
    # A refusal by the dataclass itself: its name says nothing to who types a command.
    message = re.sub(r"^Error parsing \w+: ", "", message)
    near = [part[1].split()[0] for part in parts if part and part[0].startswith("Perhaps you meant")]
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{message.rstrip('.')}{hint} (see {prog} --help)"
