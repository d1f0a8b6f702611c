"""`mmgen import CONFIG QWEN3 OUT`: a run to begin from, out of the weights of a dense Qwen3 language model."""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mmgen.config import load_yaml, parse_overrides

USAGE = """usage: mmgen import CONFIG QWEN3 OUT [--a.b value ...]

Builds the model of the YAML file CONFIG, fills its text side with a Qwen3 checkpoint (a folder with config.json and
*.safetensors, as Hugging Face stores it), and writes the folder of a run: `--train.begin_from OUT` begins with it, and
`mmgen sample OUT --text TEXT` writes with it. What pictures need is drawn anew. CONFIG must have the checkpoint's
sizes; where it has not, the error says which they are."""


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if len(argv) < 3 or any(word.startswith("-") for word in argv[:3]):
        raise ValueError("`mmgen import` takes three words before any setting: CONFIG QWEN3 OUT")
    path, folder, out = argv[0], Path(argv[1]), Path(argv[2])
    if out.exists():
        raise ValueError(f"{out} exists: name a folder that does not")
    from mmgen.training.run import RunConfig

    config = parse_overrides(RunConfig, load_yaml(path, RunConfig), argv[3:], f"mmgen import {path}")
    _import(config, folder, out)
    return 0


def _import(config: Any, folder: Path, out: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import Qwen3Config

    from mmgen.hub.qwen3 import from_qwen3, trunk_config
    from mmgen.training.run import build, write_weights

    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no Hugging Face checkpoint: config.json: {error}") from None
    if described.get("model_type") != "qwen3":
        raise ValueError(f"{folder} holds a {described.get('model_type')!r} model; only qwen3 fits the trunk")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors")
    theirs = trunk_config(Qwen3Config(**described))
    own = {f.name for f in fields(theirs)} - {"time", "time_scale", "modulation_norm", "state_ffn"}
    different = [
        f"{name} {value}"
        for name, value in asdict(theirs).items()
        if name in own and value != getattr(config.model, name)
    ]
    if different:
        raise ValueError(f"the checkpoint's sizes are not those of `model`; it needs {', '.join(different)}")
    torch.manual_seed(config.seed)
    model = build(config).model
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    from_qwen3(model, weights)
    write_weights(out, config, 0, model.state_dict())
    print(f"{out}: {sum(tensor.numel() for tensor in weights.values()) / 1e6:.1f}M parameters of {folder}")
