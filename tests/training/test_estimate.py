"""What a training is said to take: bytes of what a real one keeps, sizes of large models, and sums done by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmgen.config import load_yaml
from mmgen.data.loader import DataConfig
from mmgen.data.pack import PackConfig, Packer
from mmgen.devices import find_device
from mmgen.modalities import Image, Text
from mmgen.modalities.base import text_positions
from mmgen.model.attention.rule import allow
from mmgen.model.joint import JointConfig
from mmgen.model.trunk import TrunkConfig
from mmgen.objectives import FlowMatchingConfig, IMMConfig
from mmgen.rng import keyed_numpy
from mmgen.sequence import Document, Layout, Span
from mmgen.training.cluster import Cluster, communication
from mmgen.training.ema import Ema
from mmgen.training.estimate import (
    computed_rows,
    count_parameters,
    dense_rows,
    estimate,
    full_rows,
    outline,
)
from mmgen.training.flops import Work
from mmgen.training.optim import OptimConfig, build_optimizer
from mmgen.training.run import Parts, RunConfig, build

H200 = find_device("h200")
ONE = Cluster(H200)
SMALL = RunConfig(
    size=(16, 16),
    modalities={"text": {}, "image": {"codec": "pixels", "patch": 4}},
    model=TrunkConfig(64, 2, 4, 2, 16, 160),
    objective=IMMConfig(),
    data=DataConfig(pack=PackConfig(2, 128, 128)),
)


def train_with(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, train=replace(config.train, **changes))


T2I = [f"configs/t2i-{size}.yaml" for size in ("300m", "1b", "7b")]


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, optim=OptimConfig(matrices="muon"), joint=JointConfig("hmm")),
        replace(SMALL, model=replace(SMALL.model, tied=False, time="add", state_ffn=True)),
        replace(SMALL, modalities={"text": {}}, objective=FlowMatchingConfig()),
    ],
)
def test_what_a_run_keeps_has_the_bytes_that_are_said(config: RunConfig) -> None:
    said = estimate(config, ONE)
    model = build(config).model
    optimizer = build_optimizer(model, config.optim)
    assert sum(said.parameters.values()) == model.num_parameters()
    assert said.memory.weights == said.memory.gradients == sum(p.nbytes for p in model.parameters())
    averages = {id(tensor): tensor.nbytes for tensor in Ema(model, 0.9).state_dict().values()}
    assert said.memory.averages == sum(averages.values())
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert said.memory.optimizer == sum(value.nbytes for value in states)
    more = replace(config, train=replace(config.train, ema_also=(0.5, 0.9)))
    assert estimate(more, ONE).memory.averages == 3 * said.memory.averages


def test_parts_of_the_parameters_are_all_of_them_and_apart() -> None:
    config = replace(SMALL, joint=JointConfig("chain"), model=replace(SMALL.model, tied=False))
    model = outline(config).model
    counts = count_parameters(model)
    assert sum(counts.values()) == model.num_parameters()
    assert counts["trunk"] == sum(p.numel() for p in model.trunk.parameters())
    assert model.joint_head is not None and model.modulation is not None and model.text_head is not None
    assert counts["joint"] == sum(p.numel() for p in model.joint_head.parameters())
    assert counts["heads"] > model.text_head.weight.numel()
    assert all(parameter.is_meta for parameter in model.parameters())


def document(parts: Parts, caption: int, number: int) -> Document:
    """Begin, so many tokens of caption, the size, and a picture of 4 x 4 tokens."""
    text, image = parts.modalities["text"], parts.modalities["image"]
    assert isinstance(text, Text) and isinstance(image, Image)
    size = image.size_span(4, 4, 1 + caption, predicted=True)
    caption_span = Span("text", text_positions(1, caption), np.full(caption, 7))
    values, draw = torch.zeros(16, image.channels), keyed_numpy(number)
    return Document(
        (text.begin(), caption_span, size, image.span(values, 4, 4, size.next_position, draw, read=False))
    )


def test_full_rows_are_those_that_a_packer_fills() -> None:
    parts = build(SMALL)
    packer = Packer(SMALL.data.pack, parts.modalities, parts.objective.grouping)
    for start in range(0, 16, 4):  # 8 pictures of 16 tokens a row, 16 tokens of context each
        assert packer.add(*(document(parts, 13, start + i) for i in range(4)))
    batch = packer.finish()
    work, pictures = full_rows(SMALL, parts)
    assert work == Work.attended(batch) and pictures == 16
    assert dense_rows(SMALL.data.pack, work) == Work.computed(batch)


def test_a_kernel_computes_what_it_visits_of_the_rows_that_a_packer_fills() -> None:
    """Flex the tiles of 128 in which the real batch has a pair, segments its pairs; neither holds a mask."""
    pack = PackConfig(1, 256, 256)
    config = replace(SMALL, data=DataConfig(pack=pack))
    parts = build(config)
    packer = Packer(pack, parts.modalities, parts.objective.grouping)
    for start in range(0, 16, 4):
        assert packer.add(*(document(parts, 13, start + i) for i in range(4)))
    batch = packer.finish()
    context, state = batch.context.layout, batch.state.layout
    work, pictures = full_rows(config, parts)
    by_tiles, by_pairs = (computed_rows(pack, work, pictures, each) for each in ("flex", "varlen"))
    for found, keys, queries in (
        (by_tiles.context_pairs, context, context),
        (by_tiles.state_pairs, Layout.concat([context, state]), state),
    ):
        tiles = allow(queries, keys).unflatten(1, (-1, 128)).unflatten(3, (-1, 128)).any(4).any(2)
        assert found == tiles.sum() * 128**2 < queries.shape[1] * keys.shape[1]
    attended = Work.attended(batch)
    assert (by_pairs.context_pairs, by_pairs.state_pairs) == (attended.context_pairs, attended.state_pairs)
    dense, flex, auto = (
        estimate(train_with(load_yaml(T2I[1], RunConfig), attention=each), ONE)
        for each in ("dense", "flex", "auto")
    )
    assert auto == flex, "what a GPU is given"
    assert flex.memory.masks == 0 < dense.memory.masks and flex.memory.target <= dense.memory.target
    assert flex.attended.total < flex.computed.total < dense.computed.total


def test_a_model_of_text_alone_has_no_pictures_and_room_is_needed_for_one() -> None:
    text = replace(SMALL, modalities={"text": {}}, objective=FlowMatchingConfig())
    work, pictures = full_rows(text, build(text))
    assert pictures == work.state == 0 and work.context_pairs == 2 * 128 * 129 / 2
    with pytest.raises(ValueError, match="64x64 pixels takes 256 state tokens; data.pack.state_length 128"):
        estimate(replace(SMALL, size=(64, 64)), ONE)


@pytest.mark.parametrize(
    ("path", "low", "high"), [(T2I[0], 0.28e9, 0.32e9), (T2I[1], 0.95e9, 1.05e9), (T2I[2], 6.7e9, 7.3e9)]
)
def test_the_large_configurations_have_the_size_of_their_names_and_cost_6_n_d(
    path: str, low: float, high: float
) -> None:
    config = load_yaml(path, RunConfig)
    said = estimate(config, Cluster(H200, 64))
    assert low < sum(said.parameters.values()) < high
    trunk = said.parameters["trunk"]
    products = 6 * trunk * said.tokens.total + 2 * trunk * said.tokens.state  # and the target pass
    assert 1 < said.attended.total / products < 1.1
    assert said.attended.total < said.computed.total < 1.3 * products
    assert said.time.compute == pytest.approx(said.computed.total / 64 / (0.45 * 989.4e12))
    assert said.time.mfu < 0.45 and said.memory.total < H200.memory
    assert said.tokens.pictures % 4096 == 0, "what k = 12 belongs to"


def test_time_follows_from_operations_bandwidth_and_tokens() -> None:
    config = load_yaml(T2I[1], RunConfig)
    said = estimate(config, Cluster(H200, 64))
    assert said.time.steps == config.train.steps
    longer = estimate(config, Cluster(H200, 64), tokens=2 * config.train.steps * said.tokens.total)
    assert longer.time.days == pytest.approx(2 * said.time.days)
    assert said.time.gpu_hours == pytest.approx(64 * 24 * said.time.days)
    faster = estimate(config, Cluster(H200, 64, utilization=0.9))
    assert faster.time.compute == pytest.approx(said.time.compute / 2)
    # over a network slow enough the products wait
    slow = estimate(config, Cluster(H200, 64, network=1e9))
    assert slow.time.step == slow.time.communication + slow.time.update > 2 * said.time.step
    assert slow.time.mfu < said.time.mfu / 2
    again = estimate(train_with(config, checkpointing="full"), Cluster(H200, 64))
    assert again.time.compute == pytest.approx(
        said.time.compute * (1 + again.recomputed / said.computed.total)
    )
    assert again.time.mfu < said.time.mfu
    assert again.memory.activations < 0.2 * said.memory.activations
    kept = estimate(train_with(config, checkpointing="selective"), Cluster(H200, 64))
    assert kept.recomputed == 0
    assert again.memory.total < kept.memory.total < said.memory.total


def test_what_is_held_is_cut_by_the_shards_and_not_by_the_replicas() -> None:
    config = load_yaml(T2I[1], RunConfig)
    whole, halves, copies = (estimate(config, Cluster(H200, 8, shards)).memory for shards in (1, 8, 2))
    for name in ("weights", "gradients", "optimizer", "averages"):
        assert getattr(whole, name) == 8 * getattr(halves, name) == 2 * getattr(copies, name)
    assert whole.activations == halves.activations
    muon = replace(config, optim=replace(config.optim, matrices="muon"))
    assert estimate(muon, ONE).memory.optimizer < 0.65 * estimate(config, ONE).memory.optimizer
    one, eight = estimate(muon, ONE), estimate(muon, Cluster(H200, 8))
    assert one.muon == eight.muon > 0 and eight.communication.muon_gather > 0 == one.communication.total


def test_bytes_on_the_way_are_those_of_a_sum_by_hand() -> None:
    """1,000 parameters in blocks and 100 others over 8 GPUs, two packed batches a GPU."""
    sent = communication(Cluster(H200, 8), 1000, 100, 2)
    assert sent.all_gather == 7 / 8 * 2 * (2 * 2 * 1000 + 4 * 100)
    assert sent.reduce_scatter == 7 / 8 * 2 * 4 * 1100
    assert sent.all_reduce == 0 and sent.seconds == sent.total / 450e9
    # two groups of four: a ring of four, and half of 4 * 1100 / 4 bytes each way between the two
    sent = communication(Cluster(H200, 8, 4), 1000, 100, 1, muon_parameters=400)
    assert sent.all_gather == 3 / 4 * (2 * 2 * 1000 + 4 * 100)
    assert sent.all_reduce == 2 * 1 / 2 * 4 * 1100 / 4
    assert sent.muon_gather == 3 / 4 * (4 + 2) * 400 / 4
    assert sent.total == sent.all_gather + sent.reduce_scatter + sent.all_reduce + sent.muon_gather
    assert communication(ONE, 1000, 100, 4, 400).total == 0 == communication(ONE, 1000, 100, 4).seconds


def test_what_crosses_nodes_takes_the_network() -> None:
    within = communication(Cluster(H200, 8), 10**9, 0, 1)
    across = communication(Cluster(H200, 16, network=10e9), 10**9, 0, 1)
    # each of two nodes needs the half that the other holds, over eight adapters
    total = across.total * 16 / 15
    assert across.seconds == pytest.approx(total / 2 / (8 * 10e9)) and across.seconds > 3 * within.seconds
    hybrid = communication(Cluster(H200, 16, 8, network=10e9), 10**9, 0, 1)
    assert hybrid.seconds == pytest.approx(within.total / 450e9 + hybrid.all_reduce / 10e9)
    plain = communication(Cluster(H200, 16, 1, network=10e9), 10**9, 0, 1)
    assert plain.all_gather == plain.reduce_scatter == 0
    assert plain.seconds == pytest.approx(4e9 / (8 * 10e9)), "one sum a node crosses, over all its adapters"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 0}, "gpus 0 must be at least 1"),
        ({"gpus": 8, "shards": 3}, "shards 3 must divide gpus 8"),
        ({"utilization": 1.5}, "mfu 1.5 must be above 0 and at most 1"),
        ({"network": 0.0}, "network 0.0 must be above 0"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cluster(H200, **options)


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="train.micro_batches 12 must be a multiple of the 8 ranks"):
        estimate(train_with(SMALL, micro_batches=12), Cluster(H200, 8))
    with pytest.raises(
        ValueError, match=r"data.streams 1 must be a multiple of 16 \(8 ranks x train.workers 2\)"
    ):
        estimate(train_with(SMALL, micro_batches=8, workers=2), Cluster(H200, 8))
    with pytest.raises(ValueError, match="tokens 0 must be above 0"):
        estimate(SMALL, ONE, tokens=0)
    with pytest.raises(ValueError, match="train.precision float32: .* --train.precision bf16"):
        estimate(replace(SMALL, train=replace(SMALL.train, precision="float32")), ONE)
    with pytest.raises(ValueError, match="nowhere/config.json cannot be read"):
        estimate(replace(SMALL, modalities={"text": {}, "image": {"codec": "nowhere"}}), ONE)


def test_an_autoencoder_outline_has_the_sizes_of_the_real_one(tmp_path: Path) -> None:
    """Of the shipped codec, opened and not; and of the architecture that the large configurations name."""
    diffusers = pytest.importorskip("diffusers")
    image = {"codec": "tokenizers/emoji-latents", "patch": 2}
    config = replace(SMALL, size=(64, 64), modalities={"text": {}, "image": image})
    opened, outlined = build(config), outline(config)
    shown = outlined.modalities["image"]
    assert shown.channels == opened.modalities["image"].channels == 32
    assert isinstance(shown, Image) and shown.token_grid(64, 64) == (4, 4)
    with pytest.raises(ValueError, match="outline, which encodes nothing"):
        shown.codec.encode(torch.zeros(1, 3, 64, 64))
    settings = diffusers.AutoencoderKL.load_config("tokenizers/sd-vae")
    with torch.device("meta"):
        network = diffusers.AutoencoderKL.from_config(settings)
    assert sum(p.numel() for p in network.parameters()) == 83_653_863, "as published"
    assert network.config["latent_channels"] == 4
