"""`mmgen estimate`: tables and JSON of one configuration, changed by flags, without opening what it names."""

import json

import pytest

from mmgen.cli.main import main

CONFIG = "configs/t2i-300m.yaml"
CLUSTER = ["--gpus", "64", "--device", "h100"]


def record(capsys: pytest.CaptureFixture[str], *more: str) -> dict:
    assert main(["estimate", CONFIG, *CLUSTER, "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_tables_say_what_the_json_says(capsys: pytest.CaptureFixture[str]) -> None:
    found = record(capsys)
    assert main(["estimate", CONFIG, *CLUSTER]) == 0
    printed = capsys.readouterr().out
    assert f"{CONFIG} on 64 x h100, 1 copies of 64 shards" in printed
    rows = [line.split() for line in printed.splitlines()]
    totals = [row[1:] for row in rows if row[:1] == ["total"]]
    assert totals[0] == [f"{found['parameters']['total'] / 1e6:.3g}M"]
    flops = [f"{found[kind]['total'] / 1e15:.3g}" for kind in ("attended", "computed")]
    assert totals[1] == [flops[0], "P", flops[1], "P"]
    assert totals[2] == [f"{found['memory']['total'] / 1e9:.2f}"]
    assert ["h100:", "fits", "80"] in rows and found["fits"]
    assert ["GPU-hours", f"{found['time']['gpu_hours']:,.0f}"] in rows
    assert "Assumed, not measured: products at 0.45 of the dense peak" in printed
    assert found["assumed"]["device"]["peak"] == 989.4e12


def test_arguments_and_settings_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    found = record(capsys)
    wider = record(capsys, "--model.ffn_width", "6144", "--tokens", "100e9", "--data.pack.rows=8")
    assert wider["parameters"]["trunk"] - found["parameters"]["trunk"] == 20 * 3 * 1024 * 3072
    assert wider["tokens"]["total"] == found["tokens"]["total"] / 2
    assert wider["time"]["steps"] == pytest.approx(100e9 / wider["tokens"]["total"])
    more = record(
        capsys,
        *("--train.micro_batches", "256", "--train.replicas", "8", "--train.ema_also", "0.5"),
        "--train.checkpointing=full",
    )
    assert more["batches"] == 4 and more["recomputed"] > 0 and more["communication"]["all_reduce"] > 0
    assert more["memory"]["averages"] == 2 * 8 * found["memory"]["averages"]
    assert record(capsys, "--mfu", "0.3")["time"]["compute"] == pytest.approx(1.5 * found["time"]["compute"])


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "configs/t2i-7b.yaml", "--device", "rtx4090"]) == 0
    assert "rtx4090: DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([CONFIG, "--device", "h300"], "device 'h300' is not known; there are a100-40, a100-80, h100"),
        ([CONFIG, "--gpus", "8", "--train.replicas", "3"], "train.replicas 3 does not divide the 8 GPUs"),
        ([CONFIG, "--gpus", "6"], "train.micro_batches 64 must be a multiple of the 6 ranks"),
        ([CONFIG, "--gpus", "many"], "gpus"),
        ([CONFIG, "--optim.lrr", "1"], "--optim.lrr: unknown key; did you mean --optim.lr?"),
        (["--gpus", "8"], "the first word after `mmgen estimate` is the YAML file, not --gpus"),
        (["configs/nothing.yaml"], "configs/nothing.yaml: cannot be read"),
        ([CONFIG, "--tokenizer", "nowhere"], "no text tokenizer in nowhere"),
        ([CONFIG, "--size", "200", "200"], "both must be multiples of 16"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
