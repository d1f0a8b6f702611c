"""Per-run attention: the CPU default. Queries are partitioned into runs that share their keys, and runs of like
length are computed together, so that many short documents do not become many small calls.

A run is a piece of a document's context (whole blocks, about RUN tokens), or one instance of the state stream. Its
candidate keys are the document's tokens up to the run's end, and the run itself; the mask rule decides among them.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from mmgen.model.attention.dense import repeat_heads
from mmgen.model.attention.rule import allow
from mmgen.sequence import PAD, Layout

RUN = 64  # queries of a context run: longer documents are cut here, at block boundaries
SHORT = 128  # runs of at most this many keys are computed by plain products
STEP = 8  # lengths are rounded up to a multiple of this before runs are put together


Run = tuple[int, int, int, int, int, int]
"""first query and count, first key of what came before and count, first own key and count; as flat indices"""


@dataclass(frozen=True)
class Bucket:
    """R runs of like length, as flat indices of tokens; a padded slot repeats a token and its output is not used."""

    queries: Int[Tensor, "R Q"]
    keys: Int[Tensor, "R K"]
    mask: Bool[Tensor, "R 1 Q K"] | None


@dataclass(frozen=True)
class RunsAttention:
    """`inverse[b, l]` is where the output of query l of row b stands among the buckets' outputs, put end to end."""

    buckets: tuple[Bucket, ...]
    inverse: Int[Tensor, "B L"]

    @staticmethod
    def plan(queries: Layout, keys: Layout) -> "RunsAttention":
        past = keys.shape[1] - queries.shape[1]
        runs = _find_runs(queries, keys, past)
        buckets = []
        inverse = torch.full((queries.document.numel(),), -1, dtype=torch.long)
        offset = 0
        for (num_queries, num_keys), members in sorted(runs.items()):
            bucket, valid = _make_bucket(members, num_queries, num_keys, queries, keys)
            slots = torch.arange(valid.numel()).view(valid.shape) + offset
            inverse[bucket.queries[valid]] = slots[valid]
            offset += valid.numel()
            buckets.append(bucket)
        inverse[inverse < 0] = offset  # padding takes an extra row of zeros
        return RunsAttention(tuple(buckets), inverse.view(queries.shape))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        num_heads, dim = q.shape[-2:]
        flat_q = q.reshape(-1, num_heads * dim)
        flat_k = repeat_heads(k, num_heads).reshape(-1, num_heads * dim)
        flat_v = repeat_heads(v, num_heads).reshape(-1, num_heads * dim)
        outputs = []
        for bucket in self.buckets:
            q_run, k_run, v_run = (
                F.embedding(index, flat).view(*index.shape, num_heads, dim).transpose(1, 2)
                for index, flat in ((bucket.queries, flat_q), (bucket.keys, flat_k), (bucket.keys, flat_v))
            )
            out = _attend(q_run, k_run, v_run, bucket.mask)
            outputs.append(out.transpose(1, 2).reshape(-1, num_heads * dim))
        outputs.append(flat_q.new_zeros(1, num_heads * dim))
        return F.embedding(self.inverse, torch.cat(outputs)).unflatten(-1, (num_heads, dim))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Bool[Tensor, "R 1 Q K"] | None) -> Tensor:
    if k.shape[-2] > SHORT:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # The CPU's fused kernel works on tiles far larger than a short run: measured forward and backward on 128 runs of
    # 16 queries and 16 to 32 keys, it takes as long in float32 and 5 to 7 times as long in bfloat16 as these products.
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


def _round(length: int) -> int:
    return -(-length // STEP) * STEP


def _find_runs(queries: Layout, keys: Layout, past: int) -> dict[tuple[int, int], list[Run]]:
    """Runs by their rounded counts of queries and keys."""
    width = keys.shape[1]
    document, block, public = (x.cpu().numpy() for x in (queries.document, queries.block, queries.public))
    key_document = keys.document.cpu().numpy()
    runs: dict[tuple[int, int], list[Run]] = {}
    for row in range(document.shape[0]):
        bounds = _bounds(document[row], block[row], public[row])
        starts = _document_starts(key_document[row, :past])
        for a, b, own in bounds:
            # keys that came before (a context or a cache), then the stream's own tokens: the document so far
            first, end = starts.get(int(document[row, a]), (0, 0))
            num_keys = (end - first) + (b - own)
            run = (
                row * document.shape[1] + a,
                b - a,
                row * width + first,
                end - first,
                row * width + past + own,
                b - own,
            )
            runs.setdefault((_round(b - a), _round(num_keys)), []).append(run)
    return runs


def _bounds(document: np.ndarray, block: np.ndarray, public: np.ndarray) -> list[tuple[int, int, int]]:
    """(first query, end, first own key) of each run in one row."""
    if len(document) == 0:
        return []
    cuts = np.flatnonzero((np.diff(document) != 0) | ((np.diff(block) != 0) & ~public[1:])) + 1
    edges = [0, *cuts.tolist(), len(document)]
    bounds = []
    for a, b in pairwise(edges):
        if document[a] == PAD:
            continue
        start = a
        if public[a] and b - a > RUN:
            changes = (np.flatnonzero(np.diff(block[a:b])) + 1 + a).tolist()
            for change in changes:
                if change - start >= RUN:
                    bounds.append((start, change, a))
                    start = change
        bounds.append((start, b, a))
    return bounds


def _document_starts(document: np.ndarray) -> dict[int, tuple[int, int]]:
    if len(document) == 0:
        return {}
    edges = np.concatenate([[0], np.flatnonzero(np.diff(document)) + 1, [len(document)]])
    found: dict[int, tuple[int, int]] = {}
    for a, b in pairwise(edges.tolist()):
        name = int(document[a])
        if name != PAD:
            # a cache may hold a document in several pieces, with padding between: take them all, the rule decides
            found[name] = (found[name][0] if name in found else a, b)
    return found


def _make_bucket(
    members: list[Run], num_queries: int, num_keys: int, queries: Layout, keys: Layout
) -> tuple[Bucket, Bool[Tensor, "R Q"]]:
    runs = torch.tensor(members)[:, :, None]  # [R, 6, 1]
    slot = torch.arange(num_queries)
    valid = slot < runs[:, 1]
    query_index = runs[:, 0] + torch.where(valid, slot, 0)
    slot = torch.arange(num_keys)
    before = slot < runs[:, 3]
    valid_key = slot < runs[:, 3] + runs[:, 5]
    own = runs[:, 4] + torch.where(valid_key, slot - runs[:, 3], 0)
    key_index = torch.where(before, runs[:, 2] + slot, own)
    mask = allow(_take(queries, query_index), _take(keys, key_index)) & valid_key[:, None]
    mask = mask | ~valid[:, :, None]
    return Bucket(query_index, key_index, None if bool(mask.all()) else mask[:, None]), valid


def _take(layout: Layout, index: Int[Tensor, "R L"]) -> Layout:
    return Layout(
        *(x.reshape(-1)[index] for x in (layout.document, layout.block, layout.rank, layout.public))
    )
