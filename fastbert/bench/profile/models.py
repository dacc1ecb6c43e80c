"""What is profiled: a model by name with random weights, or a folder; as fastbert's and as transformers', with the same weights.

Models come without heads, so that layers are what is seen, and without dropout, so that results and gradients can be compared. A
step of training is forward, a linear function of the real tokens' hidden states as loss, backward; without an optimizer, whose cost
is the same for all and for every length.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbert.bench.profile.problem import Architecture, Problem
from fastbert.bench.suites._common import Maker
from fastbert.bench.suites.end_to_end import quiet_transformers
from fastbert.models.config import BertConfig
from fastbert.models.gpt_config import GPTConfig

OURS, SDPA, EAGER = "fastbert", "SDPA", "eager"
CONTENDERS = (OURS, SDPA, EAGER)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORWARD, TRAIN = "forward", "train"

_NAMED: dict[str, dict[str, int]] = {  # what differs from the configuration's defaults; layers as published
    "bert-base": {"num_hidden_layers": 12},
    "bert-large": {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096},
    "minilm": {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536},
    "gpt2": {"n_layer": 12},
}
NAMES = tuple(_NAMED)
NAMED_LAYERS = 2  # of a named model, unless asked for otherwise

#: Their positions begin behind the padding token's (fairseq's habit).
_SHIFTED_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")
_SAMPLED_TOKENS, _SAMPLED_GRADIENTS = 4096, 1 << 20  # that are compared, evenly spread


class ModelError(ValueError):
    """A model that cannot be profiled; the message is one line."""


@dataclass(frozen=True)
class Spec:
    """Everything that a process needs to make its contender."""

    model: str  # one of NAMES, or a folder
    layers: int | None  # the first so many; None: NAMED_LAYERS of a named model, all of a folder
    longest: int  # sequence to come: a named model's table of positions is made for it
    mode: str = FORWARD
    dtype: str = "fp32"
    device: str = "cpu"
    seed: int = 0

    @property
    def training(self) -> bool:
        return self.mode == TRAIN


def describe(spec: Spec) -> Architecture:
    """The numbers of the model, without making it. Raises ModelError."""
    if importlib.util.find_spec("transformers") is None:
        raise ModelError(
            "it measures against transformers, which is not installed: pip install 'fastbert-kernels[bench]'"
        )
    if spec.model in _NAMED:
        values = _named_config(spec).to_dict()
        return _architecture(values, None)
    folder = Path(spec.model)
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise ModelError(
            f"unknown model '{spec.model}': choose from {', '.join(NAMES)}, or give a folder with a config.json"
        ) from None
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise ModelError(f"{folder / 'config.json'} holds no JSON object")
    family = values.get("model_type")
    try:
        if family == "bert":
            values = BertConfig.from_dict(values).to_dict()
        elif family == "gpt2":
            values = GPTConfig.from_dict(values).to_dict()
        else:
            values = _hugging_face_config(folder)
    except Exception as error:  # transformers raises what it likes
        raise ModelError(f"cannot read the model in {folder}: {_one_line(error)}") from None
    all_layers = _first(values, "num_hidden_layers", "n_layer", "n_layers")
    if spec.layers is not None and spec.layers > all_layers:
        raise ModelError(f"--layers {spec.layers} is more than the {all_layers} layers of {spec.model}")
    positions = _first(values, "max_position_embeddings", "n_positions")
    if family in _SHIFTED_POSITIONS:
        positions -= 1 + (values.get("pad_token_id") or 0)
    found = _architecture(values, positions)
    return found if spec.layers is None else dataclasses.replace(found, layers=spec.layers)


def _first(values: dict[str, Any], *names: str) -> int:
    for name in names:
        if isinstance(values.get(name), int):
            return int(values[name])
    raise ModelError(f"its config.json has none of {', '.join(names)}: not a transformer that can be profiled")


def _architecture(values: dict[str, Any], positions: int | None) -> Architecture:
    hidden = _first(values, "hidden_size", "n_embd", "dim")
    inner = next((values[name] for name in ("intermediate_size", "n_inner", "hidden_dim") if values.get(name)), None)
    return Architecture(
        family=values["model_type"],
        layers=_first(values, "num_hidden_layers", "n_layer", "n_layers"),
        hidden=hidden,
        heads=_first(values, "num_attention_heads", "n_head", "n_heads"),
        inner=inner or 4 * hidden,
        vocabulary=_first(values, "vocab_size"),
        causal=values["model_type"] == "gpt2",
        positions=positions,
    )


def _hugging_face_config(folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    with quiet_transformers():
        return dict(AutoConfig.from_pretrained(folder).to_dict())


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _named_config(spec: Spec) -> BertConfig | GPTConfig:
    values: dict[str, Any] = dict(_NAMED[spec.model])
    layers = NAMED_LAYERS if spec.layers is None else spec.layers
    if spec.model == "gpt2":
        longest = max(spec.longest, GPTConfig.n_positions)
        return _without_dropout(GPTConfig(**{**values, "n_layer": layers, "n_positions": longest}))
    longest = max(spec.longest, BertConfig.max_position_embeddings)
    return _without_dropout(BertConfig(**{**values, "num_hidden_layers": layers, "max_position_embeddings": longest}))


def _without_dropout(config: Any) -> Any:
    names = [field.name for field in dataclasses.fields(config)]
    return dataclasses.replace(config, **{name: 0.0 for name in names if name.endswith(("dropout_prob", "_pdrop"))})


# ---- making the models, in the process that runs them ----


def _ours_by_name(spec: Spec) -> Any:
    import fastbert

    config = _named_config(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        if isinstance(config, GPTConfig):
            return fastbert.GPTModel(config)
        return fastbert.BertModel(config, add_pooling_layer=False)


def _ours_from_folder(spec: Spec, family: str) -> Any:
    import fastbert

    if family == "gpt2":
        model: Any = fastbert.GPTModel.from_pretrained(spec.model)
        count, arguments = "n_layer", {}
    elif family == "bert":
        model = fastbert.BertModel.from_pretrained(spec.model, add_pooling_layer=False)
        count, arguments = "num_hidden_layers", {"add_pooling_layer": False}
    else:
        return fastbert.optimize(_theirs_from_folder(spec, "sdpa", family))
    config = _without_dropout(model.config)
    if spec.layers is not None:
        config = dataclasses.replace(config, **{count: spec.layers})
    chosen = type(model)(config, **arguments)
    missing, _ = chosen.load_state_dict(model.state_dict(), strict=False)  # left over: the layers not asked for
    assert not missing, missing
    return chosen


def _theirs_by_name(spec: Spec, attention: str) -> Any:
    import transformers

    ours = _ours_by_name(spec)
    kind = "GPT2" if spec.model == "gpt2" else "Bert"
    config = getattr(transformers, f"{kind}Config")(**{**ours.config.to_dict(), "attn_implementation": attention})
    config.use_cache = False
    with quiet_transformers():
        made = getattr(transformers, f"{kind}Model")
        model = made(config, add_pooling_layer=False) if kind == "Bert" else made(config)
    model.load_state_dict(ours.to_checkpoint())
    return model


def _theirs_from_folder(spec: Spec, attention: str, family: str) -> Any:
    from transformers import AutoConfig, AutoModel

    with quiet_transformers():
        config = AutoConfig.from_pretrained(spec.model)
        for name, value in vars(config).items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
                setattr(config, name, 0.0)
        if spec.layers is not None:
            config.num_hidden_layers = spec.layers
        config.use_cache = False
        options = {"add_pooling_layer": False} if family == "bert" else {}
        return AutoModel.from_pretrained(
            spec.model, config=config, attn_implementation=attention, dtype=torch.float32, **options
        )


class Contender:
    """A model on its device, and one batch at a time.

    Raises:
        ModelError: fastbert or transformers does not take the model.
    """

    def __init__(self, spec: Spec, name: str) -> None:
        self.spec = spec
        self.native = False  # a model of fastbert's own classes
        architecture = describe(spec)
        attention = {SDPA: "sdpa", EAGER: "eager"}.get(name)
        named = spec.model in _NAMED
        try:
            if attention is None:
                self.native = architecture.family in ("bert", "gpt2")
                model = _ours_by_name(spec) if named else _ours_from_folder(spec, architecture.family)
            elif named:
                model = _theirs_by_name(spec, attention)
            else:
                model = _theirs_from_folder(spec, attention, architecture.family)
        except Exception as error:  # a folder may be broken in any way
            raise ModelError(f"{name} cannot take the model {spec.model}: {_one_line(error)}") from error
        self.model = model.to(spec.device, DTYPES[spec.dtype]).train(spec.training)
        self._vocabulary, self._padding = architecture.vocabulary, getattr(model.config, "pad_token_id", None) or 0
        self._probe = Maker(spec.seed, spec.device).normal(architecture.hidden)  # what the loss multiplies by

    def take(self, problem: Problem) -> None:
        """Makes the batch that `call` works on: the same ids for every contender."""
        device = self.spec.device
        ids = Maker(self.spec.seed, device).integers(
            min(1000, self._vocabulary // 2), self._vocabulary, problem.batch, problem.seq
        )
        lengths = torch.tensor(problem.lengths, device=device)
        self._real = torch.arange(problem.seq, device=device) < lengths[:, None]  # [batch, seq]
        self._ids = ids.masked_fill(~self._real, self._padding)
        # As a tokenizer that pads gives it; without padding there is none.
        self._mask = self._real.long() if problem.tokens < self._real.numel() else None

    def call(self) -> Tensor:
        """What is timed: hidden states [batch, seq, hidden]; in training with all gradients fresh in the parameters."""
        if self.spec.training:
            return self._step(self.model)
        with torch.inference_mode():
            return self._hidden(self.model)

    def _hidden(self, model: Any) -> Tensor:
        hidden: Tensor = model(self._ids, attention_mask=self._mask).last_hidden_state
        return hidden

    def _step(self, model: Any) -> Tensor:
        model.zero_grad(set_to_none=True)
        hidden = self._hidden(model)
        # Of every real token, and no function of a norm's invariants, which would have no gradient.
        scores = (hidden @ self._probe.to(hidden.dtype)).float()
        scores.masked_fill(~self._real, 0.0).sum().backward()
        return hidden.detach()

    def sample(self, hidden: Tensor, model: Any = None) -> list[Tensor]:
        """What is compared: hidden states of real tokens, and, in training, gradients of all parameters; evenly spread samples."""
        tokens = hidden[self._real]
        found = [tokens[:: -(-len(tokens) // _SAMPLED_TOKENS)].to("cpu", torch.float64)]
        if self.spec.training:
            gradients = self._gradients(self.model if model is None else model)
            step = -(-sum(each.numel() for each in gradients) // _SAMPLED_GRADIENTS)
            # Together: a key's bias has no gradient but rounding, which is no share of anything.
            found.append(torch.cat([each.flatten()[::step].to("cpu", torch.float64) for each in gradients]))
        return found

    def _gradients(self, model: Any) -> list[Tensor]:
        """In the order of transformers' names."""
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
        if self.native:
            twin = copy.deepcopy(model)  # its names are given back together with parameters alone
            for name, parameter in twin.named_parameters():
                parameter.data = found[name]
            found = twin.to_checkpoint()
        return [found[name] for name in sorted(found)]

    def exact(self) -> list[Tensor]:
        """The sample in float64, from a copy of the model."""
        model = copy.deepcopy(self.model).double()
        if self.spec.training:
            return self.sample(self._step(model), model)
        with torch.inference_mode():
            return self.sample(self._hidden(model))

    @property
    def parameters(self) -> int:
        return sum(each.numel() for each in self.model.parameters())

    def operator_by_operator(self) -> Callable[[], Tensor]:
        """`call`, for a profiler: where a CPU runs all blocks in one call that has no inner operators, these one after another."""
        from torch.overrides import BaseTorchFunctionMode

        def run() -> Tensor:
            with BaseTorchFunctionMode():  # fastbert calls its operators whenever somebody watches
                return self.call()

        return run
