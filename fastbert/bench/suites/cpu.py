"""The CPU engine against the engines that people serve BERTs with on CPUs: whole models, one short text, attention alone.

One random BERT, converted for every engine, and the same token ids. Every contender takes what its users have, padded ids on the
host, and gives hidden states of every token; errors are those of real tokens against transformers in float64. All get as many
threads as torch has. The limit of a case is its products' operations, those of real tokens, at the rate of oneDNN's product of
2048×768 by 768×3072 with a prepacked weight, in turn with the contenders.
"""

from __future__ import annotations

import functools
import importlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastbert.bench.cases import (
    LIMIT,
    OURS,
    PEER,
    Case,
    CaseUnavailable,
    Check,
    Contender,
    Prepared,
    Settings,
    check_against,
    first_line,
)
from fastbert.bench.suites._common import Maker, answers

_VOCABULARY = 30522
_SIZES = {
    "base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    "minilm": {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
}
_LAYERS = {"base": 12, "minilm": 6}
_FEW_LAYERS = {"base": 2, "minilm": 6}  # for the short suite: layers are alike, and so are the ratios of few
_TITLES = {"base": "BERT-base", "minilm": "MiniLM"}
# Largest error that passes, as a share of the largest value. Two and eight bits of bfloat16's and int8's own error are left to the
# depth of the model: transformers in bfloat16 is off by 2e-2, CTranslate2 in int8 by 3e-2.
_TOLERANCES = {"fp32": 1e-5, "bf16": 5e-2, "int8": 1e-1}
_PEAK_SHAPE = (2048, 768, 3072)

# Below these operations a call is short against the time that another engine's threads go on spinning.
_SHORT_FLOPS = 2e9
_SETTLE_SECONDS = 0.25

_OURS = "fastbert"
_OURS_BF16 = "fastbert bf16"
_TRANSFORMERS, _ONNX, _OPENVINO, _CTRANSLATE2 = "transformers SDPA", "ONNX Runtime", "OpenVINO", "CTranslate2"
_PEAK = "products at peak"
_CONTENDERS = {
    "fp32": (_OURS, _TRANSFORMERS, _OPENVINO, _ONNX, _CTRANSLATE2, _PEAK),
    "bf16": (_OURS, _TRANSFORMERS, _OPENVINO, _PEAK),
    "int8": (_OURS, _OURS_BF16, _CTRANSLATE2),
}


@dataclass(frozen=True)
class Problem:
    """A random model and a batch of random ids."""

    size: str
    layers: int
    batch: int
    seq: int
    real: float  # share of the positions that hold a token

    @property
    def name(self) -> str:
        share = "full" if self.real == 1.0 else "third"
        return f"{self.size}-B{self.batch}-S{self.seq}-{share}"

    @property
    def title(self) -> str:
        share = "" if self.real == 1.0 else f", {100 * self.real:.0f} % real"
        layers = "" if self.layers == _LAYERS[self.size] else f", {self.layers} layers"
        return f"{_TITLES[self.size]} {self.batch}×{self.seq}{share}{layers}"

    def lengths(self) -> list[int]:
        """Evenly spread lengths with this share of real tokens, one of them seq."""
        if self.real == 1.0:
            return [self.seq] * self.batch
        lengths = [max(1, round(2.0 * self.real * self.seq * (i + 0.5) / self.batch)) for i in range(self.batch)]
        return [*lengths[:-1], self.seq]

    def ids(self, seed: int) -> tuple[Tensor, Tensor]:
        """ids and mask, int64 [batch, seq]."""
        ids = Maker(seed, "cpu").integers(1000, _VOCABULARY, self.batch, self.seq)
        mask = (torch.arange(self.seq) < torch.tensor(self.lengths())[:, None]).long()
        return ids * mask, mask

    def product_flops(self) -> int:
        """Of the linear layers, on real tokens."""
        sizes = _SIZES[self.size]
        weights = 4 * sizes["hidden_size"] ** 2 + 2 * sizes["hidden_size"] * sizes["intermediate_size"]
        return 2 * self.layers * weights * sum(self.lengths())


