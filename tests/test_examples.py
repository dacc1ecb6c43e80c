"""The examples run, go on where they were stopped, and leave folders that load."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastbert import WordPieceTokenizer
from fastbert.models import BertForMaskedLM, GPTForCausalLM

ROOT = Path(__file__).resolve().parents[1]


def run(name, folder, *options):
    command = [sys.executable, ROOT / "examples" / f"{name}.py", "--folder", folder, "--every", "1", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.parametrize("name, kind", [("pretrain_mlm", BertForMaskedLM), ("train_gpt", GPTForCausalLM)])
def test_example(tmp_path, name, kind):
    if name == "pretrain_mlm":
        pytest.importorskip("tokenizers")
    first = run(name, tmp_path, "--steps", "1")
    assert first.returncode == 0, first.stderr
    assert "step     1 of 1" in first.stdout and "held out" in first.stdout
    second = run(name, tmp_path, "--steps", "2")
    assert second.returncode == 0, second.stderr
    assert "going on from step 1" in second.stdout and "step     2 of 2" in second.stdout
    model = kind.from_pretrained(tmp_path / "model")
    assert not model.training
    if name == "pretrain_mlm":
        assert len(WordPieceTokenizer.from_pretrained(tmp_path / "model")) == model.config.vocab_size


def test_too_little_text(tmp_path):
    (tmp_path / "short.txt").write_text("little")
    outcome = run("train_gpt", tmp_path, "--text", str(tmp_path / "short.txt"))
    assert outcome.returncode == 1 and "has 6 characters; give at least 20000" in outcome.stderr
