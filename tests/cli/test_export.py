"""`mmgen export`: what it writes is a run that draws the same, in fewer bytes."""

from pathlib import Path

import pytest
import torch

from mmgen.cli.main import main
from mmgen.training.run import load


@pytest.mark.parametrize(("dtype", "far"), [("float32", 0.0), ("bfloat16", 0.1)])
def test_an_exported_run_draws_the_same(run: Path, tmp_path: Path, dtype: str, far: float):
    out = tmp_path / "shipped"
    assert main(["export", str(run), str(out), "--dtype", dtype]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "config.yaml", "metrics.jsonl"]
    one, other = (load(folder).generate(["red square"], seed=1).latents for folder in (run, out))
    assert one is not None and other is not None
    assert (one - other).abs().max() <= far
    assert main(["sample", str(out), "--prompt", "red", "--out", str(tmp_path / "red.png")]) == 0


def test_bfloat16_takes_half_the_bytes(run: Path, tmp_path: Path):
    sizes = []
    for dtype in ("float32", "bfloat16"):
        main(["export", str(run), str(tmp_path / dtype), "--dtype", dtype])
        (weights,) = (tmp_path / dtype).rglob("*.safetensors")
        sizes.append(weights.stat().st_size)
    assert 0.5 < sizes[1] / sizes[0] < 0.6
    weights = load(tmp_path / "bfloat16").model.state_dict().values()
    assert all(w.dtype == torch.float32 for w in weights), "computed with as before"


def test_nothing_is_replaced_and_what_cannot_train_says_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    (tmp_path / "there").mkdir()
    assert main(["export", str(run), str(tmp_path / "there")]) == 2
    assert "exists: name a folder that does not" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    main(["export", str(run), str(tmp_path / "out")])
    capsys.readouterr()
    assert main(["train", str(tmp_path / "out" / "config.yaml"), "--resume"]) == 2
    assert "has no section 'model'" in capsys.readouterr().err
