"""What a task makes of a sample, level of detail by level of detail, and what is left out of its condition."""

from collections import Counter
from dataclasses import replace

import pytest

from mmgen.data.compose import ComposeConfig, check_tasks, compose
from mmgen.modalities import MissingPart, build_modalities
from mmgen.rng import keyed_numpy
from mmgen.sequence import Document, Sample
from tests.parts import modalities, picture, sample, tokenizer

CAPTIONS = {"text": "a red square on white", "name": "red square", "group": "square"}
THOUGHT = "text:group text:name image"


def detailed(seed: int = 0) -> Sample:
    return replace(sample(seed), captions=CAPTIONS)


def texts(document: Document) -> list[str]:
    return [tokenizer().decode(span.ids.tolist()) for span in document.spans if span.ids is not None]


def made(task: str, seed: int = 0, **config: float) -> Document:
    return compose(detailed(seed), ComposeConfig({task: 1.0}, **config), modalities(), keyed_numpy(seed))


def test_a_task_names_levels_of_detail_and_texts_that_follow_each_other_are_parted():
    document = made(THOUGHT, drop_condition=0.0)
    assert texts(document) == ["", "square", "\nred square", ""]
    assert all(span.predicted for span in document.spans[1:]), "the model learns to write each"
    assert texts(made("text:name image text", drop_condition=0.0))[1] == "red square"
    assert texts(made("image text:group text:name"))[-2:] == ["square", "\nred square"]


def test_a_sample_without_the_level_is_told_by_its_name():
    with pytest.raises(MissingPart, match="missing caption tags: sample0"):
        made("text:tags image")


def test_levels_of_a_task_need_no_weight():
    parts = build_modalities({"text": {"captions": {"text": 1.0}}}, tokenizer())
    document = compose(detailed(), ComposeConfig({"text:name": 1.0}), parts, keyed_numpy(0))
    assert texts(document) == ["", "red square"]


@pytest.mark.parametrize("task", ["image:name", "text: image", "text: "])
def test_a_level_of_what_has_none_is_refused(task: str):
    with pytest.raises(ValueError, match="must be text:LEVEL, such as text:name"):
        check_tasks(ComposeConfig({task: 1.0}), modalities())


def test_of_a_condition_of_texts_and_pictures_all_is_dropped_or_the_texts_alone():
    kinds = Counter()
    for seed in range(300):
        spans = made("image text image", seed, drop_condition=0.2, drop_text=0.25).spans
        kinds[tuple(span.modality for span in spans if span.modality == "image" or len(span) > 2)] += 1
    whole, pictures, nothing = ("image", "text", "image"), ("image", "image"), ("image",)
    assert set(kinds) == {whole, pictures, nothing}
    assert abs(kinds[nothing] / 300 - 0.2) < 0.07 and abs(kinds[pictures] / 300 - 0.2) < 0.07
    only = {len(made("text image", seed, drop_condition=0.0, drop_text=1.0).spans) for seed in range(20)}
    assert only == {4}, "a condition of texts alone is not touched"


def test_texts_of_an_interleaved_sample_are_parted_too():
    parts = ("red", "square", picture(0), "blue")
    document = compose(
        Sample("a", "s", parts=parts), ComposeConfig({"interleaved": 1.0}), modalities(), keyed_numpy(0)
    )
    assert texts(document) == ["", "red", "\nsquare", "", "blue"]
