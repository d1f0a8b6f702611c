"""The command line: dispatch, suggestions, and errors as one line with the right exit code."""

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import pytest

from mmgen import __version__
from mmgen.cli import main as cli


def install(monkeypatch: pytest.MonkeyPatch, result: int | BaseException) -> list[list[str]]:
    """Adds a command `probe` that returns or raises `result`; returns what it was called with."""
    calls: list[list[str]] = []

    def main(argv: list[str]) -> int:
        calls.append(argv)
        if isinstance(result, BaseException):
            raise result
        return result

    module = ModuleType("mmgen_probe")
    module.main = main  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "mmgen_probe", module)
    monkeypatch.setitem(cli.COMMANDS, "probe", ("mmgen_probe", "a probe"))
    return calls


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_exists_and_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(import_module(cli.COMMANDS[command][0]).main)
    try:
        code = cli.main([command, "--help"])
    except SystemExit as stop:  # tyro's way of ending its help
        code = stop.code
    assert not code
    assert f"mmgen {command}" in capsys.readouterr().out


def test_a_command_gets_the_rest_and_its_code_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch, 3)
    assert cli.main(["probe", "run", "--steps", "4"]) == 3
    assert calls == [["run", "--steps", "4"]]


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (ValueError("size is 0;\n  it must be above 0"), 2, "mmgen: error: size is 0; it must be above 0\n"),
        (OSError(28, "No space left on device"), 1, "mmgen: error: [Errno 28] No space left on device\n"),
        (FloatingPointError("step 5: loss not finite"), 1, "mmgen: error: step 5: loss not finite\n"),
        (KeyboardInterrupt(), 130, "\n"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    code: int,
    line: str,
) -> None:
    monkeypatch.delenv(cli.TRACEBACK, raising=False)
    install(monkeypatch, raised)
    assert cli.main(["probe"]) == code
    assert capsys.readouterr() == ("", line)


def test_a_bug_is_not_hidden_and_a_traceback_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, RuntimeError("a bug"))
    with pytest.raises(RuntimeError):
        cli.main(["probe"])
    install(monkeypatch, ValueError("a mistake"))
    monkeypatch.setenv(cli.TRACEBACK, "1")
    with pytest.raises(ValueError, match="a mistake"):
        cli.main(["probe"])


def test_an_unknown_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("mmgen: error: 'trian' is no command; did you mean 'train'?")
        and error.count("\n") == 1
    )


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0 and cli.main(["--version"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS) and f"mmgen {__version__}" in shown
    assert cli.main([]) == 2


def python(*words: str) -> Sequence[str]:
    return [sys.executable, *words]


def test_the_module_runs_and_help_needs_no_torch() -> None:
    program = (
        "import sys; from mmgen.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run(python("-c", program), capture_output=True, check=False).returncode == 0
    run = subprocess.run(python("-m", "mmgen", "--version"), capture_output=True, text=True, check=True)
    assert run.stdout == f"mmgen {__version__}\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    program = """import sys
from types import ModuleType
from mmgen.cli import main as cli
def lines(argv):
    for _ in range(100_000): print("a line")
sys.modules["p"] = ModuleType("p"); sys.modules["p"].main = lines
cli.COMMANDS["p"] = ("p", "")
sys.exit(cli.main(["p"]))"""
    process = subprocess.Popen(
        python("-c", program), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stderr
    assert process.stdout.readline() == "a line\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 141


@pytest.mark.parametrize(("num_ranks", "torn_down"), [(1, True), (2, False)])
def test_a_rank_of_several_leaves_without_the_interpreters_teardown(num_ranks: int, torn_down: bool) -> None:
    # threads of gloo that outlive the process group abort a process that is torn down beneath them
    program = "import atexit; atexit.register(print, 'torn down'); from mmgen.cli.main import run; run()"
    ended = subprocess.run(
        [sys.executable, "-c", program, "no-command"],
        env=os.environ | {"WORLD_SIZE": str(num_ranks)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2
    assert "'no-command' is no command" in ended.stderr
    assert ("torn down" in ended.stdout) is torn_down
