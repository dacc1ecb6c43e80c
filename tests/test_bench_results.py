"""Checks before timing, the result schema, and files that are never half written."""

import json
import os

import pytest
import torch

from fastbert.bench import environment, run
from fastbert.bench.cases import (
    LIMIT,
    OURS,
    PEER,
    SUITES,
    Case,
    CaseUnavailable,
    Contender,
    Prepared,
    Settings,
    UnknownSelection,
    all_cases,
    check_against,
    errors_of,
    select,
)
from fastbert.bench.results import RunResult, check_writable, write_atomically
from fastbert.bench.timer import Spread

X = torch.linspace(-1.0, 1.0, 64)
FAST = Settings(budget_seconds=0.0)


def make_case(contenders, baseline="torch", name="ops/test/64-fp32", **fields):
    def prepare(settings):
        def check():
            return check_against(contenders, lambda: [X.double().exp()], baseline, torch.float32)

        return Prepared(list(contenders), baseline, check, **fields)

    return Case(name, "ops", "test", "64 fp32", tuple(each.name for each in contenders), prepare)


def by_name(result):
    return {each.name: each for each in result.contenders}


def test_a_wrong_contender_is_flagged_and_not_timed():
    calls = {"wrong": 0, "nan": 0, "raises": 0, "shape": 0}

    def counted(name, function):
        def call():
            calls[name] += 1
            return function()

        return call

    def fail():
        raise NotImplementedError("width is 64; the kernel takes at most 32.\nand a second line")

    case = make_case(
        [
            Contender("torch", PEER, X.exp),
            Contender("wrong", OURS, counted("wrong", lambda: X.exp() + 1e-3)),
            Contender("nan", OURS, counted("nan", lambda: X.log())),
            Contender("raises", OURS, counted("raises", fail)),
            Contender("shape", OURS, counted("shape", lambda: X.exp()[:-1])),
            Contender("right", OURS, lambda: X.double().exp().float()),
            Contender("copy", LIMIT, X.clone, checked=False),
        ]
    )
    result = run.run_case(case, FAST)
    found = by_name(result)
    assert calls == {"wrong": 1, "nan": 1, "raises": 1, "shape": 1}  # the check alone
    assert {name: each.status for name, each in found.items()} == {
        "torch": "ok",
        "wrong": "wrong",
        "nan": "wrong",
        "raises": "failed",
        "shape": "wrong",
        "right": "ok",
        "copy": "ok",
    }
    for each in found.values():
        assert (each.seconds is not None) == (each.status == "ok")
        assert (each.ratio is not None) == (each.status == "ok")
    assert found["wrong"].error == pytest.approx(1e-3 / 2.718, rel=0.01)
    assert found["wrong"].error > found["wrong"].tolerance
    assert found["nan"].error is None and "not finite" in found["nan"].message
    assert found["raises"].message == "NotImplementedError: width is 64; the kernel takes at most 32."
    assert [each.name for each in result.wrong] == ["wrong", "nan", "raises", "shape"]


def test_each_tensor_has_its_own_tolerance():
    """torch's poor second result must not excuse our poor first."""
    exact = [torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)]
    contenders = [
        Contender("torch", PEER, lambda: (torch.ones(4), torch.ones(4) + 5e-6)),
        Contender("ours", OURS, lambda: (torch.ones(4) + 5e-6, torch.ones(4))),
        Contender("alike", OURS, lambda: (torch.ones(4), torch.ones(4) - 5e-6)),
    ]
    checks = check_against(contenders, lambda: exact, "torch", torch.float32)
    assert checks["torch"].passed
    assert not checks["ours"].passed
    assert checks["alike"].passed


def test_a_baseline_that_is_wrong_leaves_no_ratios():
    case = make_case([Contender("torch", PEER, lambda: X), Contender("ours", OURS, lambda: X.exp())])
    found = by_name(run.run_case(case, FAST))
    assert found["torch"].status == "wrong"
    assert found["ours"].seconds is not None
    assert found["ours"].ratio is None


def test_errors():
    wanted = [torch.tensor([0.0, 4.0], dtype=torch.float64)]
    assert errors_of(torch.tensor([0.0, 5.0]), wanted) == [0.25]
    assert errors_of(torch.tensor([0.0, 5.0]), wanted, absolute=True) == [1.0]
    assert errors_of([], wanted) == [float("inf")]
    assert errors_of((torch.tensor([0.0, 4.0]), "by-product"), wanted) == [0.0]
    assert errors_of(torch.empty(0), [torch.empty(0, dtype=torch.float64)]) == [0.0]


def test_what_cannot_run_says_why():
    def prepare(settings):
        raise CaseUnavailable("no peer is installed")

    def crash(settings):
        raise RuntimeError("boom\ndetails")

    unavailable = run.run_case(Case("ops/x", "ops", "x", "x", (), prepare), FAST)
    assert unavailable.not_measured == {"*": "no peer is installed"}
    assert not unavailable.failed
    crashed = run.run_case(Case("ops/x", "ops", "x", "x", (), crash), FAST)
    assert crashed.not_measured == {"*": "RuntimeError: boom"}
    assert crashed.failed


