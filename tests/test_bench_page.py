"""The page of a run, its figures, and what it says of noise."""

import html.parser
import re

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from fastbert.bench import compare, figures, page, rows
from fastbert.bench.headline import HEADLINE, headlines
from fastbert.bench.timer import Spread
from tests.bench_samples import TORCH, case, contender, mixed_run, run, spread

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Reader(html.parser.HTMLParser):
    """Text, ids and references of a page; fails where elements do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.text, self.ids, self.links, self.tags, self._open = "", [], [], set(), []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [value for name, value in attributes if name in ("href", "src", "xlink:href")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if not self._open or self._open[-1] != "style":
            self.text += data


def flat(text):
    return " ".join(text.split())


def test_a_page_holds_everything_it_shows():
    found = mixed_run(interrupted=True, environment={"load": 9.0, "cores": 2})
    text = page.render(found)
    read = Reader(text)
    assert not read.tags & {"script", "link", "img", "iframe", "object"}
    assert all(link.startswith("#") and link[1:] in read.ids for link in read.links)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    shown = flat(read.text)
    for contender_ in found.cases[0].contenders:
        assert contender_.name in shown
    for expected in (
        "2.50×",
        "~1.05×",
        "WRONG",
        "onnxruntime",
        "not installed",
        "a note",
        "interrupted",
        "busy",
        "noisy",
    ):
        assert expected in shown, expected
    for value in ("commit", "command", "versions", "date"):
        assert found.environment[value] is None or str(found.environment["command"]) in shown
    assert "share of the largest value" in shown


def test_names_are_text():
    evil = "<script>alert('x')</script>&"
    found = run(case(contenders=[contender(evil, ratio=2.0)], notes=[evil], title=evil, not_measured={evil: evil}))
    read = Reader(page.render(found))
    assert "script" not in read.tags
    assert read.text.count(evil) >= 4


def test_no_winner_within_the_spread():
    name = next(iter(HEADLINE["Attention"]))
    undecided, decided = (
        page.render(run(case(name, [contender("fastbert", ratio=spread(1.2, low, 1.4))]))) for low in (0.9, 1.1)
    )
    assert 'class="faster"' not in undecided and "no winner: 0.90–1.40" in undecided and "~1.20×" in undecided
    assert 'class="faster"' in decided and "no winner" not in decided.partition("<h2")[0]


def test_a_run_of_nothing_has_a_page():
    read = Reader(page.render(run(interrupted=True)))
    assert "Nothing was measured" in read.text and "interrupted" in read.text


def test_a_comparison_stands_on_the_page():
    before, after = (run(case(contenders=[contender(ratio=ratio)])) for ratio in (2.0, 1.0))
    shown = flat(Reader(page.render(after, compare.compare(before, after, source="old.json"))).text)
    assert "slower than in old.json: 1 of 1 comparisons" in shown
    assert "2.00×1.80–2.20~1.00×0.90–1.10slower" in shown


def test_noise_is_counted_and_the_worst_named():
    def noisy(name, relative):
        wide = Spread(1.0, 1.0 - relative, 1.0 + relative, 0.5, 1.5)
        return case(name, [contender(ratio=1.05, seconds=wide)])

    quiet = case("ops/quiet/1", [contender(ratio=2.0)])
    assert rows.noise(run(quiet)) == "" and rows.warnings(run(quiet)) == []
    line = rows.noise(run(quiet, noisy("ops/b/1", 0.2), noisy("ops/a/1", 0.3), noisy("ops/c/1", 0.05)))
    assert line == (
        "3 of 4 comparisons undecided (the range contains 1); "
        "times spread by more than ±10 % in 2 of 4 cases: ops/a/1, ops/b/1"
    )
    many = rows.noise(run(*(noisy(f"ops/{index}/1", 0.5) for index in range(9))))
    assert many.endswith(" and 3 more")


def test_on_a_gpu_shares_are_those_of_the_floor():
    found = run(
        case(contenders=[contender(ratio=2.0), contender("copy", "limit", 4.0)], floor=1e-4),
        environment={"device_type": "cuda", "device": "a GPU"},
    )
    (group,) = rows.groups(found)
    assert group.share_name == "floor%"
    assert {row.contender: row.share for row in group.rows} == {"fastbert.functional": "20", "copy": "", TORCH: "10"}
    shown = flat(Reader(page.render(found)).text)
    assert "floor%" in shown and "cold L2 cache" in shown and "On CPUs only" not in shown


def test_headline_rows_are_cases():
    from fastbert.bench.cases import all_cases

    names = {each.name for each in all_cases()}
    assert {name for section in HEADLINE.values() for name in section} <= names
    found = headlines(mixed_run())
    assert found == []


def attention_run(milliseconds=10.0):
    def at(length, seconds, suite="attention"):
        ours = contender("fastbert", seconds=Spread(*[seconds] * 5))
        name = f"{suite}/forward/d64-full-S{length}-bf16"
        return case(name, [ours, contender("unmeasured", "peer")], group="forward, full, head_dim 64", flops=3 * 10**12)

    return run(at(512, milliseconds * 1e-3), at(128, 0.02), at(1024, 0.02), at(128, 0.5, suite="ops"))


def test_attention_is_drawn_by_length():
    (drawing,) = figures.attention(attention_run())
    assert drawing.name == "attention-forward-full-head-dim-64"
    series = {line.name: line for line in drawing.data}
    assert series["fastbert"].points == [(128.0, 150.0), (512.0, 300.0), (1024.0, 150.0)] and series["fastbert"].ours
    assert "unmeasured" not in series
    assert "TFLOP/s" in drawing.draw()


def test_a_figure_knows_its_values():
    (one,), (same,), (other,) = (figures.attention(attention_run(value)) for value in (10.0, 10.0, 11.0))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    text = one.file()
    assert text.startswith("<?xml") and f"<!-- values {one.fingerprint} -->" in text
    assert text == same.file()  # no date, no random names
    assert "currentColor" in text and "prefers-color-scheme" in text


@pytest.mark.parametrize("ratio", [0.5, 300.0], ids=["slower", "log-axis"])
def test_ratios_are_drawn_with_their_range(ratio):
    found = run(
        case("ops/x/1", [contender(ratio=ratio)], title="x"), case("ops/y/1", [contender(ratio=1.05)], title="y")
    )
    (drawing,) = figures.drawings(found)
    assert drawing.options["log_x"] == (ratio > 100.0)
    svg = drawing.draw()
    assert "add_layer_norm, x" in svg and "~1.05×" in svg and f"{ratio:.2f}×"[:3] in svg


def test_engines_stand_side_by_side():
    both = [contender("fastbert", ratio=4.5), contender("OpenVINO", "peer", 1.35), contender("peak", "limit", 4.6)]
    drawings = figures.engines(run(case("cpu-fp32/base", both, group="models, fp32", title="BERT-base")))
    (drawing,) = drawings
    assert drawing.name == "models" and "peak" not in drawing.data["BERT-base"]
    svg = drawing.draw()
    assert all(text in svg for text in ("BERT-base", "OpenVINO", "4.50×"))
