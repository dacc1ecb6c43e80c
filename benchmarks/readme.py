"""Writes README's figures from the committed results, so that README cannot claim what no result file shows.

    python benchmarks/readme.py            # rewrite what stands between the markers
    python benchmarks/readme.py --check    # exit 1 where README and the results disagree

The results are benchmarks/results/<device>/*.json, each written by ``fastbert bench --json``: bench.json by ``make bench``, the
others by one suite. In README a block begins with ``<!-- results: SUITE -->`` and ends with ``<!-- end -->``.
"""

import argparse
import re
import sys
from pathlib import Path

from fastbert.bench.results import OK, CaseResult, RunResult, write_atomically

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_BLOCK = re.compile(r"(<!-- results: (?P<suite>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def load() -> list[RunResult]:
    """The committed results, by name of the device's folder and of the file."""
    files = sorted(path for path in RESULTS.glob("*/*.json") if path.parent.name != "aot")
    return [RunResult.from_json(path.read_text(encoding="utf-8")) for path in files]


def _rows(case: CaseResult, *, peers: bool) -> list[str]:
    rows = []
    for each in case.contenders:
        if each.name == case.baseline or each.status != OK or each.ratio is None or not (peers or each.role == "ours"):
            continue
        tie = "~ " if each.ratio.straddles_one else ""
        ratio = f"{tie}{each.ratio.median:.2f}× ({each.ratio.low:.2f}–{each.ratio.high:.2f})"
        error = "" if each.error is None else f"{each.error:.0e}"
        rows.append(f"| {case.group}, {case.title} | {each.name} | {case.baseline} | {ratio} | {error} |")
    return rows


def table(run: RunResult, suite: str) -> str:
    """One suite of one device in Markdown: of single operations only our own rows, of models the peers' too."""
    environment = run.environment
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    lines = [
        f"{environment['device']} ({environment['isa']}), {environment['threads']} threads, {environment['date'][:10]}; "
        f"{versions}. ~ marks a range that contains 1: no winner.",
        "",
        "| case | contender | against | times as fast (range) | error |",
        "|---|---|---|---:|---:|",
    ]
    for case in run.cases:
        if case.suite == suite:
            lines += _rows(case, peers=suite != "ops")
    return "\n".join([*lines, ""])


def render(text: str, runs: list[RunResult]) -> str:
    """README with every block written anew."""

    def block(match: re.Match[str]) -> str:
        suite = match["suite"]
        tables = "\n".join(table(run, suite) for run in runs if any(case.suite == suite for case in run.cases))
        return f"{match[1]}\n{tables}\n{match[3]}"

    return _BLOCK.sub(block, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where README is stale")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = render(before, load())
    if arguments.check:
        if before != after:
            print("README.md disagrees with benchmarks/results: run python benchmarks/readme.py", file=sys.stderr)
        return int(before != after)
    write_atomically(readme, after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
