"""Inductive Moment Matching through the trainer: it learns, goes on where it was cut, and draws both of two modes."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pictures

from mmgen.config import from_mapping, to_mapping
from mmgen.data.compose import ComposeConfig, compose
from mmgen.data.loader import DataConfig, Loader
from mmgen.data.pack import PackConfig, Packer
from mmgen.data.shards import write_shards
from mmgen.data.source import SourceConfig
from mmgen.model.model import Model, plan_batch
from mmgen.objectives import IMM, FlowMatching, FlowMatchingConfig, IMMConfig, Objective
from mmgen.objectives.draw import draw_state
from mmgen.objectives.path import Path as NoisePath
from mmgen.rng import keyed_numpy
from mmgen.sampling.plan import Plan
from mmgen.sampling.sampler import Sampler
from mmgen.sequence import PAD, PackedBatch, Sample
from mmgen.tokenization.text import train_text
from mmgen.training.checkpoint import latest_checkpoint
from mmgen.training.feed import Feed, feeds
from mmgen.training.losses import compute_losses, weighted
from mmgen.training.metrics import LogConfig
from mmgen.training.optim import OptimConfig
from mmgen.training.run import (
    CheckpointConfig,
    Parts,
    PreviewConfig,
    RunConfig,
    TrainConfig,
    ValidationConfig,
    build,
    load,
)
from mmgen.training.trainer import train
from tests.parts import TINY, WORDS, documents, modalities, model, rows, sample, tokenizer, weights

CPU = torch.device("cpu")


def gray(number: int, size: int) -> Pictures.Image:
    """Dark or bright, with some noise: two modes."""
    level = 40 if number % 2 else 215
    values = np.random.default_rng(number).normal(level, 8, (size, size, 3))
    return Pictures.fromarray(values.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Dark and bright pictures of two sizes with captions; the first k is coarse, so that truth enters at once."""
    folder = tmp_path_factory.mktemp("run")
    items = [Sample(f"{i}", "", sample(i).captions, gray(i, 8 if i % 3 else 4)) for i in range(30)]
    write_shards(folder / "data", items, lambda _: "train", "test", max_samples_per_shard=10)
    train_text([" ".join(WORDS)] * 20, 300, folder / "tokenizer", max_size=8)
    source = SourceConfig(str(folder / "data"))
    tasks = ComposeConfig({"text image": 0.6, "image text": 0.2, "text": 0.2})
    return RunConfig(
        run=str(folder / "unset"),
        tokenizer=str(folder / "tokenizer"),
        size=(8, 8),
        modalities={"text": {}, "image": {"codec": "pixels", "patch": 2}},
        model=TINY,
        objective=IMMConfig(k=3.0, k_final=6.0),
        data=DataConfig({"set": source}, tasks, PackConfig(2, 256, 256)),
        optim=OptimConfig(warmup_steps=2),
        train=TrainConfig(steps=10, precision="float32"),
        checkpoint=CheckpointConfig(every=5, keep_last=3),
        validation=ValidationConfig(every=5, sources={"set": source}, batches=4),
        preview=PreviewConfig(every=10, prompts=("red square",), steps=(1, 2)),
        log=LogConfig(every=1),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "workers"), [("float32", 1), ("bf16", 0)])
