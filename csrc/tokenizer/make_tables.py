"""Writes unicode_tables.cpp: what `tokenizers` does with every code point, found by asking it.

    python csrc/tokenizer/make_tables.py [FILE]

Its normalizer mixes three versions of Unicode (categories of 8.0, decompositions of 9.0, lowercase of the Rust standard
library it was compiled with), so no Unicode library gives these tables. Run it again when a release of `tokenizers` drifts:
the tests compare every code point with the installed one.
"""

import itertools
import sys
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Tokenizer, models
from tokenizers.normalizers import NFD, BertNormalizer, Lowercase
from tokenizers.pre_tokenizers import BertPreTokenizer

CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]  # a Rust string has no surrogates
SYLLABLES = range(0xAC00, 0xD7A4)  # Hangul: decomposed by arithmetic, not by a table

# Bits of a property, in the order of enum Property in unicode_tables.h.
PROPERTIES = ("clean_drop", "clean_space", "cjk", "mark", "whitespace", "punctuation", "word", "regex_space")


def bert(
    *, clean_text: bool = False, handle_chinese_chars: bool = False, strip_accents: bool = False
) -> BertNormalizer:
    return BertNormalizer(clean_text, handle_chinese_chars, strip_accents, lowercase=False)


def added_token_probe(left: str, middle: str, **options: bool) -> Callable[[int], tuple[int, int] | None]:
    """Where an added token with these options is found behind a code point: (start, end) relative to the code point."""
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.add_tokens([AddedToken(middle, normalized=False, **options)])

    def probe(code_point: int) -> tuple[int, int] | None:
        encoding = tokenizer.encode(left + chr(code_point) + middle)
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token == 1:
                return start - len(left), end - len(left)
        return None

    return probe


def properties() -> list[int]:
    clean, cjk = bert(clean_text=True), bert(handle_chinese_chars=True)
    strip, nfd, split = bert(strip_accents=True), NFD(), BertPreTokenizer()
    single_word = added_token_probe("-", "[T]", single_word=True)
    lstrip = added_token_probe("-", "[T]", lstrip=True)
    bits = [0] * 0x110000
    for c in CODE_POINTS:
        ch = chr(c)
        cleaned = clean.normalize_str(f"a{ch}b")[1:-1]
        assert cleaned in ("", " ", ch), hex(c)
        pieces = len(split.pre_tokenize_str(f"a{ch}b"))
        found = {
            "clean_drop": cleaned == "",
            "clean_space": cleaned == " ",  # of U+0020 too
            "cjk": cjk.normalize_str(f"a{ch}b") == f"a {ch} b",
            "mark": nfd.normalize_str(ch) == ch and strip.normalize_str(f"x{ch}") == "x",
            "whitespace": pieces == 2,
            "punctuation": pieces == 3,
            "word": single_word(c) is None,
            "regex_space": lstrip(c) == (0, 4),
        }
        bits[c] = sum(1 << i for i, name in enumerate(PROPERTIES) if found[name])
    return bits


def combining_classes() -> list[int]:
    """By sorting each code point against a mark of every class."""
    nfd = NFD()

    def sorts_before(a: str, b: str) -> bool:
        return a != b and nfd.normalize_str(f"a{b}{a}") == f"a{a}{b}"

    first, last = "\u0334", "\u0345"  # of the lowest and the highest class, 1 and 240
    by_class = {1: first, 240: last}
    for c in CODE_POINTS:
        ch = chr(c)
        if (k := unicodedata.combining(ch)) not in by_class and nfd.normalize_str(ch) == ch and sorts_before(ch, last):
            by_class[k] = ch
    marks = sorted(by_class.items())
    for (_, a), (_, b) in itertools.pairwise(marks):
        assert sorts_before(a, b), f"{a!r} {b!r}: the marks to compare with are out of order"
    classes = [0] * 0x110000
    for c in CODE_POINTS:
        ch = chr(c)
        if nfd.normalize_str(ch) != ch:
            continue
        if not sorts_before(ch, last):
            if sorts_before(first, ch):
                classes[c] = 240
            continue
        below = [k for k, mark in marks if sorts_before(mark, ch)]
        above = [k for k, mark in marks if sorts_before(ch, mark)]
        at_least = max(below, default=0)
        (classes[c],) = [k for k, _ in marks if at_least < k < above[0]]
    return classes


def changes(values: list[int]) -> list[int]:
    """Where the value changes: code point << 8 | value from there on."""
    return [c << 8 | v for c, v in enumerate(values) if c == 0 or v != values[c - 1]]


def mapping(normalize: Callable[[str], str]) -> list[int]:
    """Code point << 8 | length, then the code points it becomes, for each that changes."""
    flat: list[int] = []
    for c in CODE_POINTS:
        result = normalize(chr(c))
        if c not in SYLLABLES and result != chr(c):
            flat += [c << 8 | len(result), *map(ord, result)]
    return flat


def check_syllables() -> None:
    nfd = NFD()
    for c in SYLLABLES:
        i = c - SYLLABLES[0]
        jamo = [0x1100 + i // 588, 0x1161 + i % 588 // 28, 0x11A7 + i % 28]
        assert nfd.normalize_str(chr(c)) == "".join(map(chr, jamo[: 3 if i % 28 else 2])), hex(c)


def array(name: str, values: Iterable[int]) -> str:
    lines, line = [], "   "
    for value in values:
        word = f" 0x{value:x},"
        if len(line) + len(word) > 120:
            lines.append(line)
            line = "   "
        line += word
    body = "\n".join([*lines, line])
    return (
        f"const uint32_t {name}[] = {{\n{body}\n}};\nconst size_t {name}_size = sizeof({name}) / sizeof({name}[0]);\n"
    )


def main() -> None:
    default = Path(__file__).with_name("unicode_tables.cpp")
    check_syllables()
    tables = [
        array("kProperties", changes(properties())),
        array("kCombiningClasses", changes(combining_classes())),
        array("kDecompositions", mapping(NFD().normalize_str)),
        array("kLowercase", mapping(Lowercase().normalize_str)),
    ]
    header = (
        f"// Written by make_tables.py from tokenizers {tokenizers.__version__}: do not edit. See unicode_tables.h.\n"
        "// clang-format off\n"
        '#include "unicode_tables.h"\n\n'
        "namespace fastbert::unicode {\n\n"
    )
    Path(sys.argv[1] if len(sys.argv) > 1 else default).write_text(
        header + "\n".join(tables) + "\n}  // namespace fastbert::unicode\n"
    )


if __name__ == "__main__":
    main()
