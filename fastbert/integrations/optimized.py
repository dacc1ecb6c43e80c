"""The classes of optimized models, made when first asked for: ``optimized.BertModel`` stands for transformers' ``BertModel``.

Each is a subclass of the one that it stands for, with its name, and an attribute of this module, so that pickle finds it.
"""

import importlib
from typing import Any

from torch import nn

from fastbert.integrations.families import Family, family_of, stock_class
from fastbert.integrations.heads import head_forward
from fastbert.integrations.packed import State, packed_forward


class Optimized:
    """What the classes of this module are, besides models of transformers.

    Called with arguments, as type(model)(config) and type(model).from_pretrained do, they give transformers' own model.
    """

    _fastbert_stock: type

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._fastbert_stock(*args, **kwargs) if args or kwargs else super().__new__(cls)


class OptimizedBase(Optimized):
    """Those of base models."""

    _fastbert: State
    _fastbert_family: Family


def __getattr__(name: str) -> Any:
    stock = None if name.startswith("_") else stock_class(name)
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return optimized_class(stock)


def optimized_class(stock: type[nn.Module]) -> type[nn.Module]:
    """The class that stands for one of transformers'."""
    name = stock.__name__
    if name in globals():
        return globals()[name]
    family = family_of(stock)
    assert family is not None
    is_base = name == family.base
    members: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": stock.__doc__,
        "_fastbert_stock": stock,
        "forward": packed_forward(stock, family) if is_base else head_forward(stock),
    }
    if is_base:
        members["_fastbert_family"] = family
    made = type(name, (OptimizedBase if is_base else Optimized, stock), members)
    _record_outputs(made)
    globals()[name] = made
    return made


def _record_outputs(made: Any) -> None:
    """transformers looks up by a class's text what of its models can be recorded, and writes it down where one is constructed."""
    for module in ("transformers.utils.output_capturing", "transformers.utils.generic"):
        try:
            registry = importlib.import_module(module)._CAN_RECORD_REGISTRY
        except (ImportError, AttributeError):  # one of them has it, by version
            continue
        dict.__setitem__(registry, str(made), made._can_record_outputs)
        return
