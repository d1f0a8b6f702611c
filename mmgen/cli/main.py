"""The command `mmgen`: the first word names a module of this package, whose `main(argv)` gets the rest.

Modules are imported when their command is called. A user's mistake, which the rest of the package raises as
ValueError, becomes one line on stderr and exit code 2; a failure of the machine or of the run, exit code 1.
"""

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from mmgen import __version__

COMMANDS = {
    "train": ("mmgen.cli.train", "train a model from a YAML file, or resume a run"),
    "sample": ("mmgen.cli.sample", "draw pictures for prompts, or describe pictures"),
    "evaluate": ("mmgen.cli.evaluate", "measure what a run draws and writes"),
    "tradeoff": ("mmgen.cli.tradeoff", "measure what each unit of inference compute buys"),
    "report": ("mmgen.cli.report", "one page of what was measured, to look at in a browser"),
    "cost": ("mmgen.cli.cost", "say what plans will cost, before anything is drawn"),
    "import": ("mmgen.cli.import_", "make a run to begin from out of a Qwen3 checkpoint"),
    "bench": ("mmgen.cli.bench", "time training and sampling on this machine"),
    "estimate": ("mmgen.cli.estimate", "say what a training will take, before anybody rents a GPU"),
    "export": ("mmgen.cli.export", "write what sampling needs of a run, to ship it"),
    "tokenizer": ("mmgen.cli.tokenizer", "train text and latent tokenizers, encode shards"),
}
TRACEBACK = "MMGEN_TRACEBACK"


def run() -> None:
    """The console script: runs the command line of this process and exits with its code."""
    code = main(sys.argv[1:])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Where DTensor was used, gloo's threads outlive destroy_process_group, and one that needs the interpreter while
        # it is torn down aborts the process: torchrun then ends every rank as failed, though all was written. The
        # commands have closed what they opened by now. (The variable is read as `joined` reads it, which needs torch.)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str]) -> int:
    """Runs one command and returns its exit code: 0 done, 1 failed, 2 a user's mistake, 130 interrupted."""
    try:
        return _dispatch(list(argv))
    except KeyboardInterrupt:
        print(file=sys.stderr)  # after the ^C that the terminal shows
        return 130
    except BrokenPipeError:
        # `mmgen ... | head`: the reader left. What is still buffered would raise again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"mmgen: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def _dispatch(argv: list[str]) -> int:
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if command in ("", "-h", "--help", "help"):
        print(_help())
        return 0 if command else 2
    if command in ("-V", "--version"):
        print(f"mmgen {__version__}")
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"'{command}' is no command{hint} (there are {', '.join(COMMANDS)})")
    module = import_module(COMMANDS[command][0])
    return module.main(rest)


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = (f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return "\n".join(
        [
            "usage: mmgen COMMAND ...",
            "",
            "commands:",
            *rows,
            "",
            "`mmgen COMMAND --help` explains one. --version prints the version.",
            f"{TRACEBACK}=1 shows where an error came from.",
        ]
    )
