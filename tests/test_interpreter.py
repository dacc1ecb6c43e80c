"""Runs tests/interpreter, one process a file: Triton's interpreter must be switched on before triton is imported."""

import ast
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "tests" / "interpreter").glob("test_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_the_interpreter(file, tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    result = tmp_path / "result.xml"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider", f"--junitxml={result}"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

    # Nothing is skipped in silence: every test function of the file ran, and every case of it passed.
    cases = list(ElementTree.parse(result).iter("testcase"))
    not_passed = [case.get("name") for case in cases if len(case) and case[0].tag != "properties"]
    assert not not_passed
    ran = {str(case.get("name")).partition("[")[0] for case in cases}
    written = {
        node.name
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert ran == written


def test_there_are_interpreter_tests():
    assert FILES
