"""What a run will take, said from its configuration alone: parameters, operations, memory, communication and time.

The model is built on torch's meta device, so that 7B parameters cost nothing; data sets, codecs and tokenizers are not
opened. Operations are equal to torch's count of a real step and memory is near what a real step saves (the tests hold
both); seconds follow from datasheets and from a utilization that is assumed.
"""

from dataclasses import dataclass, replace

import torch

from mmgen.data.pack import PackConfig
from mmgen.modalities import Image, build_modalities
from mmgen.model.attention import AttentionBackend
from mmgen.model.attention.choose import preferred
from mmgen.model.attention.flex import TILE, find_tiles
from mmgen.model.model import Model
from mmgen.objectives import build_objective, check_modalities
from mmgen.sampling.predict import ModelFacts
from mmgen.sequence import PAD, Layout
from mmgen.tokenization.text import outline_text_tokenizer
from mmgen.training.cluster import GATHERED, SUMMED, Cluster, Communication, communication
from mmgen.training.feed import Part
from mmgen.training.flops import StepFlops, Work, muon_flops, recomputed_flops, step_flops
from mmgen.training.memory import (
    logits_gradient_bytes,
    mask_pairs,
    saved_bytes,
    target_bytes,
    working_bytes,
)
from mmgen.training.optim import build_optimizer
from mmgen.training.run import Parts, RunConfig

MARGIN = 0.1  # of everything else: fragments of the allocator, and buffers of kernels
CONTEXT_BYTES = 1e9  # of CUDA's context and the communication library's buffers
PARTS = {
    "trunk": ("trunk.",),
    "embeddings": ("text_embedding.", "embeddings."),
    "heads": ("text_head.", "heads.", "state_norm."),
    "time": ("time_embedding.", "modulation."),
    "joint": ("joint_head.",),
}


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the fullest moment of a step. Parts that are not alive together are added all the same."""

    weights: float
    gathered: float
    """whole weights and gradients of the blocks at hand; without shards, what autocast narrowed"""
    gradients: float
    optimizer: float
    averages: float
    activations: float
    masks: float
    """of dense attention: a byte a pair, and as numbers in every layer that keeps them; others have none"""
    logits: float
    """log-probabilities and, in the backward pass, their gradients"""
    target: float
    """what the target pass of one block needs"""
    working: float
    """gradients of activations, and a block's activations where they are recomputed"""
    margin: float

    @property
    def total(self) -> float:
        return self.margin + sum(
            getattr(self, name) for name in self.__dataclass_fields__ if name != "margin"
        )


@dataclass(frozen=True)
class Tokens:
    """Of one optimizer step over all GPUs, padding included. A step's tokens are those of both streams."""

    context: int
    state: int
    pictures: int
    """that full rows hold, of the size that is asked for; 0 for a model of text alone"""

    @property
    def total(self) -> int:
        return self.context + self.state


@dataclass(frozen=True)
class Time:
    """Seconds of an optimizer step, and what so many of them take."""

    compute: float
    """products at the assumed share of the peak"""
    communication: float
    """at datasheet bandwidths; taken to run beside the products"""
    update: float
    """weights, gradients, states and averages through memory once"""
    mfu: float
    """operations of attended pairs, none counted twice, over those that the peak allows in `step`"""
    steps: float
    gpus: int

    @property
    def step(self) -> float:
        return max(self.compute, self.communication) + self.update

    @property
    def days(self) -> float:
        return self.steps * self.step / 86_400

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.steps * self.step / 3600


@dataclass(frozen=True)
class Estimate:
    attention: AttentionBackend
    parameters: dict[str, int]
    tokens: Tokens
    attended: StepFlops
    """of an optimizer step over all GPUs: real tokens and the pairs that the mask rule allows, in full rows"""
    computed: StepFlops
    """the same with padding, and the pairs that the attention's kernel computes"""
    recomputed: float
    """operations that checkpointing adds"""
    muon: float
    """operations of Newton-Schulz iterations, over one shard group"""
    memory: Memory
    communication: Communication
    time: Time
    batches: int
    """packed batches a GPU takes for each optimizer step"""


def outline(config: RunConfig) -> Parts:
    """The parts of a run with weights on the meta device, and tokenizer and codecs of which only the sizes are known.

    Raises ValueError where the configuration does not fit together or sizes are not to be had.
    """
    tokenizer = outline_text_tokenizer(config.tokenizer)
    modalities = build_modalities(config.modalities, tokenizer, outline=True)
    objective = build_objective(config.objective)
    check_modalities(objective, modalities)
    with torch.device("meta"):
        model = Model(config.model, modalities, tokenizer.vocab_size, config.joint)
    dtype = torch.float64 if config.train.precision == "float64" else torch.float32
    return Parts(tokenizer, modalities, model.to(dtype), objective, config.joint)


