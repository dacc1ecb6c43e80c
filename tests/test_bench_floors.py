"""Kernels on paper."""

from fastbert.bench import floors
from fastbert.bench.cases import all_cases


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
