"""The package's cases under pytest-benchmark: one test a case and contender, correct before it is timed.

Ratios do not come from here: pytest-benchmark runs one contender after the other, and a machine drifts between them.
`fastbert bench` alternates the contenders within a round and reports ratios.
"""

import functools
from collections.abc import Callable

import pytest
import torch

from fastbert.bench import limits
from fastbert.bench.cases import LIMIT, Case, CaseUnavailable, Check, Prepared, Settings, all_cases

_QUICK = "only the cases and texts of fastbert bench --quick"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastbert")
    group.addoption("--fastbert-device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    group.addoption("--fastbert-quick", action="store_true", help=_QUICK)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each case of the module's SUITE and each of its contenders."""
    suite = metafunc.module.SUITE
    quick = metafunc.config.getoption("--fastbert-quick")
    cases = [case for case in all_cases() if case.suite == suite and (case.quick or not quick)]
    values = [
        pytest.param(case, name, id=f"{case.name.removeprefix(suite + '/')}-{name}")
        for case in cases
        for name in case.contenders
    ]
    metafunc.parametrize(("case", "contender"), values)


@functools.lru_cache(maxsize=1)  # the contenders of a case follow each other
def _prepared(case: Case, settings: Settings) -> tuple[Prepared, dict[str, Check]]:
    prepared = case.prepare(settings)
    return prepared, prepared.check()


@pytest.fixture
def run_contender(request: pytest.FixtureRequest, benchmark: Callable[..., object]) -> Callable[[Case, str], None]:
    """Check one contender of a case against float64, then time it."""
    settings = Settings(
        device=request.config.getoption("--fastbert-device"), quick=request.config.getoption("--fastbert-quick")
    )
    if settings.device != "cpu" and not torch.cuda.is_available():
        pytest.skip(f"no device {settings.device}")

    def run(case: Case, name: str) -> None:
        try:
            prepared, checks = _prepared(case, settings)
        except CaseUnavailable as reason:
            pytest.skip(f"not measured: {reason}")
        if name in prepared.not_measured:
            pytest.skip(f"not measured: {prepared.not_measured[name]}")
        contender = next(each for each in prepared.contenders if each.name == name)
        check = checks[name]
        assert check.passed, f"error {check.error}, tolerance {check.tolerance} {check.message}"
        function = contender.run
        if settings.device != "cpu":

            def function() -> None:
                contender.run()
                torch.cuda.synchronize()

        benchmark.group = case.name
        benchmark(function)
        info = benchmark.extra_info
        info.update(role=contender.role, implementation=contender.implementation, device=settings.device)
        info.update(error=check.error, tolerance=check.tolerance)
        info.update(bytes=prepared.bytes, flops=prepared.flops, items=prepared.items, item_unit=prepared.item_unit)
        if benchmark.stats is not None and contender.role != LIMIT:  # None under --benchmark-disable
            _add_share(info, prepared, benchmark.stats.stats.median, settings.device)

    return run


def _add_share(info: dict[str, object], prepared: Prepared, seconds: float, device: str) -> None:
    """The share of the time that the case's ideal work takes at a copy's bandwidth and the rate of torch's matrix product."""
    floor = limits.floor_seconds(prepared.flops, prepared.flops_dtype, prepared.bytes, device)
    if floor is not None:
        info["share"] = floor / seconds
        products = f"torch.mm, {str(prepared.flops_dtype).removeprefix('torch.')}" if prepared.flops else ""
        copies = "a copy of the same bytes" if prepared.bytes else ""
        info["share_of"] = " or ".join(filter(None, (products, copies)))