def test_ten_steps_equal_five_and_five_bit_for_bit(
    config: RunConfig, tmp_path: Path, precision: str, workers: int
):
    """Leftovers of the groups, their numbers and the schedule of k all go on."""
    base = replace(config, train=replace(config.train, precision=precision, workers=workers))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(replace(base, run=str(whole)))
    train(replace(base, run=str(parts)))
    for path in (parts / "checkpoints").glob("step-00000010*"):
        for file in sorted(path.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        path.rmdir()
    assert latest_checkpoint(parts / "checkpoints").name == "step-00000005"
    # made in this process or in another, it is the same
    train(replace(base, run=str(parts)), resume=True)
    expected, found = weights(whole), weights(parts)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert rows(parts) == rows(whole)


@pytest.mark.slow
def test_a_run_learns_and_draws(config: RunConfig, tmp_path: Path):
    run = tmp_path / "run"
    optim = replace(config.optim, lr=3e-3)
    fixed = replace(config, run=str(run), optim=optim, objective=IMMConfig(k=3.0))
    train(replace(fixed, train=replace(config.train, steps=60)))
    # of the same pictures, times and noise each time; a batch's own loss varies with the few times in it
    losses = [row["validation_image_loss"] for row in rows(run) if "validation_image_loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    assert all(row["image_loss"] > 0 for row in rows(run) if "image_loss" in row)
    assert (run / "previews" / "step-00000060.png").is_file()
    sampler = load(run)
    assert isinstance(sampler.objective, IMM), "the saved configuration says so"
    assert sampler.generate(["red square"]).images[0].size == (8, 8)


def test_the_fraction_of_training_reaches_the_draws_in_either_process(config: RunConfig):
    parts = build(replace(config, objective=IMMConfig(k=3.0, k_final=10.0)))
    for workers in (0, 1):
        loader = Loader(config.data, parts.modalities, 0, parts.objective.grouping)
        drawn = feeds([loader], parts.objective, 0, "runs", step=6, total_steps=8, workers=workers)
        moved = 0
        for number, (feed, _) in enumerate(islice(drawn, 4)):
            fraction = min(1.0, (6 + number) / 8)  # the last are made ahead of the end and never used
            then, begin = (
                draw_state(feed.batch, parts.modalities, parts.objective, 0, f).r for f in (fraction, 0.0)
            )
            assert torch.equal(feed.state.r, then)
            moved += int((then != begin).sum())
        assert moved > 0, "k was another when training began"


def feed_of(objective: Objective, **image: object) -> tuple[Parts, Feed]:
    """Pictures in both directions, two shapes, one batch; float64 and every parameter random."""
    parts = modalities(**image)
    net = model(**image)
    items = documents(8, **image) + documents(4, "image text", **image)
    small = ComposeConfig({"text image": 1.0})
    items += [compose(sample(i, 8), small, parts, keyed_numpy(i)) for i in range(4)]
    packer = Packer(PackConfig(4, 128, 128), parts, objective.grouping)
    assert packer.add(*items)
    batch = packer.finish()
    state = draw_state(batch, parts, objective, 0)
    return Parts(tokenizer(), parts, net, objective), Feed(batch, state, plan_batch(batch, "runs"))


def read_by(batch: PackedBatch, instance: int) -> list[int]:
    """What the instance reads, as ids."""
    assert batch.state.instance is not None
    here = (batch.state.instance == instance) & (batch.state.layout.document != PAD)
    document, rank = batch.state.layout.document[here][0], batch.state.layout.rank[here][0]
    context = batch.context
    reads = (context.layout.document == document) & (context.layout.rank < rank)
    return context.ids[reads].tolist()


@pytest.mark.parametrize("config", [IMMConfig(k=5.0), IMMConfig(k=5.0, anchors=0.5, across_contexts=0.25)])
def test_the_loss_is_the_sum_over_groups_of_what_their_tokens_bear(config: IMMConfig):
    """One group at a time, with a naive second forward, gives what the trainer gathers at once."""
    objective = IMM(config)
    parts, feed = feed_of(objective)
    found = compute_losses(parts, feed, "float64", CPU)["image"]
    batch, state = feed.batch, feed.state
    told = state.s
    outputs = parts.model(batch, state.x, state.t, told, feed.attention)[1]["image"]
    targets = parts.model(batch, state.x_r, state.r, told, feed.attention)[1]["image"]
    real = batch.state.layout.document != PAD
    total = torch.zeros((), dtype=torch.float64)
    anchors = 0
    for group in batch.instances.group.unique().tolist():
        members = (batch.instances.group == group).nonzero()[:, 0].tolist()
        members.sort(key=lambda i: int(batch.instances.particle[i]))
        here = [real & (batch.state.instance == i) for i in members]
        student, target, x_t, x_r, x, noise = (
            torch.stack([tokens[h].flatten() for h in here])[None]
            for tokens in (
                outputs,
                targets,
                state.x["image"],
                state.x_r["image"],
                batch.state.values["image"],
                state.noise["image"],
            )
        )
        t, s, r = (time[members[:1]] for time in (state.t, state.s, state.r))
        captions = [read_by(batch, member) for member in members]
        same = torch.tensor([[one == other for one in captions] for other in captions])[None]
        velocity = objective.path.target(x, noise, t)
        loss = objective.group_loss(student, target, x_t, x_r, t, s, r, velocity, same)
        anchors += bool(t == s)
        total = total + loss[0] * sum(int(h.sum()) for h in here)
    assert len(feed.state.groups) == 2, "two shapes"
    assert (0 < anchors < 4) == (config.anchors > 0)
    torch.testing.assert_close(found.total, total, rtol=1e-12, atol=0)
    assert found.count == real.sum() == 12 * 16 + 4 * 4
    (by_hand,), (gathered,) = (
        torch.autograd.grad(loss, [parts.model.heads["image"].weight], retain_graph=True)
        for loss in (total, found.total)
    )
    torch.testing.assert_close(gathered, by_hand, rtol=1e-9, atol=1e-12)


def test_the_gradient_has_flow_matchings_size_where_training_begins():
    """With G = 0, on the head's weights: so a rate, a clip and a weight against the text's loss mean the same."""
    sizes = []
    for objective in (FlowMatching(FlowMatchingConfig()), IMM(IMMConfig(k=3.0))):
        parts, feed = feed_of(objective)
        head = parts.model.heads["image"]
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.zero_()
        squares = []
        for seed in range(8):
            state = draw_state(feed.batch, parts.modalities, objective, seed)
            loss = compute_losses(parts, replace(feed, state=state), "float64", CPU)["image"].mean()
            (gradient,) = torch.autograd.grad(loss, [head.weight])
            squares.append(float(gradient.square().mean()))
        sizes.append(np.mean(squares) ** 0.5)
    assert 0.4 < sizes[1] / sizes[0] < 2.5


def test_a_batch_without_pictures_has_a_zero_loss_and_zero_gradients():
    objective = IMM(IMMConfig())
    parts, _ = feed_of(objective)
    packer = Packer(PackConfig(1, 128, 128), parts.modalities, objective.grouping)
    assert packer.add(*documents(2, "text"))
    batch = packer.finish()
    state = draw_state(batch, parts.modalities, objective, 0)
    losses = compute_losses(parts, Feed(batch, state, plan_batch(batch, "runs")), "float64", CPU)
    assert losses["image"].total == 0 and losses["image"].count == 0
    weighted(parts, losses).backward()
    gradient = parts.model.heads["image"].weight.grad
    assert gradient is not None and gradient.abs().max() == 0, "as with flow matching: there, and zero"


def test_the_objective_is_configured_by_its_name(config: RunConfig, tmp_path: Path):
    given = {"objective": {"name": "imm", "particles": 8, "k": 6, "path": {"t_min": 0.006}}}
    read = from_mapping(given, RunConfig)
    assert read.objective == IMMConfig(particles=8, k=6.0, path=NoisePath(t_min=0.006))
    assert from_mapping(to_mapping(read), RunConfig) == read
    with pytest.raises(ValueError, match=r"objective\.k: unknown key; another choice of objective has it"):
        from_mapping({"objective": {"k": 6}}, RunConfig)
    with pytest.raises(ValueError, match="expected one of flow_matching, imm"):
        from_mapping({"objective": {"name": "im"}}, RunConfig)
    unfit = replace(config, run=str(tmp_path / "run"), objective=IMMConfig(grouping="within"))
    with pytest.raises(ValueError, match=r"modalities\.image: copies 1 must be a multiple"):
        train(unfit)
    assert not (tmp_path / "run").exists(), "nothing was begun"


def train_on_two_modes(objective: Objective, steps: int) -> Sampler:
    """The real network and losses on 64 pictures of one token, all in each batch, with new groups each step."""
    parts = modalities(patch=2)
    net = Model(TINY, parts, tokenizer().vocab_size)
    packer = Packer(PackConfig(1, 256, 128), parts, objective.grouping)
    alone = ComposeConfig({"image": 1.0})
    assert packer.add(
        *(compose(Sample(f"{i}", "", picture=gray(i, 2)), alone, parts, keyed_numpy(i)) for i in range(64))
    )
    batch = packer.finish()
    attention = plan_batch(batch, "runs")
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3, betas=(0.9, 0.99), fused=True)
    built = Parts(tokenizer(), parts, net, objective)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, 2 * (1 - step / steps))
        groups = batch.instances.group + step * batch.instances.num_groups
        now = replace(batch, instances=replace(batch.instances, group=groups))
        feed = Feed(now, draw_state(now, parts, objective, 0, step / steps), attention)
        weighted(built, compute_losses(built, feed, "float32", CPU)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return Sampler(net, parts, objective, (2, 2))


def levels(sampler: Sampler, steps: int) -> np.ndarray:
    """The mean gray of 128 pictures."""
    images = sampler.generate([None] * 128, Plan(steps=steps)).images
    return np.array([np.asarray(image).mean() for image in images])


@pytest.mark.slow
def test_one_or_two_steps_draw_both_modes():
    sampler = train_on_two_modes(IMM(IMMConfig(k=6.0)), 200)
    for steps in (1, 2):
        drawn = levels(sampler, steps)
        bright, dark = drawn > 127.5, drawn < 127.5
        assert 0.25 < bright.mean() < 0.75
        assert abs(drawn[bright].mean() - 215) < 25 and abs(drawn[dark].mean() - 40) < 25
        near = np.minimum(abs(drawn - 40), abs(drawn - 215)) < 45
        assert near.mean() > 0.8


@pytest.mark.slow
def test_one_step_of_flow_matching_draws_neither():
    """The control: trained as long on the same pictures, it answers with their mean."""
    drawn = levels(train_on_two_modes(FlowMatching(FlowMatchingConfig()), 100), 1)
    assert np.minimum(abs(drawn - 40), abs(drawn - 215)).mean() > 45
