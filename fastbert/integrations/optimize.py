"""``fastbert.optimize``: models that people already have, made faster in place.

Every base model of a known family inside the given module gets another class, a subclass of its own, whose forward runs packed
(``fastbert.integrations.packed``). Parameters, ``state_dict``, configuration and everything around it stay what they are.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from fastbert.integrations.families import FAMILIES, Family, Unsupported, family_of
from fastbert.integrations.optimized import Optimized, OptimizedBase, optimized_class
from fastbert.integrations.packed import State
from fastbert.integrations.plan import Plan
from fastbert.nn.block import check_precision

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Replaced:
    """A model that runs packed.

    Attributes:
        path: inside the reported module; "" for itself.
        model: its class.
        family: of transformers.
        precision: of inference, see fastbert.nn.PRECISIONS.
        calls: how many were answered "packed", and how many by transformers, by the reason.
    """

    path: str
    model: str
    family: str
    precision: str
    calls: dict[str, int]

    def __str__(self) -> str:
        packed = self.calls.get("packed", 0)
        lines = [
            f"{self.path or 'the model'}: {self.model} ({self.family}), {self.precision}; calls served packed: {packed}"
        ]
        lines += [
            f"  calls answered by transformers: {count}, {reason}"
            for reason, count in self.calls.items()
            if reason != "packed"
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Kept:
    """A model of transformers that stays as it is.

    Attributes:
        path: inside the reported module; "" for itself.
        model: its class.
        reason: why.
    """

    path: str
    model: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path or 'the model'}: {self.model} is not replaced: {self.reason}"


@dataclass(frozen=True)
class Report:
    """What ``optimize`` did with a model, or would not do and why; print it.

    Attributes:
        replaced: models that run packed.
        kept: models that do not.
        pipelines: how texts get into the models of sentence-transformers.
    """

    replaced: tuple[Replaced, ...]
    kept: tuple[Kept, ...]
    pipelines: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return "\n".join(map(str, (*self.replaced, *self.kept, *self.pipelines))) or "no model of transformers is in it"


def optimize(model: Model, *, precision: str | None = None, strict: bool = False) -> Model:
    """Makes a transformers model, or every one inside a module, run on its real tokens alone. In place.

    What it computes on real tokens is what it computed before, in inference and in training; padded positions come back as zeros.
    Where a call asks for what a packed forward does not do, transformers' own forward answers; ``report`` says when that was. It is
    also what torch.compile compiles.

    Args:
        model: a base model or one with a head, of BERT, RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT, ELECTRA, ALBERT, ERNIE, MPNet
            or GPT-2, or any module that holds some. The parameters of each are on one device. It may be moved, saved, copied,
            pickled, compiled and wrapped (DDP, FSDP) afterwards.
        precision: of inference on CPUs, see fastbert.nn.PRECISIONS: "bf16" and "int8" trade exactness for speed and have no
            gradient (a call that wants one raises RuntimeError). Unless given, the parameters' own.
        strict: raises, rather than leaving out, what cannot be replaced.

    Returns:
        The same object.

    Raises:
        TypeError: model is no module.
        ValueError: nothing in it can be replaced, or with strict not everything; it is optimized already; it was compiled or
            sharded before; parameters on several devices, or without memory; an unknown precision, or a reduced one off the CPU.
            The model is then as it was.
    """
    check_precision(precision := "fp32" if precision is None else precision)
    _check_state(model)
    found, kept = _find(model)
    for path, base, _ in found:
        _check_parameters(path, base, precision)
    plans: list[tuple[nn.Module, Family, list[nn.Module]]] = []
    for path, base, family in found:
        heads = [
            module for module in model.modules() if _has_head(module) and any(base is c for c in module.children())
        ]
        reason = _why_not(base, family, heads, precision)
        if reason is None:
            plans.append((base, family, heads))
        else:
            kept.append(Kept(path, type(base).__name__, reason))
    if not plans or (strict and kept):
        raise ValueError(_nothing_to_do(model, kept))
    texts = _texts_of(model)
    if texts is not None:
        replace_tokenizers, reasons = texts.prepare(model)
        if strict and reasons:
            raise ValueError("; ".join(reasons))
    swaps: dict[nn.Module, type] = {}
    states = {}
    for base, family, heads in plans:
        swaps |= {module: optimized_class(type(module)) for module in (base, *heads)}
        states[base] = State(precision, _reads_first_column(base, family, heads))
    # From here on nothing fails, and nothing is left half done.
    for module, cls in swaps.items():
        module.__class__ = cls
    for base, state in states.items():
        base.__dict__["_fastbert"] = state
    if texts is not None:
        replace_tokenizers()
    return model


def restore(model: Model) -> Model:
    """Undoes ``optimize``: every class is again what it was. Returns the same object.

    Raises:
        TypeError: model is no module.
        ValueError: nothing in it is optimized, or it was sharded since.
    """
    _check_module(model)
    optimized = [module for module in model.modules() if isinstance(module, Optimized)]
    if not optimized:
        raise ValueError(f"{type(model).__name__} is not optimized: nothing is to be restored")
    for module in optimized:
        if type(module).__module__ != optimized_class.__module__:
            raise ValueError(
                f"{type(module).__name__} got another class after fastbert.optimize; undo that first (fully_shard cannot be)"
            )
    for module in optimized:
        module.__class__ = type(module)._fastbert_stock
        module.__dict__.pop("_fastbert", None)
    texts = _texts_of(model)
    if texts is not None:
        texts.restore(model)
    return model


@contextmanager
def optimized(model: Model, *, precision: str | None = None, strict: bool = False) -> Iterator[Model]:
    """``with fastbert.optimized(model): …`` optimizes, and restores at the end. Arguments and errors are those of ``optimize``."""
    optimize(model, precision=precision, strict=strict)
    try:
        yield model
    finally:
        restore(model)


def report(model: nn.Module) -> Report:
    """What in a module runs packed, with how its calls were answered, and what does not and why.

    Raises:
        TypeError: model is no module.
    """
    _check_module(model)
    replaced = [
        Replaced(
            path,
            type(module).__name__,
            module._fastbert_family.name,
            module._fastbert.precision,
            dict(module._fastbert.calls),
        )
        for path, module in model.named_modules()
        if isinstance(module, OptimizedBase)
    ]
    found, kept = _find(model)
    for path, base, family in found:
        reason = _why_not(base, family, [], "fp32") or "fastbert.optimize was not called"
        kept.append(Kept(path, type(base).__name__, reason))
    texts = _texts_of(model)
    return Report(tuple(replaced), tuple(kept), () if texts is None else tuple(texts.pipelines(model)))


def _texts_of(model: nn.Module) -> Any:
    """The module for models that take texts, if sentence-transformers made this one; it is imported only then."""
    if not any(type(module).__module__.startswith("sentence_transformers.") for module in model.modules()):
        return None
    return importlib.import_module("fastbert.integrations.sentence_transformers")


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}; expected a torch.nn.Module: a model of transformers, or what holds one"
        )


def _check_state(model: nn.Module) -> None:
    """Raises unless the model is as it was loaded or made."""
    _check_module(model)
    for path, module in model.named_modules():
        where = f"{path or 'the model'} ({type(module).__name__})"
        if isinstance(module, Optimized):
            raise ValueError(f"{where} is optimized already; call fastbert.restore(model) first to choose again")
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
            raise ValueError(
                f"{where} is compiled already; call fastbert.optimize(model) first and torch.compile after it"
            )
        if type(module).__name__ == "FullyShardedDataParallel" or any(
            c.__name__ == "FSDPModule" for c in type(module).__mro__
        ):
            raise ValueError(
                f"{where} is sharded already; call fastbert.optimize(model) first and fully_shard after it"
            )


def _find(model: nn.Module) -> tuple[list[tuple[str, nn.Module, Family]], list[Kept]]:
    """Base models of known families, with path and family; and what else of transformers is in a module, with the reason."""
    found: list[tuple[str, nn.Module, Family]] = []
    kept = []
    for path, module in model.named_modules():
        cls = type(module)
        if isinstance(module, Optimized) or not _is_pretrained(cls):
            continue
        family = family_of(cls)
        if family is not None and cls.__name__ == family.base:
            found.append((path, module, family))
        elif not any(_is_pretrained(type(inner)) for inner in module.modules() if inner is not module):
            base = next((f for c in cls.__mro__ if (f := family_of(c)) is not None and c.__name__ == f.base), None)
            kept.append(
                Kept(
                    path,
                    cls.__name__,
                    f"its class is no known one (known: {', '.join(family.name for family in FAMILIES)})"
                    if base is None
                    else f"it is a subclass of {base.base} that fastbert does not know",
                )
            )
    return found, kept


def _is_pretrained(cls: type) -> bool:
    return any(c.__name__ == "PreTrainedModel" and c.__module__ == "transformers.modeling_utils" for c in cls.__mro__)


def _nothing_to_do(model: nn.Module, kept: list[Kept]) -> str:
    known = ", ".join(family.name for family in FAMILIES)
    if not kept:
        return (
            f"{type(model).__name__} holds no model of transformers; fastbert.optimize takes those of {known}. For modules of your "
            "own there are fastbert.nn and fastbert.functional"
        )
    reasons = "; ".join(map(str, kept))
    return (
        f"{reasons}. fastbert.optimize takes {known}; other models of transformers run their attention on fastbert's kernels with "
        "attn_implementation='fastbert', after importing fastbert.integrations.transformers"
    )


def _check_parameters(path: str, base: nn.Module, precision: str) -> None:
    where = f"{path or 'the model'} ({type(base).__name__})"
    devices = {tensor.device for tensor in (*base.parameters(), *base.buffers())}
    if torch.device("meta") in devices:
        raise ValueError(f"{where} has parameters on the meta device, without memory; load its weights first")
    if len(devices) > 1:
        raise ValueError(
            f"{where} is on several devices: {', '.join(sorted(map(str, devices)))}; move it to one with model.to(device)"
        )
    for name, parameter in base.named_parameters():
        if type(parameter).__name__ == "DTensor":
            raise ValueError(
                f"{where}: {name} is sharded already; call fastbert.optimize(model) first and shard after it"
            )
    if precision != "fp32" and devices != {torch.device("cpu")}:
        raise ValueError(
            f"{where} is on {', '.join(map(str, devices))}, and precision {precision!r} is for inference on CPUs; convert the "
            "model there, with model.to(torch.bfloat16)"
        )


def _why_not(base: nn.Module, family: Family, heads: list[nn.Module], precision: str) -> str | None:
    """Why a base model cannot be run packed, or None."""
    for module in (base, *heads):
        if "forward" in module.__dict__:
            return (
                f"the forward of this {type(module).__name__} was replaced; call fastbert.optimize before what does so"
            )
    try:
        Plan(base, family, precision)
    except Unsupported as reason:
        return str(reason)
    return None


def _has_head(module: nn.Module) -> bool:
    family = family_of(type(module))
    return family is not None and _is_pretrained(type(module)) and type(module).__name__ != family.base


def _reads_first_column(base: Any, family: Family, heads: list[nn.Module]) -> bool:
    """Whether the pooler, or a head, reads the first position of a row, be it padding or not."""
    if family.causal:
        return False
    if getattr(base, "pooler", None) is not None:
        return True
    return any(type(head).__name__.endswith(("ForSequenceClassification", "ForMultipleChoice")) for head in heads)