def estimate(
    config: RunConfig,
    cluster: Cluster,
    tokens: float | None = None,
) -> Estimate:
    """What training `config` takes on `cluster`.

    `tokens`, of both streams, are to be trained on; None: `train.steps` steps. Raises ValueError where the ranks cannot
    share the configuration's batches, and for a precision of which no peak is known.
    """
    if config.train.precision != "bf16":
        raise ValueError(
            f"train.precision {config.train.precision}: the peaks known are of bfloat16; "
            "estimate with --train.precision bf16"
        )
    checkpointing, micro_batches = config.train.checkpointing, config.train.micro_batches
    part = Part(micro_batches, 0, cluster.gpus)
    part.check_streams(config.data.streams, config.train.workers)
    if tokens is not None and not tokens > 0:
        raise ValueError(f"tokens {tokens:g} must be above 0")
    parts = outline(config)
    facts = ModelFacts.of(parts.model, parts.modalities, parts.objective)
    pack, target = config.data.pack, parts.objective.needs_target
    attended, pictures = full_rows(config, parts)
    attention = config.train.attention
    if attention == "auto":
        attention = preferred("cuda", config.model.head_dim, config.train.precision).backend
    computed = computed_rows(pack, attended, pictures, attention)
    flops = step_flops(facts, computed.times(micro_batches), target)
    again = recomputed_flops(facts, computed.times(micro_batches)) if checkpointing == "full" else 0.0
    optimizer = build_optimizer(parts.model, config.optim)
    matrices = [
        p
        for part in optimizer.parts
        if isinstance(part, torch.optim.Muon)
        for group in part.param_groups
        for p in group["params"]
    ]
    muon = muon_flops((p.shape[0], p.shape[1]) for p in matrices)
    states = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    counts = count_parameters(parts.model)
    in_blocks = sum(p.numel() for p in parts.model.trunk.layers.parameters())
    others = sum(counts.values()) - in_blocks
    sent = communication(cluster, in_blocks, others, part.num_own, sum(p.numel() for p in matrices))
    masked = attention == "dense"
    memory = _memory(config, parts, cluster, facts, attended, states, in_blocks, masked)
    made = step_flops(facts, attended.times(micro_batches), target)
    num_tokens = Tokens(
        micro_batches * pack.rows * pack.context_length,
        micro_batches * pack.rows * pack.state_length,
        micro_batches * pictures,
    )
    rate = cluster.device.peak * cluster.utilization
    compute = (flops.total + again) / cluster.gpus / rate + muon / cluster.group / rate
    # weights are read and written, gradients read twice (the norm comes first); so are states and averages
    moved = 2 * memory.weights + 2 * memory.gradients + 2 * memory.optimizer + 2 * memory.averages
    update = moved / cluster.device.memory_bandwidth
    step = max(compute, sent.seconds) + update
    steps = config.train.steps if tokens is None else tokens / num_tokens.total
    mfu = made.total / (cluster.gpus * cluster.device.peak * step)
    time = Time(compute, sent.seconds, update, mfu, steps, cluster.gpus)
    return Estimate(attention, counts, num_tokens, made, flops, again, muon, memory, sent, time, part.num_own)


