"""Every line of a folder of texts against transformers: set FASTBERT_CORPORA to the folder. Skipped without."""

import json
import os
from pathlib import Path

import pytest

from fastbert.tokenizer import WordPieceTokenizer
from tests.bert_samples import minilm_folder
from tests.tokenizer_samples import outcome

FOLDER = os.environ.get("FASTBERT_CORPORA")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FOLDER, reason="FASTBERT_CORPORA names no folder")]
_BATCH = 2000
_FILES = sorted(f for f in Path(FOLDER).iterdir() if f.suffix in (".txt", ".jsonl")) if FOLDER else []


def _texts(file):
    for line in file.read_text(encoding="utf-8", errors="surrogatepass").split("\n"):
        if file.suffix == ".jsonl":
            content = json.loads(line) if line else ""
            yield from content.values() if isinstance(content, dict) else [content]
        else:
            yield line


def _call(text):
    return lambda tokenizer: tokenizer(text)


@pytest.mark.parametrize("lowercase", [True, False], ids=["uncased", "cased"])
@pytest.mark.parametrize(
    "file",
    _FILES,
    ids=lambda f: f.name,
)
def test_every_line(file, lowercase):
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    folder = minilm_folder()
    ours = WordPieceTokenizer.from_pretrained(folder, do_lower_case=lowercase)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, do_lower_case=lowercase)
    options = {"return_offsets_mapping": True, "return_special_tokens_mask": True, "verbose": False}
    texts = [text for text in _texts(file) if isinstance(text, str)]
    different = []
    for start in range(0, len(texts), _BATCH):
        batch = texts[start : start + _BATCH]
        try:
            expected = theirs(batch, **options)
        except TypeError:  # a lone surrogate somewhere
            different += [text for text in batch if outcome(_call(text), ours) != outcome(_call(text), theirs)]
            continue
        actual = ours(batch, **options)
        for i, text in enumerate(batch):
            same = all(actual[key][i] == expected[key][i] for key in expected)
            if not same or actual.word_ids(i) != expected.word_ids(i):
                different.append(text)
    print(f"{file.name}: {len(texts)} texts, {len(different)} differ")
    assert not different, f"{len(different)} of {len(texts)}, such as {different[0]!r:.300}"
