"""The emoji data: its splits leak nothing, its captions read well, and the bundle in the repository is whole."""

import shutil
from collections import defaultdict
from pathlib import Path

import pytest

from data_pipelines import emoji
from data_pipelines.common import npm_packages
from data_pipelines.emoji_captions import captions, with_article
from data_pipelines.emoji_sources import NAMES, SETS, STYLES, Drawing, Name, read_names, read_set, slug
from mmgen.data.find import find_shards
from mmgen.data.read import read_shards
from mmgen.data.rejects import Rejects
from mmgen.data.shards import verify
from mmgen.sequence import Sample

BUNDLE = Path(emoji.__file__).parent / "assets" / "emoji64"


@pytest.fixture(scope="module")
def bundle() -> dict[str, list[Sample]]:
    rejects = Rejects(max_rate=0)
    splits = verify(BUNDLE).splits
    return {split: list(read_shards(find_shards(BUNDLE, split), rejects)) for split in splits}


def concepts_of(samples: list[Sample]) -> set[str]:
    return {sample.metadata["concept"] for sample in samples}


def test_the_bundle_is_what_its_manifest_says(bundle):
    manifest = verify(BUNDLE)
    assert manifest.num_bytes < 16e6
    assert manifest.num_samples() == sum(map(len, bundle.values())) > 9000
    assert set(manifest.licences) == {"Apache-2.0", "CC-BY-4.0", "MIT"}
    attribution = (BUNDLE / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for emoji_set in SETS:
        assert manifest.sources[emoji_set.package] == emoji_set.version
        assert (
            f"{emoji_set.authors} | {emoji_set.licence} | {emoji_set.package} {emoji_set.version}"
            in attribution
        )
    assert "TERMS AND CONDITIONS" in attribution and "Permission is hereby granted" in attribution
    for sample in (sample for samples in bundle.values() for sample in samples):
        assert sample.picture is not None and sample.picture.size == (64, 64)
        assert {"text", "group", "name", "name_style", "tags"} == set(sample.captions)
        assert sample.captions["text"] == sample.captions["name_style"]
        assert sample.metadata["style"] in STYLES and not sample.metadata["tone"]


def test_no_two_pictures_of_a_style_are_the_same_and_none_is_blank(bundle):
    seen = set()
    for sample in (sample for samples in bundle.values() for sample in samples):
        assert sample.picture is not None
        assert any(low != high for low, high in sample.picture.getextrema())
        pixels = (sample.metadata["style"], sample.picture.tobytes())
        assert pixels not in seen
        seen.add(pixels)


def test_an_unseen_concept_is_seen_in_no_style(bundle):
    unseen = concepts_of(bundle["unseen_concepts"])
    assert (
        0.03
        < len(unseen) / len(concepts_of([sample for samples in bundle.values() for sample in samples]))
        < 0.07
    )
    assert not unseen & (concepts_of(bundle["train"]) | concepts_of(bundle["unseen_pairs"]))
    assert len({sample.metadata["style"] for sample in bundle["unseen_concepts"]}) == len(STYLES)


def test_an_unseen_pair_is_trained_in_other_styles_only(bundle):
    trained = defaultdict(set)
    for sample in bundle["train"]:
        trained[sample.metadata["concept"]].add(sample.metadata["style"])
    for sample in bundle["unseen_pairs"]:
        styles = trained[sample.metadata["concept"]]
        assert styles and sample.metadata["style"] not in styles
    share = len(bundle["unseen_pairs"]) / sum(map(len, bundle.values()))
    assert 0.04 < share < 0.08


def test_everyday_concepts_are_trained_and_give_enough_unseen_pairs(bundle):
    everyday = emoji.read_everyday()
    trained = defaultdict(set)
    for sample in bundle["train"]:
        trained[sample.metadata["concept"]].add(sample.metadata["style"])
    assert 140 <= len(everyday) <= 150
    for concept in everyday:
        assert len(trained[concept]) >= 4, concept
    unseen = [sample for sample in bundle["unseen_pairs"] if sample.metadata["concept"] in everyday]
    assert len(unseen) >= 50
    assert 840 <= len(unseen) + sum(len(trained[concept]) for concept in everyday) <= 880


def test_the_split_of_the_bundle_is_that_of_the_names(bundle):
    everyday = emoji.read_everyday()
    for split, samples in bundle.items():
        for sample in samples:
            assert emoji.split_of(sample.metadata["concept"], sample.metadata["style"], everyday) == split


def drawing(label: str, concept: str, style: str, svg: str, tone: int | None = None) -> Drawing:
    name = Name(label, concept, tone, ("tag",), "objects", "tool", 1.0, "1f000")
    head = '<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8" viewBox="0 0 8 8">'
    return Drawing(name, style, f"{head}{svg}</svg>")


def test_blanks_duplicates_and_what_cannot_be_drawn_are_left_out_by_reason():
    concept = next(c for c in map(str, range(100)) if emoji.split_of(c, "noto", frozenset()) == "train")
    red, blue = (f'<rect width="4" height="8" fill="{colour}"/>' for colour in ("red", "blue"))
    rejects = Rejects(max_rate=1.0)
    drawings = [
        drawing("one", concept, "noto", red, tone=0),
        drawing("one: dark skin tone", concept, "noto", red, tone=5),
        drawing("one: light skin tone", concept, "noto", blue, tone=1),
        drawing("nothing", concept + "-blank", "noto", ""),
        Drawing(drawing("bad", concept + "-bad", "noto", "").name, "noto", "<svg"),
        Drawing(drawing("bad", concept + "-bad", "noto", "").name, "noto", b"no webp"),
        drawing("same elsewhere", concept, "twemoji", red),
    ]
    drawings = [d for d in drawings if emoji.split_of(d.name.concept, d.style, frozenset()) != "unseen_pairs"]
    kept = list(emoji.samples_of(drawings, 16, rejects))
    assert [sample.key for sample in kept][:2] == [f"noto-{concept}", f"noto-{concept}-tone1"]
    assert dict(rejects.samples) == {"duplicate picture": 1, "blank": 1, "cannot be drawn": 2}
    assert kept[0].picture is not None and kept[0].picture.size == (16, 16)
    # The viewBox fills the picture: the left half is red to the middle and white from there.
    assert kept[0].picture.getpixel((7, 7)) == (255, 0, 0) and kept[0].picture.getpixel((9, 7)) == (
        255,
        255,
        255,
    )


def test_an_unseen_pair_without_another_style_is_left_out():
    concept, style = next(
        (c, s)
        for c in map(str, range(100))
        for s in STYLES
        if emoji.split_of(c, s, frozenset()) == "unseen_pairs"
    )
    other = next(s for s in STYLES if s != style)
    svg = '<rect width="4" height="4" fill="red"/>'
    alone, rejects = [drawing("a", concept, style, svg)], Rejects(max_rate=1.0)
    assert list(emoji.samples_of(alone, 8, rejects)) == []
    assert dict(rejects.samples) == {"held-out pair with no other style": 1}
    both = [*alone, drawing("a", concept, other, svg)]
    assert len(list(emoji.samples_of(both, 8, Rejects()))) == 2


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("red apple", "a red apple"),
        ("alien", "an alien"),
        ("unicorn", "a unicorn"),
        ("hourglass done", "an hourglass done"),
        ("one-piece swimsuit", "a one-piece swimsuit"),
        ("eight-spoked asterisk", "an eight-spoked asterisk"),
        ("SOS button", "an SOS button"),
        ("grapes", "grapes"),
        ("glasses", "glasses"),
        ("compass", "a compass"),
        ("octopus", "an octopus"),
        ("man lifting weights", "a man lifting weights"),
        ("raising hands", "raising hands"),
        ("women holding hands", "women holding hands"),
        ("woman and man holding hands", "a woman and man holding hands"),
        ("cat with tears of joy", "a cat with tears of joy"),
        ("cooked rice", "cooked rice"),
        ("sheaf of rice", "a sheaf of rice"),
        ("tennis", "tennis"),
        ("Santa Claus", "Santa Claus"),
        ("no entry", "no entry"),
        ("eleven o’clock", "eleven o’clock"),
        ("flag: Côte d’Ivoire", "the flag of Côte d’Ivoire"),
        ("keycap: 7", "the keycap 7"),
        ("waving hand: dark skin tone", "a waving hand: dark skin tone"),
        ("family: man, woman, boy", "a family: man, woman, boy"),
    ],
)
def test_articles(name, phrase):
    assert with_article(name) == phrase