def _problems(layers: dict[str, int], long: int) -> list[tuple[Problem, float]]:
    """With the seconds that measuring one may take; `long` sequences of 512 make a batch."""
    return [
        (Problem("base", layers["base"], 8, 128, 1.0), 12.0),
        (Problem("base", layers["base"], 16, 128, 1 / 3), 12.0),
        (Problem("base", layers["base"], long, 512, 1.0), 12.0),
        (Problem("minilm", layers["minilm"], 32, 128, 1 / 3), 8.0),
        (Problem("minilm", layers["minilm"], 1, 24, 1.0), 16.0),
    ]


def cases() -> list[Case]:
    found = []
    for precision in ("fp32", "bf16", "int8"):
        for problem, budget in _problems(_LAYERS, long=4):
            if precision == "int8" and problem.seq == 512:
                continue
            found.append(_model_case("cpu", problem, precision, budget))
    for problem, budget in _problems(_FEW_LAYERS, long=2):
        found.append(_model_case("cpu-fp32", problem, "fp32", budget / 2.5))
    found += [_attention_case(seq, precision) for precision in ("fp32", "bf16") for seq in (128, 512, 4096)]
    return found


def _model_case(suite: str, problem: Problem, precision: str, budget: float) -> Case:
    contenders = _CONTENDERS[precision]
    return Case(
        f"{suite}/{problem.name}-{precision}",
        suite,
        f"models, {precision}",
        problem.title,
        contenders,
        functools.partial(_prepare_model, problem, precision),
        budget_seconds=budget,
        quick_budget_seconds=budget / 4.0,
        settle_seconds=_SETTLE_SECONDS if problem.product_flops() < _SHORT_FLOPS else 0.0,
        named_only=suite == "cpu",
        cpu_only=True,
    )


# ---- the model, and its conversions ----


@functools.cache
def _hugging_face(size: str, layers: int) -> Any:
    """transformers' BertModel with random weights, float32."""
    try:
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise CaseUnavailable("transformers is not installed, and nothing else says what is right") from error
    values: dict[str, Any] = {**_SIZES[size], "attn_implementation": "sdpa"}
    config = BertConfig(vocab_size=_VOCABULARY, num_hidden_layers=layers, **values)
    config.position_embedding_type = "absolute"  # CTranslate2's converter asks for it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertModel(config, add_pooling_layer=False).eval()


@functools.cache
def _hugging_face_in(size: str, layers: int, dtype: torch.dtype) -> Any:
    import copy

    model = _hugging_face(size, layers)
    return model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)


