"""Ahead-of-time compilation of a sample of the Triton kernels, for every target, without a GPU. `make aot` compiles them all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {"sm_80", "sm_90", "sm_100", "gfx942"}
#: Bytes of shared memory that one program may have (CUDA C++ Programming Guide; CDNA 3 ISA guide).
SHARED_LIMITS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


def _aot(*arguments, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "fastbert.kernels._aot", *arguments],
        cwd=ROOT,
        env={**environment, **variables},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    pytest.importorskip("triton", reason="triton is not installed")
    file = tmp_path_factory.mktemp("aot") / "sample.json"
    done = _aot("--sample", "--json", str(file))
    assert file.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    content = json.loads(file.read_text())
    return done, [dict(zip(content["fields"], line, strict=True)) for line in content["reports"]]


def test_every_target_compiles(sample):
    done, reports = sample
    assert not [(r["case"], r["target"], r["error"]) for r in reports if r["error"]]
    assert {r["target"] for r in reports} == TARGETS
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_kind_of_kernel_is_in_the_sample(sample):
    _, reports = sample
    for target in TARGETS:
        kernels = {(r["case"].partition("-")[0], r["kernel"]) for r in reports if r["target"] == target}
        assert kernels >= {
            ("layer_norm", "forward_kernel"),
            ("layer_norm_backward", "backward_kernel"),
            ("add_layer_norm", "forward_kernel"),
            ("add_layer_norm_backward", "backward_kernel"),
            ("add_layer_norm_backward", "reduce_kernel"),
            ("rms_norm", "forward_kernel"),
            ("rms_norm_backward", "backward_kernel"),
            ("bias_gelu", "gelu_kernel"),
            ("bias_gelu_backward", "gelu_kernel"),
            ("gated_act", "gated_kernel"),
            ("gated_act_backward", "gated_kernel"),
            ("rotary", "rotary_kernel"),
            ("pack", "pack_kernel"),
            ("unpack", "unpack_kernel"),
            ("attention", "forward_kernel"),
            ("attention_backward", "dq_kernel"),
            ("attention_backward", "dk_dv_kernel"),
            ("attention_backward", "delta_kernel"),
            ("attention_backward", "dq_cast_kernel"),
            ("attention_backward", "correction_kernel"),
            ("attention_backward", "mask_gradient_kernel"),
            ("attention_backward", "sum_splits_kernel"),
            ("attention_decode", "decode_kernel"),
            ("attention_decode", "combine_kernel"),
            ("softmax", "forward_kernel"),
            ("softmax_backward", "backward_kernel"),
            ("cross_entropy", "forward_kernel"),
            ("cross_entropy_backward", "backward_kernel"),
            ("linear_cross_entropy", "list_labelled_kernel"),
            ("linear_cross_entropy", "forward_kernel"),
            ("linear_cross_entropy", "combine_kernel"),
            ("linear_cross_entropy_backward", "d_logits_kernel"),
            ("linear_cross_entropy_backward", "dx_kernel"),
            ("linear_cross_entropy_backward", "dweight_kernel"),
            ("embedding_layer_norm", "forward_kernel"),
            ("embedding_layer_norm_backward", "backward_kernel"),
            ("embedding_layer_norm_backward", "chunk_sums_kernel"),
            ("embedding_layer_norm_backward", "segment_sums_kernel"),
        }


def test_no_spills_on_sm_90(sample):
    _, reports = sample
    on_sm_90 = [r for r in reports if r["target"] == "sm_90"]
    assert on_sm_90 and not [(r["case"], r["spills"]) for r in on_sm_90 if r["spills"]]
    assert all(0 < r["registers"] <= 255 for r in on_sm_90)


def test_shared_memory_fits(sample):
    _, reports = sample
    for r in reports:
        assert r["shared_bytes"] <= SHARED_LIMITS[r["target"]], r


def test_aligned_rows_move_16_bytes_an_access(sample):
    """The loads and stores of whole rows; an unaligned row cannot."""
    _, reports = sample
    kernels = ("forward_kernel", "backward_kernel", "gelu_kernel", "gated_kernel", "rotary_kernel", "pack_kernel")
    rows = [r for r in reports if "attention" not in r["case"] and r["kernel"] in (*kernels, "unpack_kernel")]
    aligned = [r for r in rows if not r["case"].endswith("unaligned")]
    assert {r["target"] for r in aligned} == TARGETS
    assert not [(r["case"], r["target"]) for r in aligned if r["widest_load"] != 16]
    elements = [
        r for r in aligned if "cross_entropy" not in r["case"] or "backward" in r["case"]
    ]  # losses are one a row
    assert not [(r["case"], r["target"]) for r in elements if r["widest_store"] != 16]
    assert any(r["widest_load"] < 16 for r in rows if r["case"].endswith("unaligned"))


def test_attention_uses_tensor_cores_asynchronously_on_sm_90(sample):
    """16-bit prefill, forward and backward; float32 has no such instruction, and decoding too few rows."""
    _, reports = sample
    kernels = {"forward_kernel", "dq_kernel", "dk_dv_kernel"}
    mine = [r for r in reports if r["target"] == "sm_90" and r["case"].startswith("attention")]
    sixteen_bits = [r for r in mine if r["kernel"] in kernels and "fp32" not in r["case"]]
    assert {r["kernel"] for r in sixteen_bits} == kernels
    assert not [r["case"] for r in sixteen_bits if not r["wgmma"]]
    assert all(r["programs"] >= 1 for r in mine)


def test_merged_reports_are_what_they_were(sample, tmp_path):
    _, reports = sample
    pytest.importorskip("triton", reason="triton is not installed")
    parts = [tmp_path / "a.json", tmp_path / "b.json"]
    from fastbert.kernels import _aot

    own = [_aot.Report(**{name: r[name] for name in _aot.WRITTEN if name != "programs"}) for r in reports]
    for n, part in enumerate(parts):
        _aot.write(part, own[n::2])
    done = _aot.main(["--merge", *map(str, parts), "--json", str(tmp_path / "whole.json")])
    content = json.loads((tmp_path / "whole.json").read_text())
    assert done == 0
    assert [dict(zip(content["fields"], line, strict=True)) for line in content["reports"]] == reports


def test_thinning_drops_no_kernel_and_no_configuration():
    """A target that does not compile every specialisation compiles each kernel in each of its launch configurations."""
    pytest.importorskip("triton", reason="triton is not installed")
    from fastbert.kernels import _aot

    target = "gfx942"

    def configurations(launches):
        return {
            (
                launch.kernel.fn.__module__,
                launch.kernel.__name__,
                launch.num_warps,
                tuple((n, v) for n, v in launch.constexprs.items() if n.isupper() and type(v) is int),
            )
            for launch in launches
            if not any(isinstance(x, torch.Tensor) and x.dtype is torch.float16 for x in launch.arguments)
        }

    cases = {case.id: case for case in _aot.cases(sample=False)}
    every = configurations(launch for case in cases.values() for launch in _aot._launches(case, target))
    compiled = configurations(_aot._launches(cases[case], target)[n] for case, n, _ in _aot.jobs(False, [target]))
    assert every and compiled == every


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1"])
def test_shards_that_there_are_not(shard, capsys):
    pytest.importorskip("triton", reason="triton is not installed")
    from fastbert.kernels import _aot

    with pytest.raises(SystemExit):
        _aot.main(["--all", "--shard", shard])
    assert "a shard is I/N with 1 <= I <= N" in capsys.readouterr().err


def test_unknown_target():
    pytest.importorskip("triton", reason="triton is not installed")
    done = _aot("--sample", "--target", "sm_70")
    assert done.returncode == 2 and "sm_70" in done.stderr and "gfx942" in done.stderr


def test_interpreted_kernels_are_refused():
    pytest.importorskip("triton", reason="triton is not installed")
    done = _aot("--sample", TRITON_INTERPRET="1")
    assert done.returncode != 0
    assert "TRITON_INTERPRET is set" in done.stderr and "Traceback" not in done.stderr