def test_caption_levels():
    levels = captions("red apple", "noto", ["apple", "fruit", "red", "ripe"], "food-drink", "food-fruit")
    assert levels == {
        "group": "a fruit",
        "name": "a red apple",
        "name_style": "a red apple, noto style",
        "tags": "a red apple, noto style: fruit, ripe",
        "text": "a red apple, noto style",
    }


@pytest.fixture(scope="module")
def modules() -> Path:
    """The packages where they are in the user's cache; the tests never reach out for them."""
    packages = {emoji_set.package: emoji_set.version for emoji_set in SETS} | {NAMES[0]: NAMES[1]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        try:
            return npm_packages(packages, None)
        except ValueError:
            pytest.skip(
                "the emoji packages are not in the user's cache (python -m data_pipelines.emoji fetches them)"
            )


@pytest.mark.slow
def test_the_full_data_leaks_no_concept_in_any_tone(modules):
    everyday, names = emoji.read_everyday(), read_names(modules)
    assert everyday <= {name.concept for name in names}
    total, tones, splits = 0, 0, defaultdict(set)
    for emoji_set in SETS:
        drawings, _ = read_set(emoji_set, modules, names)
        assert len({drawing.name.name for drawing in drawings}) == len(drawings)
        for drawing in drawings:
            split = emoji.split_of(drawing.name.concept, drawing.style, everyday)
            splits[drawing.name.concept, drawing.style].add(split)
            total, tones = total + 1, tones + bool(drawing.name.tone)
    assert 17_500 < total < 18_000 and 8_200 < tones < 8_600
    assert all(len(found) == 1 for found in splits.values())
    assert {slug(name.name.split(":")[0]) for name in names if name.tone} & everyday == set()


@pytest.mark.slow
def test_a_small_build_is_the_same_whichever_sets_are_chosen(modules, tmp_path, capsys):
    for out, sets in (("all", STYLES), ("two", ("noto", "emojione"))):
        arguments = [str(tmp_path / out), "--everyday", "--size", "16", "--sets", *sets]
        assert emoji.run(emoji.Options, emoji.build, arguments) == 0
    printed = capsys.readouterr().out
    assert "everyday: 863 pictures" in printed
    both = {
        out: {
            (split, sample.key): sample
            for split in verify(tmp_path / out).splits
            for sample in read_shards(find_shards(tmp_path / out, split), Rejects(max_rate=0))
        }
        for out in ("all", "two")
    }
    assert set(both["two"]) == {
        key for key, s in both["all"].items() if s.metadata["style"] in ("noto", "emojione")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sets", "apple"], "no emoji set is called apple"),
        (["--size", "4"], "--size must be between 8 and 1024"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(tmp_path, capsys, arguments, message):
    assert emoji.run(emoji.Options, emoji.build, [str(tmp_path / "set"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_missing_npm_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    code = emoji.run(
        emoji.Options, emoji.build, [str(tmp_path / "set"), "--packages", str(tmp_path / "none")]
    )
    assert code == 2 and "npm is needed to fetch @iconify-json/noto@1.2.9" in capsys.readouterr().err
