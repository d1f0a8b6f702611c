"""The benchmark against peers: both sides do the same work, what is missing is said, the page quotes the results."""

import json

import pytest

from benchmarks import peer_calls, peers
from benchmarks.harness import RESULTS, ROOT
from benchmarks.peer_calls import Sizes, text_decoding
from benchmarks.peers import Arguments, measure

SMALL = Sizes(width=64, num_layers=2, documents=2, side=4, steps=2, max_tokens=6)


def page_lines() -> list[str]:
    """The lines of the page's table, from the committed results."""
    record = json.loads((RESULTS / "peers.json").read_text())
    assert record["arguments"]["seeds"] == 3 and not record["arguments"]["quick"]
    lines = []
    for row in record["rows"]:
        ratio = row["theirs_over_ours"]
        sizes = " and ".join(f"{row[key] / 1e6:.1f}" for key in ("our_parameters", "their_parameters"))
        times = " | ".join(f"{row[key]:.3g}" for key in ("our_seconds", "their_seconds"))
        case = (
            f"{row['task']} | {row['peer']} | {row['matched']}, {sizes} | {row['precision']} | {row['batch']}"
        )
        interval = f"**{ratio['value']:.2f}** ({ratio['low']:.2f} to {ratio['high']:.2f})"
        lines.append(f"| {case} | {row['tokens']} | {times} | {interval} |")
    return lines


def test_the_page_quotes_the_committed_results() -> None:
    page = (ROOT / "docs" / "speed.md").read_text()
    lines = page_lines()
    assert len(lines) == 38
    assert [line for line in lines if line not in page] == []


def test_a_peer_that_is_missing_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda _: None)
    assert measure(Arguments(quick=True)) == []
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all("mmgen-pretrain[peers]" in line for line in said)
    assert said[0].startswith("transfusion-pytorch is not installed")


def test_texts_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(list(text_decoding(SMALL, (2,), seed=0))) == 1
    export = peer_calls.to_qwen3

    def changed(model):
        return {name: tensor.flip(0) for name, tensor in export(model).items()}

    monkeypatch.setattr(peer_calls, "to_qwen3", changed)
    with pytest.raises(RuntimeError, match="the texts differ"):
        list(text_decoding(SMALL, (2,), seed=0))


@pytest.mark.slow
def test_the_rows_of_the_peers_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {name: module for name, module in peers.PEERS.items() if name != "transfusion-pytorch"}
    monkeypatch.setattr(peers, "PEERS", installed)
    rows = measure(Arguments(seeds=1, quick=True))
    assert {row["peer"] for row in rows} == set(installed)
    assert len(rows) == 2 + 3 * 2 * 2 * 2
    for row in rows:
        assert row["our_seconds"] > 0 and row["their_seconds"] > 0
        if row["matched"] in ("parameters", "weights"):
            assert row["our_parameters"] == pytest.approx(row["their_parameters"], rel=0.02)
        else:
            assert row["our_parameters"] < row["their_parameters"]