def a_run(interrupted=False):
    case = make_case(
        [Contender("torch", PEER, X.exp), Contender("ours", OURS, lambda: X * float("nan"), implementation="C++")],
        bytes=512,
        items=64,
        not_measured={"other": "not installed"},
        notes=["a note"],
    )
    return RunResult(environment.describe(), {"quick": True}, [run.run_case(case, FAST)], interrupted)


def test_json_round_trip():
    original = a_run(interrupted=True)
    text = original.to_json()
    assert RunResult.from_json(text) == original
    assert RunResult.from_json(text).to_json() == text
    data = json.loads(text, parse_constant=pytest.fail)  # no NaN, no Infinity
    assert data["schema"] == 1
    assert {"device", "cpu", "isa", "threads", "versions", "commit", "date", "command", "python", "platform"} <= data[
        "environment"
    ].keys()
    assert {"fastbert", "torch", "triton", "transformers"} <= data["environment"]["versions"].keys()
    assert isinstance(original.cases[0].contenders[0].seconds, Spread)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a benchmark result"),
        ("[]", "it is no object"),
        ("{}", "no field 'schema'"),
        ('{"schema": 1}', "no field 'cases'"),
        ('{"schema": 99}', "schema 99; this fastbert reads schema 1"),
        ('{"schema": 1, "cases": []}', "KeyError 'environment'"),
        ('{"schema": 1, "cases": [{"contenders": []}], "environment": {}, "settings": {}}', "TypeError"),
        ('{"schema": 1, "cases": [], "environment": {}, "settings": []}', "settings, which is no object"),
        ("[" * 100_000, "not a benchmark result"),
        (
            '{"schema": 1, "cases": [], "environment": {"versions": {"torch": "2"}}, "settings": {}, "interrupted": false}',
            "its environment lacks command, .*fastbert",
        ),
    ],
    ids=[
        "truncated",
        "other-json",
        "no-schema",
        "no-cases",
        "other-version",
        "missing-field",
        "missing-case-field",
        "settings-a-list",
        "nested",
        "missing-environment",
    ],
)
def test_what_is_no_result_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        RunResult.from_json(text)


def test_writing_is_atomic(tmp_path, monkeypatch):
    target = tmp_path / "result.json"
    write_atomically(target, "old")
    assert target.read_text() == "old"
    assert target.stat().st_mode & 0o777 == 0o666 & ~environment_umask()

    def fail(source, destination):
        assert target.read_text() == "old"  # all is written elsewhere before the old file goes
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, "new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.json"]


def environment_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_unwritable_paths_are_found_before_measuring(tmp_path):
    check_writable(tmp_path / "new.json")
    assert os.listdir(tmp_path) == []
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        check_writable(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        check_writable(tmp_path / "no" / "such.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        check_writable(tmp_path / "file" / "below.json")


def test_ctrl_c_keeps_the_cases_before():
    def interrupt(settings):
        raise KeyboardInterrupt

    good = make_case([Contender("torch", PEER, X.exp)])
    results, interrupted = run.run_cases([good, Case("ops/x", "ops", "x", "x", (), interrupt), good], FAST)
    assert interrupted
    assert [each.name for each in results] == [good.name]


def test_register():
    cases = all_cases()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert all(case.name.startswith(f"{case.suite}/") for case in cases)
    assert {case.suite for case in select(cases, suite="ops")} == {"ops"}
    assert all("layer_norm/24x" in case.name for case in select(cases, case="layer_norm/24x"))
    assert 0 < len(select(cases, quick=True)) < len(cases)
    with pytest.raises(UnknownSelection, match=f"unknown suite 'tpu': choose from {', '.join(SUITES)}, all"):
        select(cases, suite="tpu")
    with pytest.raises(UnknownSelection, match="no case in suite ops contains 'minilm'"):
        select(cases, suite="ops", case="minilm")


def test_every_forward_operation_has_a_case():
    from fastbert.ops._registry import OPERATIONS

    forward = {name for name in OPERATIONS if not name.endswith(("_backward", "_backward_"))}
    forward -= {"linear_reduced"}  # suite cpu measures it inside whole models
    assert forward <= {case.group for case in all_cases()}


def test_device_folder():
    described = {"device": "AMD EPYC 9B14 (TM) @ 2.6GHz", "threads": 2, "device_type": "cpu"}
    assert environment.device_folder(described) == "amd-epyc-9b14-2-6ghz-2-threads"
    described = {"device": "NVIDIA H200", "threads": 16, "device_type": "cuda"}
    assert environment.device_folder(described) == "nvidia-h200"
