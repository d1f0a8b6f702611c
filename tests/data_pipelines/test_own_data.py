"""A user's own pictures, texts and documents: they arrive as they are, and what is broken is counted."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import image_text, interleaved, text
from data_pipelines.common import run
from data_pipelines.pictures import PictureOptions, fit
from mmgen.data.codec import BrokenSample
from mmgen.data.find import find_shards
from mmgen.data.read import read_shards
from mmgen.data.rejects import Rejects
from mmgen.data.shards import verify
from mmgen.sequence import Sample


def picture(seed: int, width: int = 48, height: int = 32) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def read(out: Path, split: str | None = None) -> list[Sample]:
    verify(out)
    return list(read_shards(find_shards(out, split), Rejects(max_rate=0)))


@pytest.fixture
def folder(tmp_path) -> Path:
    """40 good pictures in two folders, and one of each kind of broken ones."""
    folder = tmp_path / "photos"
    (folder / "sub.folder").mkdir(parents=True)
    for index in range(40):
        place = folder / "sub.folder" if index % 2 else folder
        picture(index).save(place / f"{index:02d}.png")
        (place / f"{index:02d}.txt").write_text(f"caption {index}\n", encoding="utf-8")
    (folder / "corrupt.jpg").write_bytes(b"no picture")
    (folder / "corrupt.txt").write_text("a")
    picture(0).save(folder / "silent.png")
    picture(0, 10, 10).save(folder / "tiny.png")
    (folder / "tiny.txt").write_text("a")
    picture(0, 200, 100).save(folder / "absurd.png")
    (folder / "absurd.txt").write_text("a")
    picture(0).save(folder / "latin.png")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    return folder


def test_a_folder_with_captions_beside_the_pictures(folder, tmp_path, capsys):
    arguments = [str(folder), str(tmp_path / "out"), "--validation", "0.25", "--max-pixels", "10000"]
    assert run(image_text.Options, image_text.build, arguments) == 0
    printed = capsys.readouterr().out
    for reason in (
        "corrupt picture 1",
        "missing caption 1",
        "picture too small 1",
        "picture too large 1",
        "utf-8 1",
    ):
        assert reason in printed
    train, validation = read(tmp_path / "out", "train"), read(tmp_path / "out", "validation")
    assert len(train) + len(validation) == 40 and 3 <= len(validation) <= 20
    for sample in train + validation:
        index = int(Path(sample.metadata["file"]).stem)
        assert sample.captions == {"text": f"caption {index}"}
        assert sample.picture is not None and sample.picture.tobytes() == picture(index).tobytes()


def test_the_split_of_a_picture_does_not_depend_on_the_others(folder, tmp_path):
    def held_out(out: str) -> set[str]:
        arguments = [str(folder), str(tmp_path / out), "--validation", "0.3", "--max-broken", "1"]
        assert run(image_text.Options, image_text.build, arguments) == 0
        return {sample.metadata["file"] for sample in read(tmp_path / out, "validation")}

    before = held_out("before")
    for name in ("00.png", "00.txt"):
        (folder / name).unlink()
    assert held_out("after") == before - {"00.png"}


def test_a_csv_and_a_jsonl_give_the_same_pictures(folder, tmp_path):
    rows = [{"image": f"{i:02d}.png", "title": f"a, “{i}”", "licence": "CC0"} for i in range(0, 40, 2)]
    lines = [",".join(rows[0]), *(f'{r["image"]},"{r["title"]}",{r["licence"]}' for r in rows)]
    (folder / "table.csv").write_text("\n".join(lines), encoding="utf-8")
    (folder / "table.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    columns = ["--picture-column", "image", "--caption-column", "title"]
    results = []
    for table in ("table.csv", "table.jsonl"):
        out = tmp_path / table.replace(".", "-")
        assert run(image_text.Options, image_text.build, [str(folder / table), str(out), *columns]) == 0
        results.append(
            {
                s.metadata["file"]: (s.captions, s.metadata, s.picture and s.picture.tobytes())
                for s in read(out)
            }
        )
    assert results[0] == results[1] and len(results[0]) == 20
    captions, metadata, pixels = results[0]["06.png"]
    assert captions == {"text": "a, “6”"} and metadata["licence"] == "CC0" and pixels == picture(6).tobytes()


def test_broken_rows_are_counted_by_reason(folder, tmp_path, capsys):
    table = folder / "table.jsonl"
    good = [json.dumps({"picture": f"{i:02d}.png", "caption": "a"}) for i in range(0, 40, 2)]
    bad = [
        "{",
        json.dumps({"caption": "a"}),
        json.dumps({"picture": "00.png"}),
        json.dumps({"picture": "no.png", "caption": "a"}),
    ]
    table.write_text("\n".join(good + bad))
    assert run(image_text.Options, image_text.build, [str(table), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "bad json 1" in printed and "missing picture 2" in printed and "missing caption 1" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "neither a folder nor"),
        (["photos/empty"], "has no pictures"),
        (["photos/table.csv"], "has no column 'caption', only file"),
        (["photos", "--size", "100"], "size 100 must be a multiple of 16"),
        (["photos", "--multiple", "0"], "multiple must be at least 1"),
        (["photos", "--size", "512"], "no usable sample in .*picture too small"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(folder, tmp_path, monkeypatch, capsys, arguments, message):
    (folder / "empty").mkdir()
    (folder / "table.csv").write_text("file\n00.png\n")
    monkeypatch.chdir(tmp_path)
    assert run(image_text.Options, image_text.build, [arguments[0], "out", *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_too_much_broken_input_writes_nothing(folder, tmp_path, capsys):
    for index in range(100):
        (folder / f"web{index:03d}.jpg").write_bytes(b"<html>404</html>")
        (folder / f"web{index:03d}.txt").write_text("a")
    assert run(image_text.Options, image_text.build, [str(folder), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "web" in error and "corrupt picture" in error and not (tmp_path / "out").exists()


def test_pictures_are_resized_by_the_shorter_side_and_cropped_around_the_centre():
    wide = picture(0, 300, 200)
    assert fit(wide, PictureOptions(size=64)).size == (96, 64)
    assert fit(wide, PictureOptions(size=64, square=True)).size == (64, 64)
    assert fit(picture(0, 200, 300), PictureOptions(size=64)).size == (64, 96)
    assert fit(wide, PictureOptions(multiple=32)).size == (288, 192)
    left_white = Image.new("RGB", (34, 16))
    left_white.paste((255, 255, 255), (0, 0, 1, 16))  # the crop from 34 to 32 takes one column on each side
    assert np.asarray(fit(left_white, PictureOptions())).max() == 0
    with pytest.raises(BrokenSample, match="too small"):
        fit(picture(0, 40, 63), PictureOptions(size=64))


def test_documents_of_texts_and_pictures(tmp_path, capsys):
    for index in range(3):
        picture(index).save(tmp_path / f"{index}.png")
    documents = [
        {
            "parts": [{"text": "one"}, {"picture": "0.png"}, {"text": "two"}, {"picture": "1.png"}],
            "title": "t",
        },
        {"parts": [{"picture": "2.png"}, {"text": "three"}]},
        {"parts": [{"text": "lost"}, {"picture": "9.png"}]},
        {"parts": []},
        {"parts": [{"sound": "a.wav"}]},
    ]
    source = tmp_path / "documents.jsonl"
    source.write_text("\n".join(map(json.dumps, documents)))
    arguments = [str(source), str(tmp_path / "out"), "--validation", "0"]
    assert run(interleaved.Options, interleaved.build, arguments) == 0
    printed = capsys.readouterr().out
    assert "missing picture 1" in printed and "bad parts 2" in printed and "3 pictures" in printed
    first, second = read(tmp_path / "out")
    assert first.metadata["title"] == "t" and [first.parts[0], first.parts[2]] == ["one", "two"]
    for part, index in ((first.parts[1], 0), (first.parts[3], 1), (second.parts[0], 2)):
        assert not isinstance(part, str) and part.tobytes() == picture(index).tobytes()


def test_text_files_and_jsonl(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("One\nline.\n\n  \nTwo.\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "Three."}\n\n{"body": "x"}\n')
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    arguments = [str(tmp_path / "out"), "--inputs", str(tmp_path), "--validation", "0"]
    assert run(text.Options, text.build, arguments) == 0
    assert [sample.captions["text"] for sample in read(tmp_path / "out")] == ["One\nline.", "Two.", "Three."]
    printed = capsys.readouterr().out
    assert "no text in field 'text' 1" in printed and "text is not utf-8 1" in printed
    by_line = [
        str(tmp_path / "lines"),
        "--inputs",
        str(tmp_path / "a.txt"),
        "--validation",
        "0",
        "--unit",
        "line",
    ]
    assert run(text.Options, text.build, by_line) == 0
    assert [sample.captions["text"] for sample in read(tmp_path / "lines")] == ["One", "line.", "Two."]


def test_long_texts_are_cut_at_white_space_and_lose_nothing():
    words = [f"word{index}" for index in range(200)] + ["x" * 70]
    pieces = list(text.cut(" ".join(words), 50))
    assert max(map(len, pieces)) <= 50 and "".join(pieces).replace(" ", "") == "".join(words)
    assert " ".join(pieces[:-2]).split() == words[:200]
    assert list(text.cut("exactly ten", 11)) == ["exactly ten"]


def test_pieces_of_a_text_stay_in_one_split(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join("word " * 100 for _ in range(60)))
    arguments = [
        str(tmp_path / "out"),
        "--inputs",
        str(tmp_path / "a.txt"),
        "--max-chars",
        "50",
        "--validation",
        "0.3",
    ]
    assert run(text.Options, text.build, arguments) == 0
    train, validation = (
        {s.metadata["place"] for s in read(tmp_path / "out", split)} for split in ("train", "validation")
    )
    assert train and validation and not train & validation


def test_glosses_of_wordnet_files(tmp_path):
    """The layout of WordNet's data files, in four lines."""
    licence = "  1 This software and database is being provided to you, the LICENSEE, by  \n"
    lines = {
        "noun": '00001740 03 n 01 physical_entity 0 001 ~ 00001930 n 0000 | an entity | or two; "he said so"  \n',
        "verb": "00001740 29 v 01 breathe 0 001 * 00005041 v 0000 | draw air into the lungs  \n",
        "adj": "00002098 00 a 01 afloat(p) 0 001 ! 00001740 a 0101 | borne on the water  \n",
        "adv": "00001740 02 r 01 a_cappella 0 000 | without musical accompaniment  \n",
    }
    for name, line in lines.items():
        (tmp_path / f"data.{name}").write_text(licence + line)
    assert list(text.texts_of_wordnet(tmp_path)) == [
        ("n00001740", 'physical entity: an entity | or two; "he said so"'),
        ("v00001740", "breathe: draw air into the lungs"),
        ("a00002098", "afloat: borne on the water"),
        ("r00001740", "a cappella: without musical accompaniment"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to read"),
        (["--inputs", "nowhere"], "nowhere does not exist"),
        (["--inputs", "."], "has no .txt, .md or .jsonl files"),
    ],
)
def test_mistakes_with_texts_end_with_one_line_and_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(text.Options, text.build, ["out", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
