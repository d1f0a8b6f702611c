"""The network: embeddings and heads of every modality around the shared trunk. One signature, u(x_t, t, s | context).

Shape letters as in trunk.py; D channels of a continuous modality, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmgen.modalities import Modality
from mmgen.model.attention import Attend, AttentionBackend, plan_attention
from mmgen.model.joint import JointConfig, build_joint_head
from mmgen.model.precision import exact_products
from mmgen.model.time import Modulation, TimeEmbedding, modulate
from mmgen.model.trunk import KeyValue, Past, Trunk, TrunkConfig
from mmgen.model.vocabulary import Vocabulary
from mmgen.sequence import Layout, PackedBatch, Stream

StateTensors = Mapping[str, Float[Tensor, "B S D"]]


@dataclass(frozen=True)
class BatchAttention:
    """The attention of both streams of one batch, shared by all layers and passes."""

    context: Attend
    state: Attend


def plan_batch(batch: PackedBatch, backend: AttentionBackend) -> BatchAttention:
    """Context over context, and state over context and itself."""
    context, state = batch.context.layout, batch.state.layout
    both = Layout.concat([context, state])
    return BatchAttention(plan_attention(context, context, backend), plan_attention(state, both, backend))


@dataclass(frozen=True)
class Target:
    """What the target pass runs on: the state at r, and what the network is told there. Times are per instance."""

    x: StateTensors
    r: Float[Tensor, "I"]
    s: Float[Tensor, "I"]


class Model(nn.Module):
    """The trunk with its modalities. Continuous tokens enter by a linear map each, text by an embedding.

    `joint_head` is of the next k text tokens, None where the configuration has none.
    """

    def __init__(
        self,
        config: TrunkConfig,
        modalities: Mapping[str, Modality],
        vocab_size: int,
        joint: JointConfig | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.names = list(modalities)
        continuous = {name: modality for name, modality in modalities.items() if modality.channels}
        self.text_embedding = nn.Embedding(vocab_size, config.width)
        nn.init.normal_(self.text_embedding.weight, std=0.02)
        self.text_head = None if config.tied else nn.Linear(config.width, vocab_size, bias=False)
        self.trunk = Trunk(config)
        self.embeddings = nn.ModuleDict(
            {name: m.build_embedding(config.width) for name, m in continuous.items()}
        )
        self.heads = nn.ModuleDict({name: m.build_head(config.width) for name, m in continuous.items()})
        self.state_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.time_embedding = TimeEmbedding(config.width, config.time_scale)
        self.modulation = (
            Modulation(config.width, config.num_layers, config.modulation_norm, config.time == "adaln")
            if config.modulates
            else None
        )
        self.joint_head = None if joint is None else build_joint_head(joint, config)

    def expand(
        self, stream: Stream, attend: Attend, past: Sequence[Past] | None = None
    ) -> tuple[Float[Tensor, "B L W"], list[KeyValue]]:
        """Clean tokens: final hidden states (see `logits`), and the keys and values for later tokens to read."""
        hidden, kvs = self.trunk.expand(
            self._embed_context(stream), self._context_inputs(stream, attend), past
        )
        return self.trunk.norm(hidden), kvs

    def refine(
        self,
        stream: Stream,
        x: StateTensors,
        t: Float[Tensor, "I"],
        s: Float[Tensor, "I"],
        attend: Attend,
        past: Sequence[Past],
    ) -> dict[str, Float[Tensor, "B S D"]]:
        """G(x_t, t, s | context) for every state token, raw: `path.jump` interprets it. Writes nothing."""
        embedded, inputs, head = self._state_inputs(stream, x, t, s, attend)
        return self._heads(self.trunk.refine(embedded, inputs, past), stream, head)

    def forward(
        self,
        batch: PackedBatch,
        x: StateTensors,
        t: Float[Tensor, "I"],
        s: Float[Tensor, "I"],
        attention: BatchAttention,
        target: Target | None = None,
    ) -> tuple[
        Float[Tensor, "B C W"], dict[str, Float[Tensor, "B S D"]], dict[str, Float[Tensor, "B S D"]] | None
    ]:
        """`expand` of the context stream and `refine` of the state stream against it: final hidden states, and G.

        Third, G of the target state at (r, s) in the same context, without gradient; None where there is none.
        """
        stream = batch.state
        embedded, inputs, head = self._state_inputs(stream, x, t, s, attention.state)
        target_embedded = target_inputs = target_head = None
        if target is not None:
            # every part of it after the student's, for autocast's sake (see Block.forward)
            with torch.no_grad():
                target_embedded, target_inputs, target_head = self._state_inputs(
                    stream, target.x, target.r, target.s, attention.state
                )
        hidden, state, target_state = self.trunk(
            self._embed_context(batch.context),
            embedded,
            self._context_inputs(batch.context, attention.context),
            inputs,
            target_embedded,
            target_inputs,
        )
        outputs, targets = self._heads(state, stream, head), None
        if target_state is not None:
            with torch.no_grad():
                targets = self._heads(target_state, stream, target_head)
        return self.trunk.norm(hidden), outputs, targets

    def logits(self, hidden: Float[Tensor, "... W"]) -> Float[Tensor, "... V"]:
        """Next-token logits in float32 whatever the autocast."""
        return self.vocabulary.logits(hidden)

    @property
    def vocabulary(self) -> Vocabulary:
        weight = self.text_embedding.weight if self.text_head is None else self.text_head.weight
        return Vocabulary(self.text_embedding, weight)

    def _embed_context(self, stream: Stream) -> Float[Tensor, "B L W"]:
        return self._embed_values(stream, stream.values, self.text_embedding(stream.ids))

    def _embed_values(
        self, stream: Stream, values: StateTensors, base: Tensor | None
    ) -> Float[Tensor, "B L W"]:
        dtype = self.text_embedding.weight.dtype  # the residual lane's: autocast does not narrow it
        out = base
        for name, embedding in self.embeddings.items():
            if name not in values:
                continue
            embedded = embedding(values[name].to(dtype), stream.positions).to(dtype)
            if out is None:
                out = embedded
            else:
                here = stream.modality == self.names.index(name)
                out = torch.where(here[..., None], embedded, out)
        if out is None:  # a model of text alone has no noisy tokens
            out = torch.zeros(*stream.ids.shape, self.config.width, dtype=dtype, device=stream.ids.device)
        return out

    def _context_inputs(self, stream: Stream, attend: Attend):
        return self.trunk.inputs(stream.positions, attend)

    def _state_inputs(self, stream: Stream, x: StateTensors, t: Tensor, s: Tensor, attend: Attend):
        assert stream.instance is not None, "state tokens belong to instances"
        embedding = self.time_embedding(t, s)
        embedded = self._embed_values(stream, x, None)
        if self.modulation is None:
            embedded = embedded + nn.functional.embedding(stream.instance, embedding)
            return embedded, self.trunk.inputs(stream.positions, attend), None
        modulation, head = self.modulation(embedding)
        return embedded, self.trunk.inputs(stream.positions, attend, modulation, stream.instance), head

    def _heads(self, hidden: Tensor, stream: Stream, shift_scale: Tensor | None) -> dict[str, Tensor]:
        with exact_products(hidden.device):
            hidden = self.state_norm(hidden.to(self.state_norm.weight.dtype))
            if shift_scale is not None:
                assert stream.instance is not None, "state tokens belong to instances"
                hidden = modulate(hidden, shift_scale, stream.instance)
            return {name: head(hidden) for name, head in self.heads.items()}

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())
