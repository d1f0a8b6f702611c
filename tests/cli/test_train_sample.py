"""The commands as a user types them: train, resume, sample, describe; and every mistake is one line and exit code 2."""

from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from mmgen.cli.main import main
from mmgen.data.shards import write_shards
from mmgen.tokenization.text import train_text
from tests.parts import WORDS, picture, sample


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained by the command for 4 steps, then resumed to 8."""
    folder = tmp_path_factory.mktemp("cli")
    write_shards(folder / "data", [sample(i) for i in range(20)], lambda _: "train", "test")
    train_text([" ".join(WORDS)] * 20, 300, folder / "tokenizer", max_size=8)
    config = {
        "run": str(folder / "run"),
        "tokenizer": str(folder / "tokenizer"),
        "size": [16, 16],
        "modalities": {"text": {}, "image": {"codec": "pixels", "patch": 4}},
        "model": {
            "width": 32,
            "num_layers": 2,
            "num_heads": 2,
            "num_kv_heads": 2,
            "head_dim": 8,
            "ffn_width": 48,
        },
        "data": {
            "sources": {"set": {"path": str(folder / "data")}},
            "pack": {"rows": 2, "context_length": 128, "state_length": 128},
        },
        "train": {"steps": 8, "workers": 0},
        "log": {"every": 2},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(folder / "run.yaml"), "--train.steps", "4"]) == 0
    assert main(["train", str(folder / "run.yaml"), "--resume"]) == 0
    return folder / "run"


def test_overrides_are_saved_with_the_run(run: Path, tmp_path: Path):
    config = run.parent / "run.yaml"
    assert (
        main(
            [
                "train",
                str(config),
                "--run",
                str(tmp_path / "other"),
                "--optim.lr",
                "5e-4",
                "--train.steps",
                "1",
                "--modalities.image.context_noise",
                "0.1",
            ]
        )
        == 0
    )
    saved = yaml.safe_load((tmp_path / "other" / "config.yaml").read_text())
    assert saved["optim"]["lr"] == 5e-4
    assert saved["modalities"]["image"]["context_noise"] == 0.1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim.lrr", "1"], "optim.lr"),
        (["--optim.lr", "fast"], "optim.lr"),
        (["--modalities.image.ptach", "2", "--run", "unused"], "patch"),
        (["--model.num_kv_heads", "3"], "does not divide"),
        ([], "already holds a run"),
    ],
)
def test_mistakes_in_training_are_one_line(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture
):
    assert main(["train", str(run.parent / "run.yaml"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("unused").exists()


def test_a_prompt_gives_one_grid(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "apple.png"
    words = [
        "--prompt",
        "red square",
        "--steps",
        "2",
        "--guidance",
        "2",
        "--num",
        "3",
        "--seed",
        "1",
        "--out",
        str(out),
    ]
    assert main(["sample", str(run), *words]) == 0
    assert Image.open(out).width > 3 * 32
    said = capsys.readouterr().out
    assert "4 network evaluations" in said and "FLOP" in said and str(out) in said


def test_a_file_of_prompts_gives_a_picture_a_line(run: Path, tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("red square\n\nblue circle\n")
    words = ["--prompts", str(tmp_path / "prompts.txt"), "--steps", "1", "--out", str(tmp_path / "pictures")]
    assert main(["sample", str(run), *words]) == 0
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["00000.png", "00001.png"]
    assert Image.open(tmp_path / "pictures" / "00001.png").size == (16, 16)
    assert main(["sample", str(run), *words[:-1], str(tmp_path / "grid.png")]) == 0


def test_a_picture_is_described_and_a_text_continued(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    picture(3).save(tmp_path / "picture.png")
    assert main(["sample", str(run), "--caption", str(tmp_path / "picture.png"), "--max-tokens", "5"]) == 0
    assert main(["sample", str(run), "--text", "red", "--max-tokens", "5", "--num", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 4


def test_parts_are_given_and_asked_for_in_any_order(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    picture(3).save(tmp_path / "picture.png")
    given = ["--given", str(tmp_path / "picture.png"), "red square", "--ask", "image", "text"]
    few = ["--max-tokens", "5", "--steps", "1", "--thinking", "3", "--candidates", "2"]
    assert main(["sample", str(run), *given, *few, "--out", str(tmp_path / "one.png")]) == 0
    said = capsys.readouterr().out
    assert "thought: " in said and "1 pictures" in said and "4 network evaluations" in said
    assert Image.open(tmp_path / "one.png").width > 2 * 32, "the given picture stands before the drawn one"
    words = [*given, *few, "--stream", "--blocks", "2", "--candidates", "1"]
    assert main(["sample", str(run), *words, "--out", str(tmp_path / "pictures")]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["thought:", "block", "block"]
    assert "block 1 of 2 after" in said and "block 2 of 2 after" in said
    assert lines[-1].startswith("cost:") and said.count("thought:") == 1
    assert Image.open(tmp_path / "pictures" / "00000.png").size == (16, 16)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of --prompt"),
        (["--prompt", "a", "--num", "2", "--stream"], "--stream shows one answer, and 2 are asked for"),
        (["--prompt", "a", "--stream", "--candidates", "2"], "and --candidates 2 may make several"),
        (["--prompt", "a", "--stream", "--budget", "9nfe", "--adaptive"], "and --adaptive may make several"),
        (["--prompt", "a", "--ask", "text"], "--ask says what follows --given; --prompt has one kind"),
        pytest.param(
            ["--prompt", "a", "--graphs"],
            "--graphs needs a CUDA device, and there is none here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        (["--prompt", "a", "--guidance", "nan"], "guidance nan must be a finite number"),
        (["--given", "a", "--ask", "text", "text"], "two texts in turn are one"),
        (["--given", "nowhere.png"], "--given nowhere.png cannot be opened"),
        (["--prompt", "a", "--scorer", "best"], "scorer 'best' is none of likelihood"),
        (["--prompt", "a", "--text", "b"], "given: --prompt, --text"),
        (["--prompt", "a", "--steps", "0"], "steps 0"),
        (["--prompt", "a", "--size", "15", "16"], "multiples of 4"),
        (["--prompt", "a", "--size", "16", "48"], "no size token"),
        (["--prompt", "a", "--out", "a.jpg"], ".png"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--caption", "nowhere.png"], "nowhere.png"),
        (["--prompt", "a", "--weights", "best"], "best"),
        (["--prompt", "a", "--num", "0"], "--num 0"),
        (["--prompt", "a", "--stepz", "3"], "--steps"),
    ],
)
def test_mistakes_in_sampling_are_one_line(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture
):
    assert main(["sample", str(run), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["sample", str(tmp_path), "--prompt", "a"]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert main(["train", str(tmp_path / "nowhere.yaml")]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
