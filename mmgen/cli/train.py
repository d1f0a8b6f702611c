"""`mmgen train CONFIG [--a.b value ...] [--resume]`: train a run from a YAML file, or continue one."""

from collections.abc import Sequence

from mmgen.cli.arguments import config_path
from mmgen.config import load_yaml, parse_overrides
from mmgen.training.run import RunConfig

USAGE = """usage: mmgen train CONFIG [--resume] [--a.b value ...]

Trains what the YAML file CONFIG describes and writes a run folder: config.yaml (resolved), metrics.jsonl,
checkpoints/, previews/. Any value of CONFIG can be changed on the command line, for example
`--optim.lr 5e-4 --run runs/other`. --resume continues the run from its last checkpoint, bit for bit.

`mmgen train CONFIG --help` lists every setting with its value there."""


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    path, rest = config_path(argv, "mmgen train")
    resume = "--resume" in rest
    rest = [word for word in rest if word != "--resume"]
    config = parse_overrides(RunConfig, load_yaml(path, RunConfig), rest, f"mmgen train {path}")
    from mmgen.training.trainer import train

    train(config, resume)
    return 0
