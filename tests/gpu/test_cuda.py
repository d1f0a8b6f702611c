"""The same numbers on a GPU as on the CPU: loss, gradients, a step of each optimizer, and what is drawn."""

import copy
from dataclasses import replace

import pytest
import torch

from mmgen.data.pack import PackConfig, Packer
from mmgen.model.attention import AttentionBackend
from mmgen.model.model import plan_batch
from mmgen.model.precision import float32_products
from mmgen.model.vocabulary import Vocabulary
from mmgen.objectives import IMM, FlowMatching, FlowMatchingConfig, IMMConfig, Objective
from mmgen.objectives.draw import draw_state
from mmgen.sampling.plan import Plan
from mmgen.sampling.sampler import Sampler
from mmgen.training.feed import Feed
from mmgen.training.losses import compute_losses, weighted
from mmgen.training.optim import OptimConfig, build_optimizer
from mmgen.training.run import Parts
from tests.parts import documents, modalities, model, tokenizer

pytestmark = pytest.mark.gpu


def parts_and_feed(objective: Objective, backend: AttentionBackend) -> tuple[Parts, Feed]:
    """Pictures in both directions, in float64."""
    packer = Packer(PackConfig(2, 384, 384), modalities(), objective.grouping)
    assert packer.add(*documents(8), *documents(4, "image text"))
    batch = packer.finish()
    state = draw_state(batch, modalities(), objective, 0)
    feed = Feed(batch, state, plan_batch(batch, backend))
    return Parts(tokenizer(), modalities(), model(), objective), feed


@pytest.mark.parametrize("backend", ["dense", "runs"])
@pytest.mark.parametrize("objective", [IMM(IMMConfig(k=4.0)), FlowMatching(FlowMatchingConfig())])
@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_a_step_is_the_cpus(backend: AttentionBackend, objective: Objective, matrices: str):
    parts, feed = parts_and_feed(objective, backend)
    beside = replace(parts, model=copy.deepcopy(parts.model).cuda())
    after = []
    for each, device in ((parts, "cpu"), (beside, "cuda")):
        optimizer = build_optimizer(each.model, OptimConfig(matrices=matrices))
        loss = weighted(each, compute_losses(each, feed, "float64", torch.device(device)))
        loss.backward()
        gradients = [p.grad.cpu().clone() for p in each.model.parameters() if p.grad is not None]
        optimizer.step()
        after.append((loss.detach().cpu(), gradients, [p.detach().cpu() for p in each.model.parameters()]))
    (loss, gradients, weights), (other, other_gradients, other_weights) = after
    torch.testing.assert_close(loss, other, rtol=1e-6, atol=0)  # the heads' and losses' float32 is in it
    assert len(gradients) == len(other_gradients)
    for one, two in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)
    # Muon's orthogonalization is in bfloat16, and AdamW's first step is the gradient's sign
    far = [((a - b).abs() > 2e-4).double().mean().item() for a, b in zip(weights, other_weights, strict=True)]
    assert max(far) < 0.05


@pytest.mark.parametrize("prompts", [["a red square", "the blue circle on white"]])
def test_pictures_and_texts_are_the_cpus(prompts: list[str]):
    objective = IMM(IMMConfig())
    cpu = Sampler(model(), modalities(), objective, (16, 16), Plan(steps=2, guidance=2.0, blocks=2))
    gpu = Sampler(model().cuda(), modalities(), objective, (16, 16), cpu.plan)
    one, other = (sampler.generate(prompts, seed=3).latents for sampler in (cpu, gpu))
    assert one is not None and other is not None
    torch.testing.assert_close(one, other.cpu(), rtol=1e-4, atol=1e-5)
    greedy = Plan(temperature=0.0, max_tokens=8)
    assert cpu.complete(prompts, greedy).text == gpu.complete(prompts, greedy).text


def test_a_vocabulary_of_tf32_is_near_the_exact_one():
    hidden, weight = torch.randn(64, 512, device="cuda"), torch.randn(4096, 512, device="cuda") / 512**0.5
    vocabulary = Vocabulary(lambda ids: weight[ids], weight)
    tokens = torch.arange(64, device="cuda")
    exact = vocabulary.log_prob(hidden, tokens)
    with float32_products("high"):
        found = vocabulary.log_prob(hidden, tokens)
    assert not torch.equal(found, exact), "the switch does nothing here"
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=5e-3)
