"""fastbert profile: fits, lengths, memory, what is dropped and why, and the command from start to files."""

import dataclasses
import gc
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("rich")
pytest.importorskip("transformers")

import torch

import fastbert
from fastbert import cli
from fastbert.bench.cases import errors_of
from fastbert.bench.profile import memory, run, table
from fastbert.bench.profile.fit import Quadratic, fit_exponent, fit_quadratic
from fastbert.bench.profile.growth import growth
from fastbert.bench.profile.models import CONTENDERS, EAGER, OURS, SDPA, Contender, ModelError, Spec, describe
from fastbert.bench.profile.operations import Breakdown, Operation
from fastbert.bench.profile.problem import Architecture, Problem, parse_lengths, spread_lengths
from fastbert.bench.profile.result import Measurement, Point, ProfileResult
from fastbert.bench.profile.worker import FirstCall, Stopped, Worker
from fastbert.bench.timer import Spread
from tests.bench_samples import drawn

MIB, GIB = 1 << 20, 1 << 30
LENGTHS = [128, 256, 512, 1024, 2048, 4096]
TINY = {"vocab_size": 200, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2}
TINY_GPT = {"vocab_size": 200, "n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 64}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of every family that the tests profile."""
    import transformers

    places = {family: tmp_path_factory.mktemp(family) for family in ("bert", "gpt2", "roberta", "broken", "text")}
    torch.manual_seed(0)
    fastbert.BertModel(fastbert.BertConfig(**TINY), add_pooling_layer=False).save_pretrained(places["bert"])
    fastbert.GPTModel(fastbert.GPTConfig(**TINY_GPT)).save_pretrained(places["gpt2"])
    transformers.RobertaModel(transformers.RobertaConfig(**TINY, max_position_embeddings=66)).save_pretrained(
        places["roberta"]
    )
    (places["broken"] / "config.json").write_text('{"model_type": "bert", "hidden_size": 31}')
    (places["text"] / "config.json").write_text("no JSON")
    return places


# ---- fits ----


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.63, 2.0])
def test_the_exponent_of_a_power_law_is_found(exponent):
    found = fit_exponent([(n, 3e-4 * n**exponent) for n in LENGTHS])
    assert found.exponent == pytest.approx(exponent, abs=1e-12)
    assert found.error == pytest.approx(0.0, abs=1e-7)


def test_the_exponent_is_of_the_upper_half_with_numpys_standard_error():
    import numpy as np

    upper = [(1024, 1.0), (2048, 2.3), (4096, 3.9)]
    found = fit_exponent([(128, 7.0), (256, 0.1), (512, 9.0), *upper])
    x, y = np.log2(np.array(upper)).T
    slope, covariance = np.polyfit(x, y, 1, cov=True)[0][0], np.polyfit(x, y, 1, cov=True)[1]
    assert (found.points, found.exponent) == (3, pytest.approx(slope))
    assert found.error == pytest.approx(math.sqrt(covariance[0, 0]))


def test_two_lengths_have_an_exponent_without_error_and_one_has_none():
    assert fit_exponent([(128, 1.0), (256, 4.0)]).exponent == pytest.approx(2.0)
    assert fit_exponent([(128, 1.0), (256, 4.0)]).error is None
    assert fit_exponent([(128, 1.0)]) is None and fit_exponent([]) is None
    assert fit_quadratic([(128, 1.0)]) is None and fit_quadratic([]) is None


@pytest.mark.parametrize(
    ("linear", "quadratic", "crossover"),
    [(2e-5, 1e-8, 2000.0), (2e-5, 1e-11, 2e6), (3.0, 0.0, None), (0.0, 7e-9, 0.0)],
    ids=["inside", "beyond", "linear", "quadratic"],
)
def test_the_quadratic_part_is_found(linear, quadratic, crossover):
    found = fit_quadratic([(n, linear * n + quadratic * n * n) for n in LENGTHS])
    assert found.linear == pytest.approx(linear, rel=1e-6, abs=1e-15)
    assert found.quadratic == pytest.approx(quadratic, rel=1e-6, abs=1e-15)
    assert found.crossover == (None if crossover is None else pytest.approx(crossover, rel=1e-6))
    assert found.residual == pytest.approx(0.0, abs=1e-9)
    assert found.at(300) == pytest.approx(linear * 300 + quadratic * 300**2)