def count_parameters(model: Model) -> dict[str, int]:
    """Numbers in the weights by part; parts that the model lacks are left out."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        part = next(part for part, prefixes in PARTS.items() if name.startswith(prefixes))
        counts[part] += parameter.numel()
    return {part: count for part, count in counts.items() if count}


def full_rows(config: RunConfig, parts: Parts) -> tuple[Work, int]:
    """One packed batch whose rows are full of captions with a picture of `config.size`, and how many pictures it has.

    All that is left of a row's context is captions, of one length; a model without pictures has one text a row. Raises
    ValueError where a row has no room for a picture.
    """
    pack = config.data.pack
    image = next((each for each in parts.modalities.values() if isinstance(each, Image)), None)
    share = 0.0 if parts.joint is None else parts.joint.share
    documents, block, copies = 1, pack.state_length, 1
    if image is not None:
        rows, columns = image.token_grid(*config.size)
        block, copies = rows * columns, image.copies
        documents = pack.state_length // (block * copies)
        if not documents:
            raise ValueError(
                f"a picture of {config.size[0]}x{config.size[1]} pixels takes {block * copies} state tokens; "
                f"data.pack.state_length {pack.state_length} has no room for one"
            )
    if not parts.model.heads:
        documents, copies = 1, 0
    length = pack.context_length / documents
    labels = pack.rows * (pack.context_length - documents)  # all but what begins a document
    instances = pack.rows * documents * copies
    work = Work(
        context=pack.rows * pack.context_length,
        state=instances * block,
        context_pairs=pack.rows * documents * length * (length + 1) / 2,
        state_pairs=instances * block * (length + block),
        instances=max(instances, 1),
        labels=labels,
        windows=share * labels,
    )
    return work, pack.rows * documents if image is not None else 0


def dense_rows(pack: PackConfig, work: Work) -> Work:
    """The same batch as `dense` attention computes it: padding and whole rectangles of pairs too."""
    context, state = pack.rows * pack.context_length, pack.rows * pack.state_length
    pairs = context * pack.context_length, state * (pack.context_length + pack.state_length)
    return Work(context, state, *pairs, work.instances, work.labels, work.windows)


def computed_rows(pack: PackConfig, work: Work, pictures: int, attention: AttentionBackend) -> Work:
    """The batch of `full_rows` as a kernel computes it: all tokens, and whole rectangles of pairs, or the tiles of
    them in which a pair is allowed, or (by segments) the pairs that are. For `runs` the rectangles are a bound.
    """
    computed = dense_rows(pack, work)
    if attention in ("dense", "runs"):
        return computed
    if attention == "flex":
        context, state = _full_row(pack, work, pictures)
        tiles = (find_tiles(context, context)[0], find_tiles(state, Layout.concat([context, state]))[0])
        pairs = (pack.rows * TILE**2 * int(each.sum()) for each in tiles)
    else:
        pairs = work.context_pairs, work.state_pairs
    of_context, of_state = pairs
    return replace(computed, context_pairs=of_context, state_pairs=of_state)


def _full_row(pack: PackConfig, work: Work, pictures: int) -> tuple[Layout, Layout]:
    """Both streams of one of the rows that `full_rows` counts."""
    documents = pictures // pack.rows or 1
    token = torch.arange(pack.context_length)
    of = token * documents // pack.context_length
    context = Layout(*(each[None] for each in (of, token, token, torch.ones_like(of, dtype=torch.bool))))
    token = torch.arange(pack.state_length)
    instances = int(work.instances) // pack.rows if work.state else 0
    size = int(work.state) // pack.rows // max(instances, 1)
    real = token < instances * size
    instance = token // max(size, 1)
    state = Layout(
        document=torch.where(real, instance * documents // max(instances, 1), PAD)[None],
        block=torch.where(real, pack.context_length + instance, PAD)[None],
        rank=torch.where(real, pack.context_length, 0)[None],
        public=torch.zeros_like(real)[None],
    )
    return context, state


def _memory(
    config: RunConfig,
    parts: Parts,
    cluster: Cluster,
    facts: ModelFacts,
    work: Work,
    states: float,
    in_blocks: int,
    masked: bool,
) -> Memory:
    checkpointing = config.train.checkpointing
    pack, precision, target = config.data.pack, config.train.precision, parts.objective.needs_target
    weights = sum(p.nbytes for p in parts.model.parameters())
    group = cluster.group
    particles = parts.objective.particles if target else 0
    saved = saved_bytes(facts, pack, work, precision, checkpointing, particles, masked=masked)
    gathered = saved.casts
    if group > 1:
        block = in_blocks / facts.trunk.num_layers
        others = sum(p.numel() for p in parts.model.parameters()) - in_blocks
        # the next block is fetched while one computes, and the gradients of one are whole until they are scattered
        gathered = 2 * block * (GATHERED + SUMMED) + others * 2 * SUMMED
    held = Memory(
        weights=weights / group,
        gathered=gathered,
        gradients=weights / group,
        optimizer=states / group,
        averages=len(config.train.averages()) * weights / group,
        activations=saved.blocks + saved.around,
        masks=saved.biases + mask_pairs(pack) if masked else 0.0,
        logits=saved.logits + logits_gradient_bytes(facts, work, precision),
        target=target_bytes(facts, pack, precision, masked) if target else 0.0,
        working=working_bytes(facts, pack, precision, checkpointing, masked),
        margin=0.0,
    )
    return Memory(**{**vars(held), "margin": MARGIN * held.total + CONTEXT_BYTES})
