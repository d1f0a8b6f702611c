"""Arguments of a command: what tyro refuses is one line that says what is wrong and where help is."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import tyro

from mmgen.cli.arguments import parse


@dataclass(frozen=True)
class Arguments:
    """Draws."""

    run: tyro.conf.Positional[Path]
    """The folder of a run."""
    prompt: str
    steps: int = 4
    """Calls of the network per picture."""
    weights: Literal["ema", "model"] = "ema"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, is {self.steps}")


def test_what_fits_is_read() -> None:
    assert parse(Arguments, ["r", "--prompt", "a b", "--steps", "2"], "mmgen sample") == Arguments(
        Path("r"), "a b", 2
    )


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["r"], ["--prompt"]),
        (["r", "--prompt", "x", "--steps", "many"], ["--steps", "'many'"]),
        (["r", "--prompt", "x", "--stpes", "3"], ["--stpes", "did you mean --steps?"]),
        (["r", "--prompt", "x", "--weights", "emo"], ["'emo'", "--weights", "'ema', 'model'"]),
        (["r", "--prompt", "x", "--steps"], ["--steps"]),
        (["r", "extra", "--prompt", "x"], ["extra"]),
        (["r", "--prompt", "x", "--steps", "0"], ["steps must be at least 1, is 0"]),
        (["r", "--prompt", "x" * 300, "--weights", "y" * 200], ["y" * 50]),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_does_not_fit_is_one_line(
    argv: list[str], parts: list[str], encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding=encoding)  # tyro draws its box accordingly
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", screen)
    with pytest.raises(ValueError) as caught:
        parse(Arguments, argv, "mmgen sample")
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert message.endswith("(see mmgen sample --help)") and "\n" not in message
    assert not set(message) & set("│╭╮╰╯─")
    assert screen.tell() == 0, "tyro printed beside the message"


def test_help_is_tyros_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Arguments, ["--help"], "mmgen sample")
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert "mmgen sample" in shown and "Calls of the network per picture." in shown and "default: 4" in shown
