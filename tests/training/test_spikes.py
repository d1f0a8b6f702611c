"""A loss comes from somewhere: its parts add up to it, and a leap is put down to its source and times."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmgen.data.pack import PackConfig, Packer
from mmgen.objectives import IMM, FlowMatching, FlowMatchingConfig, IMMConfig, Objective
from mmgen.objectives.draw import draw_state
from mmgen.training.feed import Feed
from mmgen.training.losses import Loss, compute_losses
from mmgen.training.run import Parts
from mmgen.training.spikes import NUM_TIMES, Cell, Spikes, Tally, merged, tally
from tests.parts import documents, modalities, model, tokenizer

WEIGHTS = {"text": 0.5, "image": 1.0}


def batch(objective: Objective, sources: tuple[str, ...]) -> Feed:
    packer = Packer(PackConfig(2, 256, 256), modalities(), objective.grouping)
    texts = documents(6, "text") + documents(8, "text image")
    assert packer.add(*(replace(each, source=sources[i % len(sources)]) for i, each in enumerate(texts)))
    made = packer.finish()
    return Feed(made, draw_state(made, modalities(), objective, 0), None)


def losses(objective: Objective, feed: Feed) -> dict[str, Loss]:
    parts = Parts(tokenizer(), modalities(), model(), objective)
    return compute_losses(parts, feed, "float64", torch.device("cpu"))


@pytest.mark.parametrize("objective", [IMM(IMMConfig(k=4.0)), FlowMatching(FlowMatchingConfig())])
def test_cells_add_up_to_the_losses(objective: Objective):
    feed = batch(objective, ("web", "books"))
    found = losses(objective, feed)
    cells = tally([feed], [found])
    assert {cell.source for cell in cells} == {"web", "books"}
    for name, loss in found.items():
        own = {cell: value for cell, value in cells.items() if cell.modality == name}
        assert sum(total for total, _ in own.values()) == pytest.approx(float(loss.total.detach()), rel=1e-5)
        assert sum(count for _, count in own.values()) == loss.count
    assert all((cell.time is None) == (cell.modality == "text") for cell in cells)
    # the times of the cells are those that were drawn
    drawn = {int(np.clip(t * NUM_TIMES, 0, NUM_TIMES - 1)) for t in feed.state.t.tolist()}
    assert {cell.time for cell in cells if cell.modality == "image"} == drawn
    both = merged([cells, cells])
    assert all(both[cell] == (2 * total, 2 * count) for cell, (total, count) in cells.items())


def test_of_a_source_that_is_broken_it_says_which(tmp_path: Path):
    """One source's pictures are far too bright: the loss of that source's cells is what grows."""
    objective = FlowMatching(FlowMatchingConfig())
    feed = batch(objective, ("web", "books"))
    plain = tally([feed], [losses(objective, feed)])
    packed = feed.batch
    ours = torch.tensor([source == "books" for source in packed.sources])
    here = ours[packed.state.layout.document] & (packed.state.layout.document >= 0)
    values = {"image": packed.state.values["image"] + 9.0 * here[..., None]}
    broken = replace(feed, batch=replace(packed, state=replace(packed.state, values=values)))
    changed = tally([broken], [losses(objective, broken)])
    for cell, (total, _) in changed.items():
        grew = total > plain[cell][0] * 1.5
        assert grew == (cell.modality == "image" and cell.source == "books"), cell


def steps(num: int, draw: np.random.Generator) -> list[tuple[float, Tally]]:
    """Losses that vary by 5 %, of two sources."""
    made = []
    for _ in range(num):
        web, books = 2.0 + 0.1 * draw.standard_normal(2)
        cells = {Cell("image", "web", 1): (web * 50, 50.0), Cell("image", "books", 4): (books * 50, 50.0)}
        made.append(((web + books) / 2, cells))
    return made


def test_a_leap_is_put_down_to_its_cell_and_ordinary_steps_are_none():
    draw, spikes = np.random.default_rng(0), Spikes(WEIGHTS)
    assert all(spikes.see(*each) is None for each in steps(500, draw))
    cells = {Cell("image", "web", 1): (100.0, 50.0), Cell("image", "books", 4): (400.0, 50.0)}
    spike = spikes.see(5.0, cells)
    assert spike is not None and spike.cell == Cell("image", "books", 4)
    assert spike.cell_loss == 8.0 and spike.cell_usual == pytest.approx(2.0, abs=0.1)
    assert spike.share > 0.9 and spike.usual == pytest.approx(2.0, abs=0.05)
    assert "image of source books at t 0.8 to 1" in str(spike)
    assert spikes.see(5.0, cells) is not None, "a leap is not what is usual from then on"


def test_nothing_is_a_leap_at_the_start_or_where_losses_fall():
    spikes = Spikes(WEIGHTS)
    falling = [(10.0 * 0.98**i, {Cell("text", "web"): (10.0 * 0.98**i, 1.0)}) for i in range(300)]
    assert all(spikes.see(*each) is None for each in falling)
    assert Spikes(WEIGHTS).see(1e9, {Cell("text", "web"): (1e9, 1.0)}) is None


def test_what_a_modality_adds_is_a_mean_over_its_own_tokens_with_its_weight():
    """Few tokens of text leap by a nat, a hundred times as many of pictures by a twentieth: the text is what did it."""
    text, image = Cell("text", "web"), Cell("image", "web", 1)
    spikes = Spikes(WEIGHTS)
    draw = np.random.default_rng(0)
    for _ in range(50):
        text_loss, image_loss = np.array([2.0, 0.5]) + 0.01 * draw.standard_normal(2)
        cells: Tally = {text: (100 * text_loss, 100.0), image: (10_000 * image_loss, 10_000.0)}
        assert spikes.see(0.5 * text_loss + image_loss, cells) is None
    spike = spikes.see(0.5 * 3 + 0.55, {text: (300.0, 100.0), image: (5_500.0, 10_000.0)})
    assert spike is not None and spike.cell == text
    assert spike.share == pytest.approx(0.5 / 0.55, abs=0.02)
