"""Results as `fastbert bench` would write them, with the ratios that a test wants."""

import os

from rich.console import Console

from fastbert.bench.environment import describe
from fastbert.bench.results import CaseResult, ContenderResult, RunResult
from fastbert.bench.timer import Spread

TORCH = "torch add.out, native_layer_norm.out"


def spread(median, low=None, high=None):
    """A ratio; its range is a tenth around the median unless given."""
    low, high = median * 0.9 if low is None else low, median * 1.1 if high is None else high
    return Spread(median, median * 0.99, median * 1.01, low, high)


def contender(name="fastbert.functional", role="ours", ratio=None, seconds=None, **changes):
    """`ratio`: a median or a Spread; without it the contender was not timed."""
    ratio = spread(ratio) if isinstance(ratio, float) else ratio
    if ratio is not None and seconds is None:
        seconds = Spread(*[1e-3 / ratio.median] * 5)
    values = dict(status="ok", implementation="", error=1e-7, tolerance=1e-6, message="", calls=1)
    return ContenderResult(name=name, role=role, seconds=seconds, ratio=ratio, **{**values, **changes})


def baseline(name=TORCH):
    return contender(name, "peer", Spread(*[1.0] * 5))


def case(name="ops/x/16384x768-bf16", contenders=(), **changes):
    """A case with torch as its baseline."""
    values = dict(
        suite=name.split("/")[0],
        group="add_layer_norm",
        title="16384×768 bf16",
        baseline=TORCH,
        contenders=[*contenders, baseline()],
        not_measured={},
        notes=[],
        error_unit="share of the largest value",
        bytes=10**8,
        flops=None,
        items=16384,
        item_unit="rows",
        rounds=5,
        interrupted=False,
        failed=False,
    )
    return CaseResult(name=name, **{**values, **changes})


def run(*cases, environment=None, settings=None, **fields):
    """On an idle machine unless `environment` says otherwise."""
    return RunResult(
        {**describe(command=["fastbert", "bench"]), "load": 0.0, **(environment or {})},
        settings or {},
        list(cases),
        **fields,
    )


def mixed_run(**fields):
    """One case with everything that a table can show."""
    contenders = [
        contender(ratio=2.5, implementation="C++ (avx512)"),
        contender("fastbert, undecided", ratio=1.05),
        contender("fastbert, wrong", status="wrong", error=0.5, message="its error 5.0e-01 exceeds the tolerance"),
        contender("copy, reused output", "limit", 9.0, error=None, tolerance=None),
    ]
    return run(case(contenders=contenders, not_measured={"onnxruntime": "not installed"}, notes=["a note"]), **fields)


def drawn(width, draw):
    """What `draw` writes to a terminal so wide: (as it is, in one line, the header of the first table). Nothing is cut off."""
    with open(os.devnull, "w") as nowhere:
        console = Console(width=width, record=True, file=nowhere)
        draw(console)
    text = console.export_text()
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text
    return text, " ".join(text.split()), next(line for line in lines if "contender" in line)
