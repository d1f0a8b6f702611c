"""Strict configuration: what is read, what is refused, and that the message names the key and what is right."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from mmgen.config import fingerprint, from_mapping, load_yaml, parse_overrides, save_yaml, to_mapping
from mmgen.modalities import build_modalities
from mmgen.tokenization.text import outline_text_tokenizer
from mmgen.training.run import RunConfig, build


@dataclass(frozen=True)
class Optim:
    """Optimizer."""

    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    steps: int = 10

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, is {self.lr}")


@dataclass(frozen=True)
class Flow:
    name: Literal["flow"] = "flow"
    shift: float = 1.0


@dataclass(frozen=True)
class Imm:
    name: Literal["imm"] = "imm"
    particles: int = 4


@dataclass(frozen=True)
class Source:
    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Run:
    """A run."""

    optim: Optim = Optim(steps=70)
    objective: Flow | Imm = Flow()
    sources: dict[str, Source] = field(default_factory=dict)
    stages: tuple[Source, ...] = ()
    sizes: tuple[int, ...] = (64,)
    schedule: Literal["constant", "cosine"] = "constant"
    resume: bool = False
    limit: int | None = None
    ema: Optim | None = None
    title: str = ""
    either: int | str = 0


def message(mapping: dict) -> str:
    with pytest.raises(ValueError) as caught:
        from_mapping(mapping, Run)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def overridden(*argv: str, default: Run | None = None) -> Run:
    return parse_overrides(Run, default or Run(), argv)


def override_message(*argv: str) -> str:
    with pytest.raises(ValueError) as caught:
        overridden(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_yaml_numbers_are_read_by_their_annotation(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("optim: {lr: 1e-4, betas: [0, .99], steps: 1e3}\nobjective: {name: imm, particles: 8}\n")
    assert isinstance(yaml.safe_load("1e-4"), str), "the trap this guards against is gone"
    run = load_yaml(file, Run)
    assert run.optim == Optim(lr=1e-4, betas=(0.0, 0.99), steps=1000)
    assert isinstance(run.optim.steps, int) and isinstance(run.optim.betas[0], float)
    assert run.objective == Imm(particles=8)


def test_a_mapping_changes_the_fields_default_and_not_the_classs() -> None:
    assert from_mapping({"optim": {"lr": 1}}, Run).optim == Optim(lr=1.0, steps=70)


@pytest.mark.parametrize(
    ("mapping", "parts"),
    [
        ({"optim": {"lrr": 1}}, ["optim.lrr: unknown key", "did you mean optim.lr?"]),
        ({"lr": 1}, ["lr: unknown key", "did you mean optim.lr?"]),
        ({"optim": {"lr": "fast"}}, ["optim.lr: expected a number, got 'fast'"]),
        ({"optim": {"lr": True}}, ["optim.lr: expected a number, got True"]),
        ({"optim": {"steps": 1.5}}, ["optim.steps: expected a whole number, got 1.5"]),
        ({"optim": {"betas": [1]}}, ["optim.betas: expected 2 values, got 1"]),
        ({"optim": {"betas": [0.9, "x"]}}, ["optim.betas.1: expected a number, got 'x'"]),
        ({"optim": {"lr": -1}}, ["optim: lr must be above 0, is -1.0"]),
        ({"optim": 3}, ["optim: expected a mapping", "got 3"]),
        ({"objective": {"name": "imn"}}, ["objective.name: expected one of flow, imm", "did you mean 'imm'?"]),
        ({"objective": {"particles": 2}}, ["objective.particles: unknown key; another choice of objective has it"]),
        ({"sources": {"emoji": {}}}, ["sources.emoji.path: missing", "a path"]),
        ({"sources": {"emoji": {"path": "x", "weigth": 1}}}, ["did you mean sources.emoji.weight?"]),
        ({"stages": {"path": "x"}}, ["stages: expected a list of"]),
        ({"schedule": "cosin"}, ["schedule: expected one of", "did you mean 'cosine'?"]),
        ({"resume": 1}, ["resume: expected true or false, got 1"]),
        ({"title": 3}, ["title: expected text, got 3", "quotes"]),
        ({"limit": "many"}, ["limit: expected a whole number, got 'many'"]),
        ({"either": 1.5}, ["either: expected a whole number or text, got 1.5"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_what_would_be_right(mapping: dict, parts: list[str]) -> None:
    for part in parts:
        assert part in message(mapping)


def test_files_that_cannot_be_read_say_which_and_why(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("limit: 1\ntitle: a\nlimit: 2\n")
    (tmp_path / "broken.yaml").write_text("optim: {lr: 1\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "unknown.yaml").write_text("limits: 1\n")
    for name, part in {
        "twice.yaml": "line 3: the key 'limit' appears twice",
        "broken.yaml": "not valid YAML",
        "list.yaml": "expected a mapping",
        "unknown.yaml": "did you mean limit?",
        "absent.yaml": "cannot be read",
    }.items():
        with pytest.raises(ValueError) as caught:
            load_yaml(tmp_path / name, Run)
        assert str(caught.value).startswith(str(tmp_path / name))
        assert part in str(caught.value) and "\n" not in str(caught.value)


def test_saved_configuration_reads_back_equal_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    run = overridden(
        "--objective.name", "imm", "--sources.a.path", "x y", "--title", "no", "--optim.lr", "1e-9"
    )
    run = parse_overrides(Run, run, ["--ema.lr", "0.5", "--limit", "3"])
    save_yaml(run, tmp_path / "config.yaml")
    assert load_yaml(tmp_path / "config.yaml", Run) == run
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert from_mapping(to_mapping(run), Run) == run


def test_fingerprint_follows_every_value() -> None:
    assert fingerprint(Run()) == fingerprint(Run())
    changed = [Run(limit=0), Run(title="x"), Run(objective=Imm()), Run(sizes=(64, 64)), Run(ema=Optim())]
    assert len({fingerprint(run) for run in [Run(), *changed]}) == len(changed) + 1


def test_overrides_change_what_they_name_only() -> None:
    run = Run(
        sources={"a": Source(Path("x")), "b": Source(Path("y"))},
        stages=(Source(Path("s")), Source(Path("t"))),
    )
    new = overridden(
        "--optim.lr", "1e-2", "--optim.betas", "0", "0.5", "--resume", "True", "--sources.b.weight=3",
        "--stages.1.weight", "2", "--sizes", "[32,64]", "--limit", "1e3", "--either", "7", default=run,
    )  # fmt: skip
    assert new.optim == Optim(lr=0.01, betas=(0.0, 0.5), steps=70)
    assert new.sources == {"a": Source(Path("x")), "b": Source(Path("y"), 3.0)}
    assert new.stages == (Source(Path("s")), Source(Path("t"), 2.0))
    assert (new.resume, new.sizes, new.limit, new.either) == (True, (32, 64), 1000, 7)
    assert overridden("--limit", "None", default=new).limit is None
    assert overridden(default=new) == new


def test_names_that_users_gave_are_taken_as_they_are() -> None:
    run = Run(sources={"my-data v2": Source(Path("x"))})
    assert overridden("--sources.my-data v2.weight", "3", default=run).sources["my-data v2"].weight == 3


def test_overrides_choose_another_member_of_a_union() -> None:
    assert overridden("--objective.name", "imm", "--objective.particles", "2").objective == Imm(particles=2)
    assert overridden("--objective.shift", "3").objective == Flow(shift=3.0)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--optim.lrr", "1"], ["--optim.lrr: unknown key", "did you mean --optim.lr?"]),
        (["--optim.betas-", "1"], ["did you mean --optim.betas?"]),
        (["--lr", "1"], ["did you mean --optim.lr?"]),
        (["--optim.lr", "fast"], ["--optim.lr: expected a number, got 'fast'"]),
        (["--resume"], ["--resume: expected a value", "--resume True"]),
        (["--resume", "yes"], ["--resume: expected true or false, got 'yes'"]),
        (["lr=1"], ["lr=1: unexpected word"]),
        (["--limit", "1", "--limit", "2"], ["--limit: given twice"]),
        (["--optim.lr", "1", "--optim", "2"], ["--optim: given twice"]),
        (["--optim", "2", "--optim.lr", "1"], ["--optim is already given"]),
        (["--stages.0.weight", "1"], ["--stages.0: no such entry"]),
    ],
)
def test_wrong_overrides_are_refused_in_one_line(argv: list[str], parts: list[str]) -> None:
    for part in parts:
        assert part in override_message(*argv)


def test_help_lists_keys_with_defaults_and_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        overridden("--help")
    shown = capsys.readouterr().out
    assert not caught.value.code
    assert "--optim.lr" in shown and "Peak learning rate." in shown and "0.001" in shown


CONFIGS = sorted(Path("configs").glob("*.yaml"))
TO_BE_MADE = [
    path for path in CONFIGS if path.stem.startswith("t2i-")
]  # name a tokenizer and a codec that do not ship


@pytest.mark.parametrize("path", [p for p in CONFIGS if p not in TO_BE_MADE], ids=lambda path: path.stem)
def test_every_shipped_configuration_builds(path: Path):
    parts = build(load_yaml(path, RunConfig))
    assert parts.model.num_parameters() > 10_000 and "text" in parts.modalities
    assert ("image" in parts.modalities) == (path.stem != "text")


@pytest.mark.parametrize("path", TO_BE_MADE, ids=lambda path: path.stem)
def test_a_configuration_for_what_is_yet_to_be_made_says_so(path: Path):
    with pytest.raises(
        ValueError, match="no text tokenizer in tokenizers/t2i-text: .*make it as its recipe.yaml"
    ):
        build(load_yaml(path, RunConfig))
    tokenizer = outline_text_tokenizer("tokenizers/t2i-text")
    with pytest.raises(
        ValueError, match=r"tokenizers/sd-vae has no \*.safetensors .*make it as its recipe.yaml"
    ):
        build_modalities(load_yaml(path, RunConfig).modalities, tokenizer)
