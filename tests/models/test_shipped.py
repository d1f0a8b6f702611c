"""The model that the repository ships: small enough, whole, and it draws what it is asked for."""

from pathlib import Path

import pytest
import torch

from mmgen.cli.main import main
from mmgen.evaluation.alignment import retrieves_own
from mmgen.evaluation.evaluate import encode
from mmgen.evaluation.real import SEEN, read_split, real_pictures
from mmgen.sampling.plan import Plan
from mmgen.training.run import load, load_run_config

SHIPPED = Path("models/emoji")


def test_it_has_at_most_16_megabytes():
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 16e6


@pytest.mark.slow
@pytest.mark.parametrize(("split", "least"), [(SEEN, 0.8), ("unseen_pairs", 0.5)])
def test_two_steps_draw_what_is_asked_for(split: str, least: float):
    sampler = load(SHIPPED)
    samples = read_split(load_run_config(SHIPPED).data.sources["emoji"], split, 24)
    real = real_pictures(samples, sampler.size)
    drawn = sampler.generate([each.prompt for each in real], Plan(steps=2, guidance=1.5)).latents
    assert drawn is not None
    own = retrieves_own(drawn, encode([each.picture for each in real], sampler))
    assert torch.as_tensor(own).float().mean() > least, "of 24 pictures the prompt's own is the nearest"


@pytest.mark.slow
def test_the_command_of_the_readme_draws(tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "apple.png"
    words = ["sample", str(SHIPPED), "--prompt", "a red apple, noto style", "--num", "2", "--out", str(out)]
    assert main(words) == 0
    assert out.is_file() and "4 network evaluations a picture" in capsys.readouterr().out
