"""How exact is exact enough: error against float64, bounded by what torch's own operation makes of the same input."""

import torch
from torch import Tensor

FACTOR = 2.0  # times torch's own error
FLOOR_ULPS = 4.0  # and a few units in the last place of the largest value


def error_against(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference over the finite elements of ``exact`` (float64); infinite where only actual is not finite."""
    actual = actual.detach().to(torch.float64).cpu()
    exact = exact.detach().to(torch.float64).cpu()
    finite = exact.isfinite()
    if not finite.any():
        return 0.0
    difference = (actual - exact)[finite].abs()
    return torch.inf if difference.isnan().any() else float(difference.max())


def assert_close_to_exact(
    actual: Tensor,
    exact: Tensor,
    torchs_own: Tensor | None = None,
    what: str = "result",
    *,
    factor: float = FACTOR,
    floor_ulps: float = FLOOR_ULPS,
) -> None:
    """Asserts error(actual) ≤ factor · error(torchs_own) + floor_ulps · eps · max|exact|, in the dtype of ``actual``.

    Args:
        actual: the result under test.
        exact: the same computed in float64 from the same (already rounded) inputs.
        torchs_own: torch's own operation in the dtype of ``actual``; None allows the floor alone.
        what: for the message.
        factor: on torch's own error.
        floor_ulps: units in the last place of the largest exact value.
    """
    assert actual.shape == exact.shape, f"{what}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    actual_cpu, exact_cpu = actual.detach().cpu(), exact.detach().cpu()
    # What overflows the dtype is infinite in it, whatever float64 says.
    rounded = exact_cpu.to(actual_cpu.dtype)
    assert torch.equal(actual_cpu.isnan(), rounded.isnan()), f"{what}: NaN in the wrong places"
    assert torch.equal(actual_cpu.isinf(), rounded.isinf()), f"{what}: infinite in the wrong places"
    exact_cpu = exact_cpu.masked_fill(rounded.isinf(), torch.nan)
    finite = exact_cpu[exact_cpu.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    limits = torch.finfo(actual.dtype)
    allowed = floor_ulps * max(limits.eps * largest, limits.smallest_normal * limits.eps)
    if torchs_own is not None:
        own = error_against(torchs_own, exact_cpu)
        assert own < torch.inf, f"{what}: torch's own result is not finite where the exact one is; it allows nothing"
        allowed += factor * own
    error = error_against(actual, exact_cpu)
    assert error <= allowed, f"{what}: error {error:.3e} is above the allowed {allowed:.3e}"
