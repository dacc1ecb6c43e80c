"""`fastbert doctor` tells the truth: with and without the extension, with and without triton, and about wrong results."""

import importlib.util
import json
import subprocess
import sys

import pytest

from fastbert import doctor
from fastbert.bench import environment, selftest

HAS_EXTENSION = environment.extension()[0] is not None
HAS_TRITON = importlib.util.find_spec("triton") is not None

BLOCKING = """
import sys
blocked = {blocked!r}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in blocked:
            raise ImportError(f"{{name}} is blocked by a test", name=name)
sys.meta_path.insert(0, Blocker())
{extra}
from fastbert.cli import main
sys.exit(main(["doctor", "--json"]))
"""


def examine_without(*blocked, extra=""):
    """(report, exit status, stderr) of a process in which these modules cannot be imported."""
    code = BLOCKING.format(blocked=blocked, extra=extra)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout, done.stderr
    return json.loads(done.stdout), done.returncode, done.stderr


def answers(report, device, dtype="float32"):
    return {
        each["operation"]: each for each in report["backends"] if each["device"] == device and each["dtype"] == dtype
    }


@pytest.fixture(scope="module")
def report():
    return doctor.examine()


def test_the_report_of_this_machine(report):
    assert report["extension"]["loaded"] == HAS_EXTENSION
    assert report["triton"]["importable"] == HAS_TRITON
    assert report["selftest"]["passed"], [each for each in report["selftest"]["outcomes"] if not each["passed"]]
    assert report["selftest"]["not_covered"] == []
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    wide = answers(report, "cpu", "float64")
    assert {each["implementation"] for each in wide.values()} == {"reference"}


@pytest.mark.skipif(not HAS_EXTENSION, reason="the extension is not built here")
def test_with_the_extension(report):
    extension = report["extension"]
    assert extension["isa"] in extension["isas"]
    assert answers(report, "cpu")["layer_norm"]["implementation"] == f"C++ ({extension['isa']})"
    by_operation = {
        each["operation"]: each["implementation"]
        for each in report["selftest"]["outcomes"]
        if each["dtype"] == "float32"
    }
    assert by_operation["layer_norm"] == f"C++ ({extension['isa']})"


def test_without_the_extension():
    report, status, stderr = examine_without("fastbert._C")
    assert status == 0, stderr
    extension = report["extension"]
    assert not extension["loaded"]
    assert "fastbert._C is blocked by a test" in extension["error"]
    assert extension["isa"] is None and extension["isas"] == []
    status = answers(report, "cpu")["layer_norm"]
    assert status["implementation"] == "reference"
    assert "fastbert._C is blocked by a test" in status["reason"]
    assert not any("C++" in each["implementation"] for each in report["backends"])
    assert {each["implementation"] for each in report["selftest"]["outcomes"]} == {"reference"}
    assert report["selftest"]["passed"]
    assert "Warning" not in stderr  # the report says it already


def test_without_triton():
    report, status, stderr = examine_without("triton")
    assert status == 0, stderr
    assert report["triton"]["importable"] is False
    assert "triton is blocked by a test" in report["triton"]["error"]
    assert report["triton"]["version"] == environment.package_version("triton")  # installed, and yet not importable
    on_gpus = [each for each in report["backends"] if each["device"] == "cuda" and each["operation"] == "layer_norm"]
    assert not any("Triton would answer" in each["reason"] for each in on_gpus)
    assert any("triton is blocked by a test" in each["reason"] for each in on_gpus)
    assert not any(each["implementation"] == "Triton" for each in report["backends"])
    assert report["extension"]["loaded"] == HAS_EXTENSION


def test_a_wrong_operation_fails_with_status_1():
    extra = """
import fastbert
real = fastbert.functional.softmax
def wrong(x, **arguments):
    y = real(x, **arguments)
    return y if x.dtype.itemsize == 8 else y * 1.001 if x.dtype.itemsize == 4 else y * float("nan")
fastbert.functional.softmax = wrong
"""
    report, status, _ = examine_without(extra=extra)
    assert status == 1
    assert not report["selftest"]["passed"]
    failed = [each for each in report["selftest"]["outcomes"] if not each["passed"]]
    assert {each["operation"] for each in failed} == {"softmax", "softmax_backward"}
    narrow = next(each for each in failed if each["dtype"] == "float32" and each["direction"] == "forward")
    assert narrow["error"] == pytest.approx(1e-3, rel=0.1)
    half = next(each for each in failed if each["dtype"] == "bfloat16" and each["direction"] == "forward")
    assert half["error"] is None and "not finite" in half["message"]


def test_an_operation_that_raises_is_reported():
    problem = selftest.Problem("softmax", "", lambda x: x.no_such_method(), ((3, 4),), None)
    outcomes = list(selftest.run(problem, "cpu"))
    assert len(outcomes) == 3
    for outcome in outcomes:
        assert not outcome.passed
        assert outcome.error is None
        assert "AttributeError" in outcome.message


def test_every_operation_is_tested():
    from fastbert.ops._registry import OPERATIONS

    assert set(OPERATIONS) - selftest.covered() == set()


@pytest.mark.parametrize("width", [80, 100, 140])
def test_tables_fit_the_terminal(report, width, tmp_path):
    rich_console = pytest.importorskip("rich.console")
    with open(tmp_path / "out", "w") as file:
        console = rich_console.Console(width=width, record=True, file=file)
        doctor.print_report(console, report)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for operation in answers(report, "cpu"):
        assert operation in text
    assert f"all {len(report['selftest']['outcomes'])} self-tests pass" in text


def test_failures_are_shown_in_full(report, tmp_path):
    rich_console = pytest.importorskip("rich.console")
    broken = json.loads(json.dumps(report))
    outcome = broken["selftest"]["outcomes"][0]
    outcome.update(passed=False, error=0.25)
    broken["selftest"]["passed"] = False
    with open(tmp_path / "out", "w") as file:
        console = rich_console.Console(width=140, record=True, file=file)
        doctor.print_report(console, broken)
    text = console.export_text()
    assert "FAILED layer_norm, cpu float32" in text
    assert "error 2.5e-01 exceeds 2.0e-05" in text
    assert f"1 of {len(report['selftest']['outcomes'])} self-tests failed" in text
