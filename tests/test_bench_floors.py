"""Kernels on paper, and the plots of attention."""

import importlib.util
from pathlib import Path

import pytest

from fastbert.bench import floors
from fastbert.bench.cases import all_cases
from fastbert.bench.results import OK, CaseResult, ContenderResult, RunResult
from fastbert.bench.timer import Spread

_FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "plot.py"


@pytest.fixture(scope="module")
def plot():
    spec = importlib.util.spec_from_file_location("plot", _FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_work_of_attention():
    """By hand: 4 sequences of 10 tokens, 2 heads of 8 features, 16 bits."""
    case = floors.Attention(tokens=40, pairs=400, heads=2, head_dim=8)
    tensor, rows = 40 * 2 * 8 * 2, 40 * 2 * 4
    assert case.forward() == floors.Work(4 * 400 * 2 * 8, 400 * 2, 4 * tensor + rows)
    assert case.backward_whole() == floors.Work(10 * 400 * 2 * 8, 400 * 2, 8 * tensor + rows)
    two = case.backward_two_passes()
    assert sum(work.flops for work in two) == 14 * 400 * 2 * 8 and sum(work.exponentials for work in two) == 2 * 400 * 2
    added = case.backward_add(block_n=10)
    assert sum(work.flops for work in added) == 10 * 400 * 2 * 8
    assert sum(work.added_bytes for work in added) == 4 * tensor // 2 * 4 // 4  # dq in float32, once a block of 10 keys


def test_floors():
    gpu = floors.Gpu(bytes=10.0, flops=100.0, exponentials=5.0)
    assert floors.Work(flops=200, exponentials=5, bytes=1).floor(gpu) == 2.0
    assert floors.Work(flops=200, exponentials=5, bytes=1).in_turn(gpu) == 3.0
    assert floors.Work(flops=200, exponentials=5, bytes=40).in_turn(gpu) == 4.0


def test_table_has_every_operation():
    table = floors.table()
    operations = {
        case.group.removesuffix("_backward") for case in all_cases() if case.suite == "ops" and case.cuda_only
    }
    assert all(f"\n{operation} " in table for operation in operations | {"attention,", "decode,"})
    assert "backward, added dq" in table


def _run():
    def contender(name, seconds):
        spread = None if seconds is None else Spread(*[seconds] * 5)
        return ContenderResult(name, "ours", OK, "", None, None, "", spread, None, 1)

    def case(length, ours, suite="attention"):
        return CaseResult(
            f"{suite}/forward/d64-full-S{length}-bf16", suite, "forward, full, head_dim 64", "", "torch",
            [contender("fastbert", ours), contender("torch", None)], {}, [], "", None, 3 * 10**12, None, "", 1, False, False,
        )  # fmt: skip

    return RunResult({"device": "a GPU"}, {}, [case(512, 0.01), case(128, 0.02), case(128, 0.5, suite="ops")])


def test_series_of_a_result(plot):
    assert plot.series(_run()) == {"forward, full, head_dim 64": {"fastbert": [(128, 150.0), (512, 300.0)]}}
    assert plot.file_name("forward, full, head_dim 64") == "attention-forward-full-head-dim-64.svg"


def test_plots_are_written(plot, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (tmp_path / "result.json").write_text(_run().to_json())
    assert plot.main([str(tmp_path / "result.json"), str(tmp_path / "plots")]) == 0
    assert "TFLOP/s" in (tmp_path / "plots" / "attention-forward-full-head-dim-64.svg").read_text()


def test_nothing_to_plot(plot, tmp_path, capsys):
    (tmp_path / "result.json").write_text(RunResult({"device": "a GPU"}, {}).to_json())
    assert plot.main([str(tmp_path / "result.json"), str(tmp_path)]) == 1
    assert "nothing to plot" in capsys.readouterr().err
