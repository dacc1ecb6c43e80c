"""Writes what README and the devices' pages say of results from the committed result files: no figure without a file.

    python benchmarks/readme.py            # rewrite README's blocks, and README.md and the SVGs of every device's folder
    python benchmarks/readme.py --check    # change nothing; exit 1 where something disagrees with the results

The results are benchmarks/results/<device>/*.json: profile-*.json, each written by ``fastbert profile --json``, the others by
``fastbert bench --json``: bench.json, for which README's block and the figures stand, by ``make bench``, the others by one suite.
In README the block begins with ``<!-- results: headline -->``
and ends with ``<!-- end -->``. A figure carries a hash of its values: it is drawn anew, by matplotlib, only where they
changed; remove a file to have it drawn anew.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path

from fastbert.bench import figures, plots
from fastbert.bench.cases import LIMIT
from fastbert.bench.compare import COMMITTED
from fastbert.bench.figures import Drawing
from fastbert.bench.headline import headlines
from fastbert.bench.profile.figures import figures as profile_figures
from fastbert.bench.profile.result import ProfileResult
from fastbert.bench.profile.table import crossover_text, exponent_text
from fastbert.bench.profile.table import title as profile_title
from fastbert.bench.results import CaseResult, ContenderResult, RunResult, write_atomically
from fastbert.bench.rows import Group, environment_rows, groups, number, range_text, ratio_text, remarks, warnings

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ENGINES = ("cpu", "cpu-fp32")  # the suites that README shows a column an engine: the first that a device has
COMMAND = "python benchmarks/readme.py"
_PROFILE = "profile-"  # how files of `fastbert profile` begin
_HEADLINE_PROFILE = "profile-bert-base-forward.json"  # which README shows
_BLOCK = re.compile(r"(<!-- results: headline -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Device:
    """A device's folder and the runs in it, bench.json's first."""

    folder: Path
    runs: dict[str, RunResult]  # name of the file → run
    profiles: dict[str, ProfileResult]

    @property
    def main(self) -> RunResult:
        return next(iter(self.runs.values()))

    @property
    def name(self) -> str:
        environment = self.main.environment
        on_cpu = environment["device_type"] == "cpu"
        return f"{environment['device']}, {environment['threads']} threads" if on_cpu else environment["device"]

    @cached_property
    def engines(self) -> list[CaseResult]:
        """Whole models by engine: of the suite that has most of them."""
        for suite in ENGINES:
            cases = [
                case for run in self.runs.values() for case in run.cases if case.suite == suite and case.contenders
            ]
            found = [case for case in cases if case.group.startswith("models, ")]
            if found:
                return found
        return []

    @cached_property
    def engine_drawings(self) -> list[Drawing]:
        return figures.engines(replace(self.main, cases=self.engines))

    @cached_property
    def summary(self) -> list[Drawing]:
        return [*self.engine_drawings[:1], *figures.headline(self.main)]

    @cached_property
    def drawings(self) -> list[Drawing]:
        profiles = [each for drawings in self.profile_drawings.values() for each in drawings]
        return [*self.summary, *self.engine_drawings[1:], *figures.attention(self.main), *profiles]

    @cached_property
    def profile_drawings(self) -> dict[str, list[Drawing]]:
        """Name of the file → its figures, named after it."""
        return {
            name: [replace(each, name=f"{Path(name).stem}-{each.name}") for each in profile_figures(profile)]
            for name, profile in self.profiles.items()
        }


def load(results: Path = RESULTS) -> list[Device]:
    """The devices with committed runs, by name of the folder."""
    found = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir() and path.name != "aot"):
        files = sorted(folder.glob("*.json"), key=lambda path: (path.name != COMMITTED, path.name))
        content = {path.name: path.read_text(encoding="utf-8") for path in files}
        runs = {name: RunResult.from_json(text) for name, text in content.items() if not name.startswith(_PROFILE)}
        if runs:
            profiles = {
                name: ProfileResult.from_json(text) for name, text in content.items() if name.startswith(_PROFILE)
            }
            found.append(Device(folder, runs, profiles))
    return found


# ---- README ----


def headline(device: Device) -> str:
    """README's block of a device: the rows that stand for the run, and where the others are."""
    run, environment = device.main, device.main.environment
    shown = ("fastbert", "torch", "transformers", "sentence-transformers", "openvino", "onnxruntime", "ctranslate2")
    versions = ", ".join(
        f"{name} {environment['versions'][name]}" for name in shown if environment["versions"].get(name)
    )
    where = device.folder.relative_to(ROOT).as_posix()
    pictures = [f"![{each.caption}]({where}/{each.name}.svg)" for each in device.summary]
    parts = [
        f"**{device.name}** ({environment['isa']}), {environment['date'][:10]}; {versions}.",
        *_warnings(run, named=0),
        *pictures[: len(device.engine_drawings[:1])],
        *_engine_tables(device),
        *pictures[len(device.engine_drawings[:1]) :],
        _headline_table(run),
        *_headline_profile(device, where),
        f"Every row, the environment, and what was not measured: [{where}]({where}/README.md).",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _warnings(run: RunResult, **options: int) -> list[str]:
    return [f"*{word}*: {line}." for word, line in warnings(run, **options)]


def _engine_tables(device: Device) -> Iterator[str]:
    """A table a precision, a row a model, a column an engine; the fastest is bold where its range lies above all others."""
    for group, cases in groupby(device.engines, key=lambda case: case.group):
        yield _engine_table(group.removeprefix("models, "), list(cases))
    if device.engines:
        yield "Bold: the whole range above everybody else's. ~: the range contains 1, no winner."


def _engine_table(precision: str, cases: list[CaseResult]) -> str:
    names = list(dict.fromkeys(each.name for case in cases for each in _engines(case)))
    baselines = " or ".join(dict.fromkeys(case.baseline for case in cases))
    rows = []
    for case in cases:
        found = {each.name: each for each in _engines(case)}
        cells = [_engine_cell(found[name], case) if name in found else "not measured" for name in names]
        rows.append([case.title, *cells])
    return _markdown([f"whole models, {precision}: times as fast as {baselines} (range)", *names], rows)


def _engines(case: CaseResult) -> list[ContenderResult]:
    return [each for each in case.contenders if each.role != LIMIT and each.ratio is not None]


def _engine_cell(contender: ContenderResult, case: CaseResult) -> str:
    ratio = contender.ratio
    assert ratio is not None
    text = "1×" if contender.name == case.baseline else f"{ratio_text(ratio)} ({range_text(ratio)})"
    others = (each.ratio for each in _engines(case) if each is not contender)
    return f"**{text}**" if all(other is not None and ratio.low > other.high for other in others) else text


def _headline_table(run: RunResult) -> str:
    rows = []
    for section, found in groupby(headlines(run), key=lambda each: each.section):
        for each in found:
            ratio, case = each.ours.ratio, each.case
            assert ratio is not None
            others = [
                f"{other.name} {ratio_text(other.ratio)}"
                for other in case.contenders
                if other.role == "peer" and other.ratio is not None and other.name != case.baseline
            ]
            error = "" if each.ours.error is None else f"{each.ours.error:.0e}" if each.ours.error else "0"
            speed = f"{ratio_text(ratio)} ({range_text(ratio)})"
            rows.append([f"{section}: {each.title}", speed, case.baseline, ", ".join(others), error])
    if not rows:
        return ""
    header = ["", "times as fast (range)", "as", "others, times as fast as that", "error"]
    return f"{_markdown(header, rows, numbers=(1, 4))}\n\n~ marks a range that contains 1: no winner."


def _headline_profile(device: Device, where: str) -> Iterator[str]:
    profile = device.profiles.get(_HEADLINE_PROFILE)
    if profile is not None:
        yield f"How that grows with the sequence length, as `{profile.environment['command']}` finds it:"
        for each in device.profile_drawings[_HEADLINE_PROFILE]:
            yield f"![{each.caption}]({where}/{each.name}.svg)"
        yield _profile_table(profile)


def _profile_table(profile: ProfileResult) -> str:
    """A row a length, for each contender its speed against the baseline and its memory; below, how both grow."""
    names = [each.name for each in profile.points[0].contenders] if profile.points else []
    header = ["length", "batch", "real tokens"]
    header += [f"{name}, times as fast as {profile.baseline}" for name in names if name != profile.baseline]
    header += [f"{name}, MiB" for name in names]
    rows = []
    for point in profile.points:
        found = {each.name: each for each in point.contenders}
        cells = [str(point.seq), str(point.batch), f"{point.tokens:,}"]
        for name in names:
            if name != profile.baseline:
                ratio = found[name].ratio if name in found else None
                cells.append("–" if ratio is None else f"{ratio_text(ratio)} ({range_text(ratio)})")
        for name in names:
            peak = found[name].peak_bytes if name in found else None
            cells.append("–" if peak is None else number(peak / (1 << 20)))
        rows.append(cells)
    longest = profile.points[-1].seq if profile.points else 0
    growth = [
        [
            each.name,
            exponent_text(each.time),
            crossover_text(each.time_parts, longest),
            exponent_text(each.memory),
            crossover_text(each.memory_parts, longest),
        ]
        for each in profile.growth
    ]
    grown = ["growth", "time", "quadratic from", "memory", "quadratic from"]
    return "\n\n".join(filter(None, [_markdown(header, rows), _markdown(grown, growth) if growth else ""]))


def _markdown(header: list[str], rows: list[list[str]], numbers: tuple[int, ...] | None = None) -> str:
    """A table; the columns `numbers`, all but the first unless given, to the right."""
    right = range(1, len(header)) if numbers is None else numbers
    rule = ["---:" if column in right else "---" for column in range(len(header))]
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (header, rule, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- a device's page ----


def device_page(device: Device) -> str:
    """README.md of a device's folder: everything that its files have."""
    parts = [
        f"# {device.name}",
        f"Written by `{COMMAND}` from the files in this folder.",
        *(f"![{each.caption}]({each.name}.svg)" for each in device.drawings),
        *(part for name, run in device.runs.items() for part in _run_parts(name, run)),
        *(part for name, profile in device.profiles.items() for part in _profile_parts(name, profile)),
    ]
    return "\n\n".join(parts) + "\n"


def _run_parts(name: str, run: RunResult) -> Iterator[str]:
    found = remarks(run)
    yield f"## [{name}]({name})"
    yield _markdown(
        ["", ""],
        [
            [key, f"`{value}`" if key in ("command", "commit") else value]
            for key, value in environment_rows(run.environment)
        ],
        (),
    )
    yield from _warnings(run)
    for status, case, why in found.wrong:
        yield f"**{status}** {case}: {why}"
    for group in groups(run):
        yield f"### {group.suite}: {group.name}"
        if group.implementations:
            yield f"fastbert answers with {', '.join(group.implementations)}."
        yield _group_table(group)
    if found.footer:
        yield found.footer
    for title, pairs in (("Not measured", found.not_measured), ("Notes", found.notes)):
        if pairs:
            yield f"### {title}"
            yield "\n".join(f"- {what}: {line}" for what, line in pairs)


def _profile_parts(name: str, profile: ProfileResult) -> Iterator[str]:
    yield f"## [{name}]({name})"
    environment = profile.environment
    yield f"{profile_title(profile)}: `{environment['command']}`, {environment['date'][:10]}, commit `{environment['commit']}`."
    yield _profile_table(profile)
    dropped: dict[str, str] = {}
    for point in profile.points:
        for each in point.contenders:
            if each.reason:
                dropped.setdefault(each.name, f"{each.name} at {point.seq}: {each.reason}")
    if dropped:
        yield "\n".join(f"- {line}" for line in dropped.values())


def _group_table(group: Group) -> str:
    header = ["case", "contender", group.unit, "±%", "ratio", "range", group.rate_unit, group.share_name, "error"]
    rows = [
        [row.case, row.contender, row.time, row.spread, row.ratio, row.range, row.rate, row.share, row.error]
        for row in group.rows
    ]
    kept = [column for column, title in enumerate(header) if title]
    rows = [[row[column] for column in kept] for row in rows]
    return _markdown([header[column] for column in kept], rows, tuple(range(2, len(kept))))


# ---- all files ----


def texts(devices: list[Device]) -> dict[Path, str]:
    """What README and the devices' pages must say."""
    readme = ROOT / "README.md"
    block = "\n".join(headline(device) for device in devices)
    before = readme.read_text(encoding="utf-8")
    after, blocks = _BLOCK.subn(lambda match: f"{match[1]}\n{block}\n{match[2]}", before)
    if blocks != 1:
        raise SystemExit(f"{readme} has {blocks} blocks of results, and must have one")
    return {readme: after, **{device.folder / "README.md": device_page(device) for device in devices}}


def stale(devices: list[Device]) -> Iterator[tuple[Path, Drawing | None]]:
    """Figures that are missing or show other values, and files of figures that are no more (None)."""
    for device in devices:
        wanted = {device.folder / f"{each.name}.svg": each for each in device.drawings}
        for path, drawing in wanted.items():
            if not path.is_file() or f"<!-- values {drawing.fingerprint} -->" not in path.read_text(encoding="utf-8"):
                yield path, drawing
        for path in sorted(device.folder.glob("*.svg")):
            if path not in wanted:
                yield path, None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where something is stale")
    arguments = parser.parse_args()
    devices = load()
    changed = [
        (path, text)
        for path, text in texts(devices).items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    drawn = list(stale(devices))
    if arguments.check:
        for path in [*(path for path, _ in changed), *(path for path, _ in drawn)]:
            print(f"{path.relative_to(ROOT)} disagrees with benchmarks/results: run {COMMAND}", file=sys.stderr)
        return int(bool(changed or drawn))
    try:
        figures_text = [(path, None if drawing is None else drawing.file()) for path, drawing in drawn]
    except plots.PlotsUnavailable as error:
        print(error, file=sys.stderr)
        return 1
    for path, content in [*changed, *figures_text]:
        if content is None:
            path.unlink()
        else:
            write_atomically(path, content)
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
