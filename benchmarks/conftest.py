"""The package's cases under pytest-benchmark: one test a case and contender, correct before it is timed.

Ratios do not come from here: pytest-benchmark runs one contender after the other, and a machine drifts between them.
`fastbert bench` alternates the contenders within a round and reports ratios.
"""

import functools
from collections.abc import Callable

import pytest
import torch

from fastbert.bench import limits
from fastbert.bench.cases import LIMIT, Case, CaseUnavailable, Check, Prepared, Settings, all_cases, select
from fastbert.bench.environment import describe

_NOT_MEASURED = pytest.StashKey[dict[str, str]]()  # "case: contender" → why


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastbert")
    group.addoption("--fastbert-device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    group.addoption("--fastbert-quick", action="store_true", help="only the cases and texts of fastbert bench --quick")
    group.addoption(
        "--fastbert-all", action="store_true", help="also the cases that fastbert bench measures only when asked for"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_NOT_MEASURED] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each case whose name begins as one of the module's CASES, and each of its contenders."""
    config = metafunc.config
    cases = all_cases()
    if not config.getoption("--fastbert-all"):
        device, quick = config.getoption("--fastbert-device"), config.getoption("--fastbert-quick")
        cases = select(cases, quick=quick, device=device)
    values = [
        pytest.param(case, name, id=f"{case.name}-{name}")
        for case in cases
        if case.name.startswith(metafunc.module.CASES)
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
    config = request.config
    settings = Settings(device=config.getoption("--fastbert-device"), quick=config.getoption("--fastbert-quick"))
    if settings.device != "cpu" and not torch.cuda.is_available():
        pytest.skip(f"no device {settings.device}")

    def not_measured(what: str, why: str) -> None:
        config.stash[_NOT_MEASURED][what] = why
        pytest.skip(f"not measured: {why}")

    def run(case: Case, name: str) -> None:
        try:
            prepared, checks = _prepared(case, settings)
        except CaseUnavailable as reason:
            not_measured(case.name, str(reason))
        if name in prepared.not_measured:
            not_measured(f"{case.name}: {name}", prepared.not_measured[name])
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


@pytest.hookimpl(optionalhook=True)  # unknown where pytest-benchmark is missing
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, object]) -> None:
    """What `fastbert bench --json` says of the machine, and what is missing, in pytest-benchmark's file too."""
    output_json["fastbert"] = {
        "environment": describe(config.getoption("--fastbert-device"), ["pytest", *config.invocation_params.args]),
        "not_measured": config.stash[_NOT_MEASURED],
    }


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    missing = config.stash[_NOT_MEASURED]
    if missing:
        terminalreporter.section("not measured")
        for what, why in missing.items():
            terminalreporter.line(f"{what}: {why}")
