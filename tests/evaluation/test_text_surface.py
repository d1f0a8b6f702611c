"""What is said of several tokens a pass, on a real model."""

import pytest

from mmgen.evaluation.text_surface import (
    REPEATS,
    TextSource,
    describes,
    plain,
    sources_of,
    text_surface,
    tokens_a_pass,
)
from mmgen.sampling.cost import Cost
from mmgen.sampling.plan import Plan
from mmgen.sampling.sampler import Result
from tests.parts import picture
from tests.sampling.test_answer import sampler

CAPTIONS = ["a red square", "the large blue circle on white", "a picture of the small green square"]


@pytest.mark.parametrize(
    ("tasks", "reads"),
    [
        (["text image", "text"], False),
        (["text image", "image text"], True),
        (["text:name image text:tags"], True),
        (["text:group text:name image", "image"], False),
    ],
)
def test_a_model_describes_pictures_where_a_text_follows_one_in_a_task(tasks: list[str], reads: bool):
    assert describes(tasks) == reads
    names = [source.name for source in sources_of(tasks, [picture(0)], CAPTIONS)]
    assert names == (["pictures", "captions"] if reads else ["captions"])


def test_rows_compare_with_one_token_a_pass():
    writes = sampler(joint="chain")
    writes.plan = Plan(max_tokens=8)
    assert tokens_a_pass(writes) == [1, 2, 4] and tokens_a_pass(sampler()) == [1]
    heard = []
    sources = [TextSource("captions", captions=CAPTIONS), TextSource("pictures", [picture(0), picture(1)])]
    rows = text_surface(writes, sources, CAPTIONS, 0, lambda: heard.append(1))
    assert len(heard) == 2 * 3 * REPEATS
    assert [(row["source"], row["tokens_per_pass"]) for row in rows] == [
        (source, k) for source in ("captions", "pictures") for k in (1, 2, 4)
    ]
    for row in rows:
        one = row["tokens_per_pass"] == 1
        assert (row["kept"].value == row["speed"].value == 1) == one
        assert 1 <= row["kept"].value < row["tokens_per_pass"] + 1e-9
        assert row["tokens_per_second"].value > 0
    assert rows[2]["flops_per_token"] > rows[0]["flops_per_token"], "an untrained head drafts in vain"
    bits = rows[0]["bits_per_byte"]
    nats, num_bytes = writes.bits(CAPTIONS)
    assert bits.value == pytest.approx(nats.sum() / num_bytes.sum() / 0.6931471805599453)
    assert plain(rows)[0]["kept"]["value"] == 1 and text_surface(writes, sources, [], 0) == []


class Silent(TextSource):
    """Whole captions, which the model ends at once."""

    def write(self, *_) -> Result:
        return Result(cost=Cost(seconds=1.0))


def test_a_source_of_which_nothing_is_written_has_no_row():
    sources = [Silent("captions", captions=CAPTIONS), TextSource("pictures", [picture(0)])]
    rows = text_surface(sampler(), sources, CAPTIONS, 0)
    assert [row["source"] for row in rows] == ["pictures"]
