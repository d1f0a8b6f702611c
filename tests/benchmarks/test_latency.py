"""The benchmark of single tokens and steps: slopes of what it times, and the bytes that its floor is made of."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import latency
from mmgen.config import load_yaml
from mmgen.sampling.sampler import Sampler
from mmgen.training.run import RunConfig


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_yaml(Path("configs/smoke.yaml"), RunConfig)


def test_a_slope_is_what_one_more_takes():
    start = np.array([3.0, 5.0, 4.0, 9.0])
    found = latency.slope(np.stack([start, start + 8 * 0.25], 1), 8, 0)
    assert (found.value, found.low, found.high, found.num) == (0.25, 0.25, 0.25, 4)
    noisy = latency.slope(np.stack([start, start + np.arange(1.0, 5.0) ** 2], 1), 1, 0)
    assert noisy.value == 6.5 and noisy.low < 6.5 < noisy.high


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_what_is_read_is_what_a_token_or_a_step_passes(config: RunConfig, precision: str):
    sampler = latency.random_sampler(config, precision, graphs=False, seed=0)  # pyright: ignore[reportArgumentType]
    texts, pictures = latency.pairs(sampler, latency.Arguments(texts=(2, 4), steps=(1, 2), guidance=(2.0,)))
    sizes = {name: each.nbytes for name, each in sampler.model.named_parameters()}
    shared = sum(num for name, num in sizes.items() if name.startswith("trunk."))
    table = sizes["text_embedding.weight"]
    assert sampler.model.text_head is None, "tied: the embedding is the head"
    written, drawn = (pair[1].run().cost for pair in (texts, pictures))
    assert latency.bytes_read(texts[1], written) == shared + table + written.memory
    rest = sum(sizes.values()) - shared - table
    assert latency.bytes_read(pictures[1], drawn) == shared + rest + drawn.memory


def test_no_file_of_a_configuration_is_needed(config: RunConfig):
    nowhere = replace(load_yaml(Path("configs/t2i-300m.yaml"), RunConfig), model=config.model)
    sampler: Sampler = latency.random_sampler(nowhere, "float32", graphs=False, seed=0)
    assert sampler.text.tokenizer.vocab_size > 30_000 and sampler.image.token_grid(*sampler.size) == (16, 16)
    for few, many in latency.pairs(sampler, latency.Arguments(texts=(2, 5), steps=(1, 3), guidance=(1.0,))):
        assert latency.size(many, many.run().cost) > latency.size(few, few.run().cost)


@pytest.mark.parametrize("wrong", [{"texts": (4, 4)}, {"steps": (0, 2)}, {"repeats": 1}])
def test_what_it_cannot_measure_is_refused(wrong: dict):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        latency.Arguments(**wrong)
