"""Retrieval on constructed cases, the linear alignment on a known map, and concept names in captions."""

import pytest
import torch
from torch.nn.functional import normalize

from mmgen.evaluation.alignment import (
    named_concepts,
    nearest,
    nearest_concepts,
    normalise_text,
    retrieves_concept,
    retrieves_own,
    train_alignment,
)


def test_nearest_differs_between_distance_and_angle() -> None:
    queries, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[10.0, 0.0], [0.9, 0.5]])
    assert nearest(queries, gallery).tolist() == [1]
    assert nearest(queries, gallery, cosine=True).tolist() == [0]


def test_own_picture_is_found_through_noise_and_not_after_a_wrong_pairing() -> None:
    latents = torch.randn(50, 8, 4, 4)
    drawn = latents + 0.3 * torch.randn_like(latents)
    assert retrieves_own(drawn, latents).all()
    assert not retrieves_own(drawn.roll(1, 0), latents).any()


def test_unrelated_pictures_retrieve_by_chance() -> None:
    hits = retrieves_own(torch.randn(400, 64), torch.randn(400, 64), cosine=True)
    assert hits.float().mean() < 0.03


def make_gallery() -> tuple[torch.Tensor, list[str], list[str]]:
    """Ten concepts in three styles; style shifts every picture more than concept does."""
    concept, style = torch.eye(10), 0.5 * torch.ones(3, 10) * torch.tensor([[0.0], [1.0], [2.0]])
    rows, concepts, styles = [], [], []
    for c in range(10):
        for s in range(3):
            rows.append(concept[c] + style[s])
            concepts.append(f"c{c}")
            styles.append(f"s{s}")
    return torch.stack(rows), concepts, styles


def test_concept_is_found_in_other_styles() -> None:
    features, concepts, styles = make_gallery()
    assert retrieves_concept(features, concepts, styles, features, concepts, styles).all()
    wrong = concepts[3:] + concepts[:3]
    assert not retrieves_concept(features, wrong, styles, features, concepts, styles).any()


def test_a_picture_of_the_same_style_does_not_count() -> None:
    """The prompt's own picture is in the gallery: only where its concept exists in another style can it be found."""
    features, concepts, styles = make_gallery()
    alone = [c if s == "s0" else "other" for c, s in zip(concepts, styles, strict=True)]
    rows = [row for row, style in enumerate(styles) if style == "s0"]
    hits = retrieves_concept(
        features[rows], [concepts[row] for row in rows], ["s0"] * len(rows), features, alone, styles
    )
    assert not hits.any()


def test_nothing_to_compare_with_is_refused() -> None:
    with pytest.raises(ValueError, match="no gallery picture"):
        retrieves_concept(torch.ones(1, 2), ["a"], ["s"], torch.ones(1, 2), ["a"], ["s"])


def test_alignment_learns_a_linear_map_and_shuffled_texts_teach_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    meaning = torch.randn(300, 12, generator=generator)
    pictures = meaning @ torch.randn(12, 40, generator=generator) + 0.3 * torch.randn(
        300, 40, generator=generator
    )
    texts = normalize(meaning @ torch.randn(12, 20, generator=generator), dim=-1)
    labels = [str(row) for row in range(300)]

    def recall(order: torch.Tensor) -> float:
        fitted = train_alignment(
            pictures[:200], texts[:200][order], labels[:200], ("t",), steps=100, batch_size=128
        )
        return (
            (fitted.similarity(pictures[200:], texts[200:]).argmax(1) == torch.arange(100))
            .float()
            .mean()
            .item()
        )

    assert recall(torch.arange(200)) > 0.7
    assert recall(torch.randperm(200, generator=generator)) < 0.1


def test_same_concept_is_no_negative() -> None:
    """With one concept there is no negative at all, so nothing is learnt beyond weight decay, and nothing is NaN."""
    pictures, texts = torch.randn(8, 4), torch.randn(8, 3)
    fitted = train_alignment(pictures, texts, ["one"] * 8, ("same",), steps=5)
    assert fitted.similarity(pictures, texts).isfinite().all()


def test_names_are_compared_without_case_accents_and_punctuation() -> None:
    assert normalise_text("  Piñata, RED-apple!") == "pinata red apple"


def test_the_longest_name_in_the_caption_counts() -> None:
    names = {"an apple": "apple", "a red apple": "red-apple", "a cat": "cat"}
    captions = ["A red apple, noto style", "an apple", "a cattle", "an animal"]
    names |= {"apple": "apple"}
    assert named_concepts(captions, names) == ["red-apple", "apple", None, None]


def test_nearest_name_in_meaning() -> None:
    vectors = {"kitten": [1.0, 0.1], "a cat": [1.0, 0.0], "a car": [0.0, 1.0]}

    def embed(texts) -> torch.Tensor:
        return torch.tensor([vectors[text] for text in texts])

    assert nearest_concepts(["kitten", "a car"], {"a cat": "cat", "a car": "car"}, embed) == ["cat", "car"]