@pytest.mark.parametrize("exponent", [0.7, 2.4])
def test_no_part_is_negative(exponent):
    """Growth slower than linear, or faster than quadratic, is the nearer of the two alone."""
    found = fit_quadratic([(n, n**exponent) for n in LENGTHS])
    assert found.residual > 0.01
    assert found.crossover == (None if exponent < 1.0 else 0.0)
    assert min(found.linear, found.quadratic) == 0.0 < max(found.linear, found.quadratic)


# ---- lengths, batches, operations ----


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("128..1024", [128, 256, 512, 1024]),
        ("100..350", [100, 200, 350]),
        ("512, 128,384,128", [128, 384, 512]),
        ("64..64,7", [7, 64]),
    ],
)
def test_lengths_are_read(text, lengths):
    assert parse_lengths(text) == lengths


@pytest.mark.parametrize("batch", [1, 2, 7, 32])
@pytest.mark.parametrize("padding", [0.0, 0.1, 0.5, 0.8, 0.97])
def test_lengths_have_the_padding_asked_for(batch, padding):
    lengths = spread_lengths(batch, 512, padding)
    assert len(lengths) == batch
    assert min(lengths) >= 1 and max(lengths) <= 512
    assert sum(lengths) == pytest.approx((1.0 - padding) * batch * 512, abs=batch)
    if batch > 1 and (1.0 - padding) * batch > 1.1:
        assert max(lengths) == 512


def test_flops_are_those_of_the_products_on_real_tokens():
    bert = Architecture("bert", 2, 8, 2, 32, 100, causal=False, positions=None)
    linear = 2 * (4 * 8 * 8 + 2 * 8 * 32)  # a token
    assert bert.flops([3, 5], training=False) == 2 * (8 * linear + 4 * 8 * (9 + 25))
    assert bert.flops([3, 5], training=True) == 3 * bert.flops([3, 5], training=False)
    assert dataclasses.replace(bert, causal=True).flops([3], False) == 2 * (3 * linear + 4 * 8 * 6)


# ---- memory ----


