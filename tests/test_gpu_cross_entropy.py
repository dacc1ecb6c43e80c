"""The operators of the losses on a GPU: the interpreter's checks on CUDA tensors, and what only a GPU can show."""

import pytest
import torch
import torch.nn.functional as F

import fastbert
from fastbert import reference
from tests import cross_entropy_checks as checks
from tests.gpu_checks import check_graph, without_synchronisation

pytestmark = pytest.mark.gpu

CUDA = "cuda"
operations = torch.ops.fastbert
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
smoothings = pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["plain", "smoothed"])


def test_triton_answers():
    answers = [s for s in fastbert.backends() if s.device == "cuda" and "cross_entropy" in s.operation]
    assert {s.implementation for s in answers if s.dtype != "float64"} == {"Triton"}


@dtypes
@smoothings
@pytest.mark.parametrize("classes", [*checks.CLASSES, 30522, 128256])
@pytest.mark.parametrize("rows", [0, 1, 257])
def test_cross_entropy(rows, classes, smoothing, dtype):
    target = checks.labels(rows, classes, CUDA)
    checks.check_cross_entropy(operations, checks.logits_of(rows, classes, dtype, CUDA), target, smoothing)


def test_not_finite():
    checks.check_not_finite(operations, CUDA)


def test_targets_outside_the_classes_read_nothing_else():
    checks.check_targets_outside_the_classes_read_nothing_else(operations, CUDA)


@dtypes
@smoothings
@pytest.mark.parametrize(
    ("rows", "hidden", "classes", "labelled"),
    [(1, 8, 2, 1.0), (37, 17, 70, 0.5), (700, 384, 3001, 0.0), (3000, 768, 30522, 0.15), (2500, 767, 5000, 1.0)],
)
def test_linear_cross_entropy(rows, hidden, classes, labelled, smoothing, dtype):
    x, weight, bias, target = checks.linear_inputs(rows, hidden, classes, dtype, CUDA, labelled)
    checks.check_linear_cross_entropy(operations, x, weight, bias if smoothing else None, target, smoothing)


def test_unlabelled_rows_are_not_read():
    checks.check_unlabelled_rows_are_not_read(operations, CUDA)


def test_linear_strides():
    checks.check_linear_strides(operations, CUDA)


@dtypes
def test_deterministic(dtype):
    checks.check_deterministic(operations, checks.linear_inputs(3000, 768, 30522, dtype, CUDA))


@dtypes
@pytest.mark.parametrize("inplace_backward", [False, True])
def test_public_function_and_its_gradient(dtype, inplace_backward):
    logits, target = checks.logits_of(257, 30522, dtype, CUDA), checks.labels(257, 30522, CUDA)
    gradients = []
    for function in (
        lambda z: fastbert.functional.cross_entropy(z * 2, target, inplace_backward=inplace_backward),
        lambda z: F.cross_entropy(z * 2, target),
        lambda z: F.cross_entropy(z.double() * 2, target),
    ):
        leaf = logits.detach().clone().requires_grad_()
        function(leaf).backward()
        gradients.append(leaf.grad)
    checks.assert_close_to_exact(gradients[0], gradients[2].double(), gradients[1], "gradient")


def test_in_place_saves_the_memory_of_the_logits():
    logits, target = torch.randn(2048, 30522, device=CUDA, dtype=torch.bfloat16), checks.labels(2048, 30522, CUDA)
    peaks = []
    for inplace_backward in (False, True):
        leaf = logits.clone().requires_grad_()
        loss = fastbert.functional.cross_entropy(leaf.clone(), target, inplace_backward=inplace_backward)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] - peaks[1] > 0.9 * logits.numel() * 2


def test_linear_cross_entropy_takes_a_tenth_of_the_logits_memory():
    rows, classes = 16384, 30522
    x, weight, bias, target = checks.linear_inputs(rows, 768, classes, torch.bfloat16, CUDA, 0.15)
    losses, lse = operations.linear_cross_entropy(x, weight, bias, target, -100, 0.0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = operations.linear_cross_entropy_backward(losses, x, weight, bias, target, lse, -100, 0.0, [True] * 3)
    taken = torch.cuda.max_memory_allocated() - before - sum(g.numel() * g.element_size() for g in gradients)
    assert taken < 0.1 * rows * classes * 2


def test_cuda_graph_replays_with_other_labels():
    """The number of labelled rows is the device's: a captured graph follows it."""
    x, weight, bias, target = checks.linear_inputs(3000, 384, 5000, torch.bfloat16, CUDA)

    def step():
        losses, lse = operations.linear_cross_entropy(x, weight, bias, target, -100, 0.0)
        return losses, *operations.linear_cross_entropy_backward(
            torch.ones_like(losses), x, weight, bias, target, lse, -100, 0.0, [True] * 3
        )

    shares = (0.0, 0.1, 1.0)
    check_graph(step, [lambda s=share: target.copy_(checks.labels(3000, 5000, CUDA, s)) for share in shares])


def test_no_host_synchronisation():
    inputs = checks.linear_inputs(300, 64, 500, torch.float32, CUDA)
    logits, target = inputs[0] @ inputs[1].T, inputs[3]

    def step():
        losses, lse = operations.linear_cross_entropy(*inputs, -100, 0.1)
        operations.linear_cross_entropy_backward(losses, *inputs, lse, -100, 0.1, [True] * 3)
        losses, lse = operations.cross_entropy(logits, target, -100, 0.1)
        return losses, operations.cross_entropy_backward(losses, logits, target, lse, -100, 0.1)

    without_synchronisation(step)


def test_more_than_2_31_elements():
    rows, classes = 70400, 30522
    free, _ = torch.cuda.mem_get_info()
    if free < 8 * rows * classes:
        pytest.skip(f"needs {8 * rows * classes / 2**30:.0f} GiB of GPU memory; {free / 2**30:.0f} are free")
    logits = torch.randn(rows, classes, device=CUDA, dtype=torch.bfloat16)
    target = checks.labels(rows, classes, CUDA)
    losses, lse = operations.cross_entropy(logits, target, -100, 0.0)
    last = slice(rows - 8, rows)
    tail, labels = logits[last].double(), target[last]
    exact = reference.cross_entropy(tail, labels, -100, 0.0)
    torch.testing.assert_close(losses[last].double(), exact[0], atol=1e-4, rtol=1e-4)
    operations.cross_entropy_backward_(torch.ones_like(losses), logits, target, lse, -100, 0.0)
    exact = reference.cross_entropy_backward(torch.ones_like(exact[0]), tail, labels, exact[1], -100, 0.0)
    torch.testing.assert_close(logits[last].double(), exact, atol=1e-5, rtol=1e-2)
