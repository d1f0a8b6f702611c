"""Does a picture show what its prompt says, and does a caption say what its picture shows?

Retrieval asks whether the nearest of many real pictures is the right one; the text score trains one linear
layer on each of two frozen networks. Works on features, latents and strings; knows neither models nor files.

Shape letters: N queries, M gallery, F features, E the shared space.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from mmgen.evaluation.intervals import Key
from mmgen.rng import keyed_torch


def nearest(
    queries: Float[Tensor, "N F"],
    gallery: Float[Tensor, "M F"],
    cosine: bool = False,
    allowed: Bool[Tensor, "N M"] | None = None,
) -> Int[Tensor, " N"]:
    """Index of the gallery row nearest to each query, by L2 distance or by cosine, among those `allowed`.

    Raises ValueError when a query may be compared with nothing."""
    if cosine:
        queries, gallery = normalize(queries, dim=-1), normalize(gallery, dim=-1)
    distances = torch.cdist(queries.double(), gallery.double())
    if allowed is not None:
        if not allowed.any(1).all():
            raise ValueError(
                f"query {int((~allowed.any(1)).nonzero()[0])} has no gallery picture to be compared with"
            )
        distances = distances.masked_fill(~allowed, torch.inf)
    return distances.argmin(1)


def retrieves_own(
    queries: Float[Tensor, "N ..."], gallery: Float[Tensor, "N ..."], cosine: bool = False
) -> Bool[Tensor, " N"]:
    """Whether the nearest of the prompts' real pictures is the prompt's own: row i of both belongs to prompt i.
    Latents are compared by L2 distance, features by cosine."""
    assert len(queries) == len(gallery), "one real picture per prompt"
    return nearest(queries.flatten(1), gallery.flatten(1), cosine) == torch.arange(len(queries))


def retrieves_concept(
    queries: Float[Tensor, "N F"],
    concepts: Sequence[str],
    styles: Sequence[str],
    gallery: Float[Tensor, "M F"],
    gallery_concepts: Sequence[str],
    gallery_styles: Sequence[str],
) -> Bool[Tensor, " N"]:
    """Whether the nearest real picture (cosine) of any OTHER style than the prompt's shows the prompt's
    concept. Given the prompts' real pictures as queries it says how far this measure can get: the ceiling."""
    ids = {style: index for index, style in enumerate(dict.fromkeys([*styles, *gallery_styles]))}
    other = torch.tensor([[ids[s]] for s in styles]) != torch.tensor([ids[s] for s in gallery_styles])
    found = nearest(queries, gallery, cosine=True, allowed=other)
    return torch.tensor(
        [gallery_concepts[index] == concept for index, concept in zip(found.tolist(), concepts, strict=True)]
    )


@dataclass(frozen=True)
class LinearAlignment:
    """Two linear maps into one space in which a picture's features lie near its text's."""

    picture: Float[Tensor, "F E"]
    text: Float[Tensor, "G E"]
    picture_mean: Float[Tensor, " F"]
    picture_std: Float[Tensor, " F"]

    def similarity(self, pictures: Float[Tensor, "N F"], texts: Float[Tensor, "M G"]) -> Float[Tensor, "N M"]:
        """Cosine of every picture with every text."""
        whitened = (pictures - self.picture_mean) / self.picture_std
        return normalize(whitened @ self.picture, dim=-1) @ normalize(texts @ self.text, dim=-1).T


def train_alignment(
    pictures: Float[Tensor, "N F"],
    texts: Float[Tensor, "N G"],
    labels: Sequence[str],
    key: Key,
    *,
    dim: int = 256,
    steps: int = 200,
    batch_size: int = 256,
) -> LinearAlignment:
    """Fit the two maps to pairs (row i of both) by InfoNCE in both directions (CLIP, arXiv 2103.00020) with
    AdamW; seconds on a CPU. Rows with the same label (a concept in several styles) are no negatives of each
    other."""
    generator = keyed_torch("alignment", *key)
    mean, std = pictures.mean(0), pictures.std(0).clamp_min(1e-4)
    pictures = (pictures - mean) / std
    ids = {label: index for index, label in enumerate(dict.fromkeys(labels))}
    label_ids = torch.tensor([ids[label] for label in labels])
    maps = [
        (torch.randn(side.shape[1], dim, generator=generator) / side.shape[1] ** 0.5).requires_grad_()
        for side in (pictures, texts)
    ]
    scale = torch.tensor(10.0).log().requires_grad_()
    groups = [{"params": maps, "weight_decay": 0.1}, {"params": [scale], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, fused=True)  # the same numbers, on a CPU too, in less time
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randperm(len(pictures), generator=generator)[:batch_size]
        a, b = (normalize(side[rows] @ m, dim=-1) for side, m in zip((pictures, texts), maps, strict=True))
        logits = scale.exp().clamp(max=100) * a @ b.T
        same = label_ids[rows, None] == label_ids[rows]
        logits = logits.masked_fill(same & ~torch.eye(len(rows), dtype=torch.bool), -torch.inf)
        target = torch.arange(len(rows))
        loss = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return LinearAlignment(maps[0].detach(), maps[1].detach(), mean, std)


def normalise_text(text: str) -> str:
    """Lower case, no accents or punctuation, single spaces: what names are compared by."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    letters = "".join(character for character in decomposed if not unicodedata.combining(character))
    return " ".join(re.findall(r"\w+", letters))


def named_concepts(captions: Sequence[str], names: Mapping[str, str]) -> list[str | None]:
    """For each caption the concept whose name (`names`: name -> concept) stands in it as whole words: the
    longest where several do ("red apple" before "apple"), None where none does."""
    longest_first = sorted(
        ((normalise_text(name), concept) for name, concept in names.items()), key=lambda n: -len(n[0])
    )
    padded = [f" {normalise_text(caption)} " for caption in captions]
    return [
        next((concept for name, concept in longest_first if f" {name} " in text), None) for text in padded
    ]


def nearest_concepts(
    captions: Sequence[str], names: Mapping[str, str], embed: Callable[[Sequence[str]], Float[Tensor, "N G"]]
) -> list[str]:
    """For each caption the concept whose name's embedding is nearest (cosine)."""
    concepts = list(names.values())
    return [concepts[index] for index in nearest(embed(captions), embed(list(names)), cosine=True).tolist()]