def test_peak_memory_of_this_process_is_seen_and_set_back():
    if not memory.reset_peak():
        pytest.skip("the kernel does not let VmHWM be set back")
    before = memory.resident()
    block = torch.ones(64 * MIB, dtype=torch.uint8)
    del block
    memory.trim()
    assert memory.resident(field="VmHWM") - before == pytest.approx(64 * MIB, rel=0.1)
    assert memory.resident() - before < 16 * MIB
    memory.reset_peak()
    assert memory.resident(field="VmHWM") - before < 16 * MIB
    assert memory.resident(0) is None


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("0::/", {}, 8 * GIB),
        ("0::/a/b", {"a/memory.max": 4 * GIB, "a/memory.current": 3 * GIB, "a/b/memory.max": "max"}, GIB),
        (
            "0::/a",
            {"a/memory.max": 4 * GIB, "a/memory.current": 3 * GIB, "a/memory.stat": f"anon 5\ninactive_file {GIB}\n"},
            2 * GIB,
        ),
        ("0::/of/the/host", {"memory.max": 4 * GIB, "memory.current": 3 * GIB}, GIB),
        (
            "4:memory:/job",
            {"memory/job/memory.limit_in_bytes": 6 * GIB, "memory/job/memory.usage_in_bytes": 2 * GIB},
            4 * GIB,
        ),
        (
            "4:memory:/job",
            {"memory/job/memory.limit_in_bytes": 2**63 - 4096, "memory/job/memory.usage_in_bytes": 2 * GIB},
            8 * GIB,
        ),
    ],
    ids=["no-limit", "v2-parent", "v2-cache", "v2-container", "v1", "v1-unlimited"],
)
def test_available_memory_heeds_control_groups(group, files, expected, tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {4 * GIB >> 10} kB\nMemAvailable: {8 * GIB >> 10} kB\n")
    (tmp_path / "proc/self/cgroup").write_text(f"5:cpu:/x\n{group}\n")
    for name, content in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
    assert memory.available(tmp_path) == expected - memory.RESERVE_BYTES
    assert memory.available(tmp_path / "nowhere") is None


# ---- contenders ----


@pytest.mark.parametrize("family", ["bert", "gpt2", "roberta"])
@pytest.mark.parametrize("mode", ["forward", "train"])
def test_contenders_of_a_folder_agree_with_float64(family, mode, folders):
    spec = Spec(str(folders[family]), 1, 24, mode)
    assert describe(spec).layers == 1
    samples = {}
    for name in CONTENDERS:
        contender = Contender(spec, name)
        contender.take(Problem.of(3, 24, 0.4))
        samples[name] = contender.sample(contender.call())
        if name == SDPA:
            exact = contender.exact()
    assert len(exact) == (2 if mode == "train" else 1)
    assert all(each.abs().max() > 1e-3 for each in exact)  # gradients too: the loss depends on all
    for name, sample in samples.items():
        assert max(errors_of(sample, exact)) < 1e-5, name


@pytest.mark.parametrize("model", ["minilm", "gpt2"])
def test_named_models_reach_any_length(model):
    spec = Spec(model, 1, 1500)
    assert describe(spec).positions is None
    ours = Contender(spec, OURS)
    ours.take(Problem.of(1, 1500, 0.0))
    assert ours.call().shape == (1, 1500, describe(spec).hidden)
    whole = ours.call()
    torch.testing.assert_close(ours.operator_by_operator()(), whole)


def test_weights_that_are_missing_or_too_large_are_said(folders, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text((folders["bert"] / "config.json").read_text())
    for name in (OURS, SDPA):
        with pytest.raises(ModelError, match=f"{name} cannot take the model"):
            Contender(Spec(str(tmp_path), None, 16), name)
    monkeypatch.setattr(run.memory, "available", lambda: 100 * MIB)
    with pytest.raises(
        ModelError, match="3 processes with the model bert-base need about 861 MiB of memory, and 100 MiB"
    ):
        run.run_plan(a_plan())


def test_a_folder_has_its_own_limits(folders):
    assert describe(Spec(str(folders["bert"]), None, 1)).positions == 512
    assert describe(Spec(str(folders["gpt2"]), None, 1)).positions == 64
    assert describe(Spec(str(folders["roberta"]), None, 1)).positions == 64  # 66 rows; two before the first position
    with pytest.raises(ModelError, match="--layers 3 is more than the 2 layers"):
        describe(Spec(str(folders["bert"]), 3, 1))


# ---- the run, on workers that take what they are told to ----


class FakeWorker:
    """Needs `peaks[name](length)` bytes and `seconds` of its own at each call."""

    parameters = 1
    alive = True
    peaks = {OURS: lambda n: 1000 * n, SDPA: lambda n: 2000 * n, EAGER: lambda n: 50 * n * n}  # noqa: RUF012
    wrong: tuple[str, ...] = ()
    interrupt_at = None
    fail_at = None

    def __init__(self, spec, name, threads):
        self.name = name
        self.made.append(name)

    def wait_until_ready(self):
        pass

    def close(self, kill=False):
        pass

    def first_call(self, problem, seconds):
        if problem.seq == self.interrupt_at and self.name == SDPA:
            raise KeyboardInterrupt
        if problem.seq == self.fail_at and self.name == EAGER:
            raise Stopped("its process ended with status 1")
        peak = self.peaks[self.name](problem.seq)
        sample = [torch.full((2, 2), 1.1 if self.name in self.wrong else 1.0).numpy()]
        return FirstCall(1e-3 * problem.seq, peak, peak + 5000, False, sample)

    def ask(self, method, *arguments):
        if method == "time":
            return 1e-3 * arguments[0] * {OURS: 1.0, SDPA: 2.0, EAGER: 3.0}[self.name]
        if method == "exact":
            return [torch.ones(2, 2, dtype=torch.float64).numpy()]
        assert method == "operations"
        return 1.0, [Operation("aten::mm", 0.9, 4)], None, self.name == OURS

    def __call__(self):
        pass


class FakeProduct:
    """10⁹ operations a second, whichever the length."""

    def __init__(self, spec):
        pass

    def fit(self, flops):
        return 10**6

    def __call__(self):
        pass

    def ask(self, method, calls):
        return 1e-3 * calls


@pytest.fixture
def fakes(monkeypatch):
    kind = type("Fake", (FakeWorker,), {"made": []})
    monkeypatch.setattr(run, "Worker", kind)
    monkeypatch.setattr(run, "_Product", FakeProduct)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # the timer's, at every length: most of such a test's time
    monkeypatch.setattr(run.memory, "available", lambda: GIB)
    return kind


def a_plan(lengths=LENGTHS[1:], **changes):
    spec = Spec("bert-base", 2, lengths[-1])
    values = dict(batch=1, tokens=None, padding=0.0, budget_seconds=0.01, time_limit=60.0, threads=1, breakdown=False)
    return run.Plan(spec, describe(spec), lengths, **{**values, **changes})


def test_everything_is_measured_in_turn_and_growth_is_found(fakes):
    outcome = run.run_plan(a_plan(breakdown=True))
    assert fakes.made == list(CONTENDERS) * len(outcome.points)  # a process for each length
    assert [point.seq for point in outcome.points] == LENGTHS[1:]
    for point in outcome.points:
        assert [each.name for each in point.contenders] == list(CONTENDERS)
        assert [each.ratio.median for each in point.contenders] == pytest.approx([2.0, 1.0, 2.0 / 3.0])
        assert point.of(OURS).limit_share == pytest.approx(point.flops / 1e-3 / 1e9)
        against = {each.against for each in point.contenders}
        assert against == ({"float64"} if point.seq <= 512 else {SDPA, ""})  # as long as a call is short
    grown = {each.name: each for each in growth(outcome.points)}
    assert grown[EAGER].memory.exponent == pytest.approx(2.0)
    assert grown[OURS].memory.exponent == pytest.approx(1.0)
    assert grown[OURS].memory_parts.crossover is None
    assert [(each.contender, each.seq) for each in outcome.breakdowns] == [(OURS, 4096), (SDPA, 4096)]


def test_a_fixed_number_of_tokens_makes_batches(fakes):
    points = run.run_plan(a_plan([100, 200, 1000], batch=None, tokens=1000)).points
    assert [(point.seq, point.batch, point.tokens) for point in points] == [
        (100, 10, 1000),
        (200, 5, 1000),
        (1000, 1, 1000),
    ]


@pytest.mark.parametrize(
    ("changes", "worker", "at", "reason"),
    [
        ({}, {"peaks": {**FakeWorker.peaks, EAGER: lambda n: 200 * n * n}}, 4096, "needs about 3.1 GiB, 1.0 GiB free"),
        ({"lengths": [8192]}, {}, 8192, "out of memory: needs about 6.0 GiB, 1.0 GiB free"),
        ({"time_limit": 3.0}, {}, 4096, "> 3 s a call: about 4 s"),
        ({}, {"fail_at": 512}, 512, "its process ended with status 1"),
    ],
    ids=["grows-too-large", "too-large-at-once", "too-slow", "ends"],
)
def test_a_contender_is_dropped_with_the_reason(changes, worker, at, reason, fakes):
    for name, value in worker.items():
        setattr(fakes, name, value)
    points = run.run_plan(a_plan(**changes)).points
    for point in points:
        dropped = point.of(EAGER)
        if point.seq < at:
            assert dropped.status == "ok" and dropped.seconds is not None
        else:
            assert dropped.status == "dropped" and reason in dropped.reason and dropped.seconds is None
            assert dropped.reason.startswith(f"at {at}: ") == (point.seq > at)
    assert points[-1].seq == changes.get("lengths", LENGTHS)[-1]


@pytest.mark.parametrize("name", [OURS, SDPA])
def test_a_wrong_result_is_not_timed(name, fakes):
    fakes.wrong = (name,)
    points = run.run_plan(a_plan([128, 2048])).points
    wrong = [[each.name for each in point.contenders if each.status == "wrong"] for point in points]
    # Without float64 nobody knows whether it is SDPA.
    assert wrong == [[name], [name] if name == OURS else [OURS, EAGER]]
    assert points[0].of(name).seconds is None
    assert "from float64, 1.0e-01, exceeds the tolerance" in points[0].of(name).reason


def test_ctrl_c_keeps_the_lengths_before(fakes, monkeypatch, tmp_path, capsys):
    fakes.interrupt_at = 512
    outcome = run.run_plan(a_plan())
    assert outcome.interrupted and [point.seq for point in outcome.points] == [256]
    file = tmp_path / "p.json"
    assert cli.main(["profile", "--seq-lens", "256..512", "--json", str(file)]) == 130
    result = ProfileResult.from_json(file.read_text())
    assert result.interrupted and [point.seq for point in result.points] == [256]
    assert "interrupted" in capsys.readouterr().out


# ---- workers ----


@pytest.mark.parametrize(
    ("seconds", "free", "reason"), [(0.0, GIB, "> 0 s a call"), (60.0, 0, "out of memory: stopped")]
)
def test_the_first_call_is_watched(seconds, free, reason, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: free)
    worker = Worker(Spec("minilm", 1, 4096), OURS, 1)
    try:
        worker.wait_until_ready()
        with pytest.raises(Stopped, match=reason):
            worker.first_call(Problem.of(2, 4096, 0.0), seconds)
        assert not worker.alive
    finally:
        worker.close()


def test_samples_stand_in_where_the_peak_cannot_be_set_back(monkeypatch):
    worker = object.__new__(Worker)
    worker._process = SimpleNamespace(pid=0)
    answer = (0.1, None, None, 1000, [])  # seconds, no peak, what the loaded model has
    monkeypatch.setattr(Worker, "_send", lambda *arguments: None)
    monkeypatch.setattr(Worker, "_answer_under_watch", lambda *arguments: (answer, 5000))
    assert worker.first_call(Problem.of(1, 8, 0.0), 1.0) == FirstCall(0.1, 4000, 5000, True, [])


# ---- the command ----


def command(capsys, *arguments):
    try:
        status = cli.main(["profile", *arguments])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seq-lens", "0,128"], "--seq-lens: 0 is no length; expected at least 1"),
        (["--seq-lens", "128..64"], "--seq-lens: 128..64 runs backwards"),
        (["--seq-lens", "128..x"], "'x' is no length"),
        (["--seq-lens", ""], "'' is no length"),
        (["--batch", "0"], "argument --batch: 0 is too few, at least 1"),
        (["--batch", "2", "--tokens", "4096"], "give one of them"),
        (["--batch", "99999999999999"], "is too large, at most 2147483647"),
        (["--tokens", "1000"], "--tokens 1000 holds no sequence of 2048"),
        (["--padding", "1"], "--padding 1 is no share of padding; expected 0 to below 1"),
        (["--padding", "-0.1"], "expected 0 to below 1"),
        (["--padding", "nan"], "expected 0 to below 1"),
        (
            ["--model", "bert-huge"],
            "unknown model 'bert-huge': choose from bert-base, bert-large, minilm, gpt2, or give",
        ),
        (["--model", "{broken}"], "cannot read the model in"),
        (["--model", "{text}"], "is no JSON"),
        (["--model", "{bert}"], "a length of 2048 is beyond the 512 positions"),
        (["--model", "{gpt2}", "--seq-lens", "65"], "choose --seq-lens up to 64"),
        (["--model", "{bert}", "--layers", "9"], "--layers 9 is more than the 2 layers"),
        (["--budget", "0"], "argument --budget: 0 is no time"),
        (["--time-limit", "inf"], "argument --time-limit: inf is no time"),
        (["--mode", "infer"], "argument --mode: invalid choice: 'infer'"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--json", "no/such/file.json"], "cannot write no/such/file.json"),
        (["--trace", "no/such/file.json"], "cannot write no/such/file.json"),
        (["--plots", "no/such/folder"], "--plots needs a folder that exists: no/such/folder is none"),
    ],
    ids=lambda value: "-".join(value).strip("-").replace("{", "").replace("}", "") if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys, folders):
    status, out, err = command(capsys, *(each.format(**folders) for each in arguments))
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1 and err.startswith("fastbert profile: ")


@pytest.mark.parametrize(
    ("package", "arguments"), [("rich", []), ("transformers", []), ("matplotlib", ["--plots", "."])]
)
def test_what_is_missing_is_said_with_the_remedy(package, arguments, capsys, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else real(name, *more))
    monkeypatch.setitem(sys.modules, package, None)
    status, out, err = command(capsys, *arguments)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1 and "pip install 'fastbert-kernels[bench]'" in err


def test_from_start_to_files(tmp_path, folders):
    """In a process of its own, as users run it; interrupted by nobody, printed at 80 columns."""
    files = [tmp_path / name for name in ("p.json", "trace.json")]
    arguments = ["--model", str(folders["bert"]), "--seq-lens", "32", "--batch", "3", "--padding", "0.3"]
    arguments += ["--budget", "0.05", "--json", str(files[0]), "--trace", str(files[1]), "--plots", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "fastbert", "profile", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    result = ProfileResult.from_json(files[0].read_text(encoding="utf-8"))
    assert ProfileResult.from_json(result.to_json()) == result
    assert result.settings["padding"] == 0.3 and result.model["layers"] == 2 and not result.interrupted
    assert result.environment["command"].startswith("fastbert profile --model")
    assert [(point.seq, point.batch, point.tokens) for point in result.points] == [(32, 3, 67)]
    for point in result.points:
        for each in point.contenders:
            assert each.status == "ok" and each.seconds.median > 0.0
            assert each.error <= each.tolerance and each.against == "float64"
            assert each.total_bytes > each.peak_bytes > 0
    assert {each.contender: each.one_by_one for each in result.breakdowns} == {OURS: True, SDPA: False}
    assert any(op.name == "fastbert::linear_act" for op in result.breakdowns[0].operations)
    assert any(event.get("name") == "fastbert::attention" for event in json.loads(files[1].read_text())["traceEvents"])
    for name in ("time.svg", "memory.svg"):
        assert (tmp_path / name).read_text().startswith("<?xml")


def a_result(**changes):
    def measured(name, seconds, peak, ratio, **more):
        spread = Spread(seconds, seconds * 0.98, seconds * 1.02, seconds * 0.9, seconds * 1.1)
        around = Spread(ratio, ratio, ratio, ratio * 0.9, ratio * 1.2)
        values = dict(error=1e-6, tolerance=2e-6, against="float64", seconds=spread, ratio=around, calls=1)
        return Measurement(name, "ok", peak_bytes=peak, total_bytes=peak + GIB, limit_share=0.87, **{**values, **more})

    points = []
    for n in (1024, 2048, 16384):
        eager = measured(EAGER, 3e-7 * n * n, n * n * 48, 0.5)
        if n == 16384:
            eager = Measurement(EAGER, "dropped", "out of memory: needs about 12.0 GiB, 3.0 GiB free")
        ours = measured(OURS, 1e-4 * n, n * 20000, 1.07)
        points.append(
            Point(
                n,
                32,
                n * 32,
                10**9 * n,
                1e11,
                5,
                [ours, measured(SDPA, 2e-4 * n + 1e-7 * n * n, n * 40000, 1.0), eager],
            )
        )
    operations = [
        Operation("aten::_scaled_dot_product_flash_attention_for_cpu", 0.5, 2),
        Operation("aten::addmm", 0.4, 12),
    ]
    spec = Spec("bert-base", 2, 16384)
    settings = {"model": "bert-base", "mode": "forward", "dtype": "fp32", "padding": 0.5, "tokens": None, "batch": 32}
    outcome = run.Outcome(points)
    from fastbert.bench.environment import describe as environment

    return ProfileResult(
        {**environment(), "load": 0.0},
        settings,
        {**dataclasses.asdict(describe(spec)), "parameters": 1},
        SDPA,
        points,
        growth(outcome.points),
        [
            Breakdown(OURS, 2048, 0.9, operations, None, True),
            Breakdown(SDPA, 2048, 0.95, operations, Operation("others", 0.05, 9), False),
        ],
        ["a note"],
        **changes,
    )


@pytest.mark.parametrize("width", [80, 100, 140])
def test_tables_fit_the_terminal(width):
    _, flat, header = drawn(width, lambda console: table.print_profile(console, a_result(interrupted=True)))
    for expected in (
        "forward pass · bert-base, 2 layers, fp32, batch 32, 50 % padding",
        "~1.07×",
        "dropped eager at 16384: out of memory: needs about 12.0 GiB, 3.0 GiB free",
        "n^1.00 ± 0.00",
        "nowhere: linear",
        "2,000 tokens",
        "everywhere",
        "one call of C++",
        "interrupted",
        "a note",
        "compared before timing with float64 at 1024, 2048, 16384",
    ):
        assert expected in flat, expected
    assert ("error" in header) == (width >= 100) and ("real tokens" in header) == (width >= 140)


def test_growth_is_that_of_a_machine_whose_speed_is_the_same_at_every_length():
    points = a_result().points
    slowed = []
    for point, factor in zip(points, (1.0, 3.0, 0.5), strict=True):
        contenders = [
            each
            if each.seconds is None
            else dataclasses.replace(
                each, seconds=dataclasses.replace(each.seconds, median=each.seconds.median * factor)
            )
            for each in point.contenders
        ]
        slowed.append(dataclasses.replace(point, matmul_rate=1e11 / factor, contenders=contenders))
    for even, uneven in zip(growth(points), growth(slowed), strict=True):
        assert uneven.time.exponent == pytest.approx(even.time.exponent)
        assert uneven.memory == even.memory
    assert growth([]) == growth(points[:1]) == []


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (None, "-"),
        (Quadratic(1.0, 0.0, 0.0), "nowhere: linear"),
        (Quadratic(0.0, 1.0, 0.0), "everywhere"),
        (Quadratic(2.0, 1e-3, 0.0), "2,000 tokens"),
        (Quadratic(2.1, 1e-3, 0.0), "beyond 2,048"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_where_the_quadratic_part_takes_over_is_said_within_what_was_measured(parts, text):
    assert table.crossover_text(parts, 2048) == text


def test_results_are_read_back_or_refused():
    result = a_result()
    assert ProfileResult.from_json(result.to_json()) == result
    for text, message in (
        ("{", "not a profile"),
        ("[]", "it is no object"),
        ('{"schema": 1}', "no field 'points'"),
        (result.to_json().replace('"schema": 1', '"schema": 9'), "schema 9; this fastbert reads schema 1"),
        (result.to_json().replace('"seq"', '"length"'), "not a profile"),
    ):
        with pytest.raises(ValueError, match=message):
            ProfileResult.from_json(text)


def test_figures_hold_every_contender():
    pytest.importorskip("matplotlib")
    from fastbert.bench.profile.figures import figures

    drawn = figures(a_result())
    assert [each.name for each in drawn] == ["time", "memory"]
    for each in drawn:
        for name in (">fastbert<", ">transformers SDPA<", ">transformers eager<", ">16384<"):
            assert name in each.file()
    assert figures(dataclasses.replace(a_result(), points=[])) == []