@functools.cache
def _folder(size: str, layers: int) -> tempfile.TemporaryDirectory[str]:
    """A checkpoint of the model, which lives as long as the process."""
    from transformers import BertModel

    folder = tempfile.TemporaryDirectory(prefix="fastbert-bench-")
    model = _hugging_face(size, layers)
    with _quiet():
        with_pooler = BertModel(model.config)  # converters ask for the pooler; its output is not used
        with_pooler.load_state_dict(model.state_dict(), strict=False)
        with_pooler.save_pretrained(folder.name)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [f"word{i}" for i in range(_VOCABULARY - len(words))]
    Path(folder.name, "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    Path(folder.name, "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return folder


class _HiddenStates(torch.nn.Module):
    """What the converters trace."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


def _example() -> tuple[Tensor, Tensor]:
    return torch.ones(2, 16, dtype=torch.int64), torch.ones(2, 16, dtype=torch.int64)


@functools.cache
def _fastbert(size: str, layers: int) -> Any:
    import fastbert

    return fastbert.BertModel.from_pretrained(_folder(size, layers).name, add_pooling_layer=False)


@functools.cache
def _openvino_model(size: str, layers: int) -> Any:
    openvino = importlib.import_module("openvino")
    with _quiet():
        return openvino.convert_model(_HiddenStates(_hugging_face(size, layers)).eval(), example_input=_example())


@functools.cache
def _openvino(size: str, layers: int, precision: str, threads: int) -> Any:
    openvino = importlib.import_module("openvino")
    options = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = openvino.Core().compile_model(_openvino_model(size, layers), "CPU", options)
    return model.create_infer_request()


@functools.cache
def _onnx_session(size: str, layers: int, threads: int) -> Any:
    runtime = importlib.import_module("onnxruntime")
    importlib.import_module("onnx")  # torch's exporter needs it
    file = Path(_folder(size, layers).name, "model.onnx")
    axes = {name: {0: "batch", 1: "seq"} for name in ("ids", "mask", "hidden")}
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            _HiddenStates(_hugging_face(size, layers)).eval(),
            _example(),
            str(file),
            dynamo=False,
            input_names=["ids", "mask"],
            output_names=["hidden"],
            dynamic_axes=axes,
            opset_version=17,
        )
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    return runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


@functools.cache
def _ctranslate2(size: str, layers: int, compute_type: str, threads: int) -> Any:
    engine = importlib.import_module("ctranslate2")
    folder = Path(_folder(size, layers).name)
    converted = folder / "ctranslate2"
    if not converted.exists():
        with _quiet():
            engine.converters.TransformersConverter(str(folder)).convert(str(converted))
    return engine.Encoder(str(converted), device="cpu", compute_type=compute_type, intra_threads=threads)


class _quiet:
    """No progress bars and warnings of converters."""

    def __enter__(self) -> None:
        import warnings

        from transformers.utils import logging

        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")
        self._verbosity, self._bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *error: object) -> None:
        from transformers.utils import logging

        self._warnings.__exit__(None, None, None)
        logging.set_verbosity(self._verbosity)
        if self._bar:
            logging.enable_progress_bar()


# ---- contenders ----


def _runner(name: str, problem: Problem, precision: str, ids: Tensor, mask: Tensor) -> Callable[[], object]:
    """One call of the engine: padded hidden states. Raises ImportError where the engine is missing."""
    model, threads = (problem.size, problem.layers), torch.get_num_threads()
    if name in (_OURS, _OURS_BF16):
        ours = _fastbert(*model)
        chosen = "bf16" if name == _OURS_BF16 else precision

        def run() -> object:
            ours.precision = chosen
            with torch.inference_mode():
                return ours(ids, mask).last_hidden_state

        return run
    if name == _TRANSFORMERS:
        theirs = _hugging_face_in(*model, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision])

        def run() -> object:
            with torch.inference_mode():
                return theirs(input_ids=ids, attention_mask=mask).last_hidden_state

        return run
    host_ids, host_mask = ids.numpy(), mask.numpy()
    if name == _OPENVINO:
        request = _openvino(*model, precision, threads)
        return lambda: request.infer({0: host_ids, 1: host_mask})[0]
    if name == _ONNX:
        session = _onnx_session(*model, threads)
        return lambda: session.run(None, {"ids": host_ids, "mask": host_mask})[0]
    engine = importlib.import_module("ctranslate2")
    encoder = _ctranslate2(*model, {"fp32": "float32", "int8": "int8"}[precision], threads)
    # The views share the arrays' memory: both live in the closure.
    arrays = host_ids.astype(np.int32), np.array(problem.lengths(), dtype=np.int32)
    views = [engine.StorageView.from_array(array) for array in arrays]
    return lambda: (arrays, encoder.forward_batch(*views).last_hidden_state)[1]


def _peak(flops: int, dtype: torch.dtype) -> Callable[[], object]:
    """As many products with a prepacked weight as make up the operations."""
    rows, depth, width = _PEAK_SHAPE
    x, w = torch.ones(rows, depth, dtype=dtype), torch.ones(width, depth, dtype=dtype)
    product: Callable[[int], object] = lambda count: F.linear(x[:count], w)  # noqa: E731
    onednn = torch.ops.mkldnn
    if torch.backends.mkldnn.is_available() and hasattr(onednn, "_linear_pointwise"):
        packed = onednn._reorder_linear_weight(w, rows)
        product = lambda count: onednn._linear_pointwise(x[:count], packed, None, "none", [], "")  # noqa: E731
    all_rows = max(1, round(flops / (2 * depth * width)))

    def run() -> object:
        for _ in range(all_rows // rows):
            product(rows)
        return product(all_rows % rows) if all_rows % rows else None

    return run


_exact: dict[tuple[Problem, int], Tensor] = {}


def _float64(problem: Problem, seed: int) -> Tensor:
    """[total, hidden]"""
    key = problem, seed
    if key not in _exact:
        ids, mask = problem.ids(seed)
        model = _hugging_face_in(problem.size, problem.layers, torch.float64)
        with torch.inference_mode():
            _exact[key] = model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    return _exact[key]


def _prepare_model(problem: Problem, precision: str, settings: Settings) -> Prepared:
    if torch.device(settings.device).type != "cpu":
        raise CaseUnavailable("this suite measures CPUs: run it with --device cpu")
    ids, mask = problem.ids(settings.seed)
    real = mask.bool()
    with_padding = sum(problem.lengths()) < real.numel()

    def tokens(output: object) -> Tensor:
        hidden = output if isinstance(output, Tensor) else torch.from_numpy(np.array(output))
        return hidden.reshape(*real.shape, -1)[real]

    contenders: list[Contender] = []
    not_measured: dict[str, str] = {}
    for name in _CONTENDERS[precision]:
        if name == _PEAK:
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            contenders.append(Contender(name, LIMIT, _peak(problem.product_flops(), dtype), checked=False))
            continue
        try:
            run = _runner(name, problem, precision, ids, mask)
        except CaseUnavailable:
            raise
        except ImportError as error:
            not_measured[name] = f"{error.name or error} is not installed: pip install 'fastbert-kernels[peers]'"
            continue
        except Exception as error:  # an engine that cannot run here must not take the others with it
            not_measured[name] = first_line(error)
            continue
        ours = name in (_OURS, _OURS_BF16)
        implementation = answers("linear_act", settings.device, torch.float32) if ours else ""
        contenders.append(Contender(name, OURS if ours else PEER, run, implementation=implementation, convert=tokens))
    found = [each.name for each in contenders]
    order = (_TRANSFORMERS, _CTRANSLATE2, _OURS_BF16, _OURS)
    baseline = next(name for name in order if name in found)

    def check() -> dict[str, Check]:
        return check_against(
            contenders,
            lambda: [_float64(problem, settings.seed)],
            None,
            torch.float32,
            tolerance=_TOLERANCES[precision if _OURS_BF16 not in found else "int8"],
        )

    notes = [
        "random weights, the same for all; padded ids in, hidden states out; errors on real tokens, against float64"
    ]
    if with_padding:
        notes.append("fastbert and CTranslate2 compute real tokens only, the others padding too")
    return Prepared(
        contenders,
        baseline,
        check,
        flops=problem.product_flops(),
        items=sum(problem.lengths()),
        item_unit="tokens",
        not_measured=not_measured,
        notes=notes,
    )


# ---- attention alone ----

_HEADS, _HEAD_DIM, _TOKENS = 12, 64, 4096
_SDPA = "torch SDPA"


def _attention_case(seq: int, precision: str) -> Case:
    return Case(
        f"cpu/attention-S{seq}-{precision}",
        "cpu",
        "attention",
        f"S={seq}, {_HEADS}×{_HEAD_DIM}, {precision}",
        (_OURS, _SDPA),
        functools.partial(_prepare_attention, seq, precision),
        budget_seconds=2.0,
        named_only=True,
        cpu_only=True,
    )


def _prepare_attention(seq: int, precision: str, settings: Settings) -> Prepared:
    if torch.device(settings.device).type != "cpu":
        raise CaseUnavailable("this suite measures CPUs: run it with --device cpu")
    from fastbert import functional

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    make = Maker(settings.seed, "cpu", dtype)
    batch = _TOKENS // seq
    q, k, v = (make.normal(batch, _HEADS, seq, _HEAD_DIM) for _ in range(3))

    def no_grad(function: Callable[..., Tensor]) -> Callable[[], object]:
        def run() -> object:
            with torch.inference_mode():
                return function(q, k, v)

        return run

    contenders = [
        Contender(
            _OURS,
            OURS,
            no_grad(functional.scaled_dot_product_attention),
            implementation=answers("attention", settings.device, dtype),
        ),
        Contender(_SDPA, PEER, no_grad(F.scaled_dot_product_attention)),
    ]

    def check() -> dict[str, Check]:
        return check_against(
            contenders, lambda: [F.scaled_dot_product_attention(q.double(), k.double(), v.double())], _SDPA, dtype
        )

    return Prepared(
        contenders,
        _SDPA,
        check,
        flops=4 * batch * _HEADS * seq * seq * _HEAD_DIM,
        items=_TOKENS,
        item_unit="tokens",
    )
