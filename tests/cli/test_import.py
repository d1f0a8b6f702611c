"""A Qwen3 checkpoint becomes a run to begin from; what does not fit is said."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from mmgen.cli.main import main
from mmgen.config import save_yaml
from mmgen.tokenization.text import train_text
from mmgen.training.begin import begin_from
from mmgen.training.run import RunConfig, build, load, load_run_config
from tests.parts import TINY, WORDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run.yaml`, and `qwen`: a language model of its sizes, as transformers stores it, that lacks the last words."""
    folder = tmp_path_factory.mktemp("import")
    tokenizer = train_text([" ".join(WORDS)] * 20, 300, folder / "tokenizer", max_size=8)
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=tokenizer.vocab_size - 20,
        hidden_size=TINY.width,
        intermediate_size=TINY.ffn_width,
        num_hidden_layers=TINY.num_layers,
        num_attention_heads=TINY.num_heads,
        num_key_value_heads=TINY.num_kv_heads,
        head_dim=TINY.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": TINY.rope_theta},
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "qwen")
    settings = RunConfig(
        tokenizer=str(folder / "tokenizer"),
        size=(16, 16),
        modalities={"text": {}, "image": {"codec": "pixels", "patch": 4}},
        model=TINY,
    )
    save_yaml(settings, folder / "run.yaml")
    save_yaml(replace(settings, model=replace(TINY, ffn_width=64)), folder / "wide.yaml")
    return folder


def test_a_language_model_becomes_a_run_to_begin_from(folder: Path, tmp_path: Path):
    assert main(["import", str(folder / "run.yaml"), str(folder / "qwen"), str(tmp_path / "run")]) == 0
    sampler = load(tmp_path / "run")
    theirs = Qwen3ForCausalLM.from_pretrained(folder / "qwen").state_dict()
    own = sampler.model.state_dict()
    assert torch.equal(own["trunk.layers.1.mlp.up_proj.weight"], theirs["model.layers.1.mlp.up_proj.weight"])
    rows = theirs["model.embed_tokens.weight"]
    assert torch.equal(own["text_embedding.weight"][: len(rows)], rows)
    assert own["text_embedding.weight"][len(rows) :].abs().max() > 0, "new words are drawn anew"
    torch.manual_seed(9)
    other = build(load_run_config(tmp_path / "run")).model
    assert "beginning with the averaged weights" in begin_from(other, tmp_path / "run")
    assert all(torch.equal(tensor, own[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ("wide.yaml", {}, "sizes are not those of `model`; it needs ffn_width 48"),
        ("run.yaml", {"model_type": "llama"}, "holds a 'llama' model; only qwen3 fits"),
        ("run.yaml", {"attention_bias": True}, "attention_bias is set"),
        ("run.yaml", None, "holds no *.safetensors"),
    ],
)
def test_what_does_not_fit_is_said(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    config: str,
    change: dict | None,
    message: str,
):
    qwen = tmp_path / "qwen"
    qwen.mkdir()
    described = json.loads((folder / "qwen" / "config.json").read_text())
    (qwen / "config.json").write_text(json.dumps({**described, **(change or {})}))
    if change is not None:
        (qwen / "model.safetensors").write_bytes((folder / "qwen" / "model.safetensors").read_bytes())
    assert main(["import", str(folder / config), str(qwen), str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
