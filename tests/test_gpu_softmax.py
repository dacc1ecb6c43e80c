"""The softmax operators on a GPU: the interpreter's checks on CUDA tensors, and what only a GPU can show."""

import pytest
import torch

import fastbert
from fastbert import reference
from tests import softmax_checks as checks

pytestmark = pytest.mark.gpu

CUDA = "cuda"
operations = torch.ops.fastbert
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def test_triton_answers():
    answers = [s for s in fastbert.backends() if s.device == "cuda" and s.operation.startswith("softmax")]
    assert {s.implementation for s in answers if s.dtype != "float64"} == {"Triton"}


@dtypes
@pytest.mark.parametrize("columns", [*checks.COLUMNS, 2048, 4096, 8192, checks.WIDE, 65535, 65536, 100001])
@pytest.mark.parametrize("rows", [0, 1, 5, 1000])
def test_softmax(rows, columns, dtype):
    checks.check_softmax(operations, checks.random(rows, columns, dtype=dtype, device=CUDA))


@dtypes
@pytest.mark.parametrize("columns", [17, 128, 512, checks.WIDE])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_masks(columns, dtype, causal):
    checks.check_masks(operations, columns, dtype, causal, CUDA)


@pytest.mark.parametrize("columns", [17, 512, checks.WIDE])
def test_nothing_kept_and_not_finite(columns):
    checks.check_nothing_kept(operations, columns, CUDA)
    checks.check_not_finite(operations, columns, CUDA)


def test_strides():
    checks.check_strides(operations, CUDA)


@dtypes
def test_unaligned_rows(dtype):
    for columns in (127, 128):
        x = checks.random(9 * columns + 1, dtype=dtype, device=CUDA)[1:].view(9, columns)
        checks.check_softmax(operations, x, x > -3, 0.5, True)


def test_no_host_synchronisation():
    x = checks.random(4, 8, 128, 128, dtype=torch.bfloat16, device=CUDA)
    mask = torch.rand(4, 1, 1, 128, device=CUDA) > 0.2
    operations.softmax_backward(x, operations.softmax(x, mask, 0.5, False), 0.5)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        operations.softmax_backward(x, operations.softmax(x, mask, 0.5, False), 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_than_2_31_elements():
    columns, rows = 1024, 2**21 + 1024
    free, _ = torch.cuda.mem_get_info()
    if free < 8 * rows * columns:
        pytest.skip(f"needs {8 * rows * columns / 2**30:.0f} GiB of GPU memory; {free / 2**30:.0f} are free")
    x = torch.randn(rows, columns, device=CUDA, dtype=torch.bfloat16)
    y = operations.softmax(x, None, 0.5, False)
    exact = reference.softmax(x[-8:].double(), None, 0.5, False)
    torch.testing.assert_close(y[-8:].double(), exact, atol=1e-4, rtol=1e-2)
    dx = operations.softmax_backward(x, y, 0.5)
    exact = reference.softmax_backward(x[-8:].double(), y[-8:].double(), 0.5)
    torch.testing.assert_close(dx[-8:].double(), exact, atol=1e-4, rtol=1e-2)
