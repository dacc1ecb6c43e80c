"""What of a base model a packed forward reads past its modules: found once, and looked at again before every call."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fastbert.integrations.families import Family, LayerLayout, Unsupported
from fastbert.nn import BlockModules, BlockOptions, BlockWeights, transformer_block, transformer_block_by_modules

_ACTIVATIONS = {  # transformers' and torch's classes → fastbert.functional's names
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "QuickGELUActivation": "gelu_quick",
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "Tanh": "tanh",
    "LinearActivation": "none",
}
_LEAVES = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.ModuleList)
_LIBRARIES = ("transformers.activations", "transformers.pytorch_utils", "torch.nn.modules.activation")

Parameters = dict[str, Any]  # of a module, as it holds them: what stands there changes with it


class Watch:
    """Modules that have to stay what they are: in their place, of their class, without hooks or a forward of their own."""

    def __init__(self, family: Family) -> None:
        self._known = (family.modeling, *_LIBRARIES)
        self._watched: list[tuple[dict[str, Any], str, nn.Module, type, str]] = []
        self._counts: list[tuple[dict[str, Any], int, str]] = []

    def add(self, model: nn.Module, path: str) -> nn.Module:
        """The submodule, watched from now on. Raises Unsupported if it is of a class that transformers does not put there."""
        parent, _, name = path.rpartition(".")
        holder = model.get_submodule(parent)._modules
        module = model.get_submodule(path)
        kind = type(module)
        forward: Any = kind.forward
        if kind not in _LEAVES and kind.__module__ not in self._known and not is_adapter(module):
            raise Unsupported(f"{path} is a {kind.__module__}.{kind.__qualname__}")
        if kind is not nn.ModuleList and getattr(forward, "__module__", None) != kind.__module__:
            raise Unsupported(f"the forward of {kind.__qualname__} was replaced")
        self._watched.append((holder, name, module, kind, path))
        if kind is nn.ModuleList:
            self._counts.append((module._modules, len(module._modules), path))
        return module

    def add_all(self, model: nn.Module, path: str) -> None:
        """A submodule with all that it holds, adapters' insides aside. Raises Unsupported."""
        module = self.add(model, path)
        if not is_adapter(module):
            for name in module._modules:
                if module._modules[name] is not None:
                    self.add_all(model, f"{path}.{name}")

    def changed(self) -> str | None:
        """What was replaced or hooked since, or None."""
        for holder, name, module, kind, path in self._watched:
            if holder.get(name) is not module or type(module) is not kind:
                return f"{path} is a {type(holder.get(name)).__name__}"
            hooked = (
                module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
            )
            if hooked and not _only_records(module):
                return f"{path} has hooks"
            if "forward" in module.__dict__ and not _is_own_forward(module):
                return f"{path} has a forward of its own"
        for holder, count, path in self._counts:
            if len(holder) != count:
                return f"{path} has {len(holder)} modules"
        return None


def is_adapter(module: nn.Module) -> bool:
    """Whether a linear layer was wrapped by peft: called with any number of leading dimensions, it gives each row its own."""
    return any(
        c.__name__ == "BaseTunerLayer" and c.__module__ == "peft.tuners.tuners_utils" for c in type(module).__mro__
    )


def _only_records(module: nn.Module) -> bool:
    """Whether the hooks are those by which transformers records hidden states; they do nothing unless it asks for them."""
    return not (module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks) and all(
        getattr(hook, "__module__", None) == "transformers.utils.output_capturing"
        for hook in module._forward_hooks.values()
    )


def _is_own_forward(module: nn.Module) -> bool:
    """Whether the attribute is what the class has anyway; transformers 5.0 leaves it behind where it recorded."""
    forward: Any = module.__dict__["forward"]
    return getattr(forward, "__self__", None) is module and forward.__func__ is type(module).forward


class Embeddings(NamedTuple):
    """Parameters of the embeddings, as their modules hold them."""

    word: Parameters
    position: Parameters
    token_type: Parameters | None
    norm: Parameters
    eps: float
    padding_idx: int | None
    position_padding_idx: int | None
    dropout: Any


class Layer:
    """Parameters of a layer, as its modules hold them, and what else its block needs.

    Attributes:
        module: the layer.
        options: of the block.
        attention_dropout, out_dropout, down_dropout: its dropout modules; the last two may be None.
    """

    def __init__(self, module: nn.Module, layout: LayerLayout, num_heads: int, causal: bool, precision: str) -> None:
        self.module: Any = module
        parts: list[Any] = [module.get_submodule(path) for path in (*layout.qkv, layout.out, layout.up, layout.down)]
        expected = "Conv1D" if layout.transposed else "Linear"
        adapters = [part for part in parts if is_adapter(part)]
        for part in parts:
            if type(part).__name__ != expected and part not in adapters:
                raise Unsupported(f"a {type(part).__name__} stands where a {expected} is expected")
        if adapters and precision != "fp32":
            raise Unsupported(f"it has adapters, and its precision is {precision!r}")
        width = parts[-1].weight.shape[0 if not layout.transposed else 1]
        joint = sum(part.weight.shape[1 if layout.transposed else 0] for part in parts[:-3])
        if joint != 3 * width or width % num_heads:
            raise Unsupported(f"query, key and value of {num_heads} heads have {joint} channels, and the layer {width}")
        norms: list[Any] = [module.get_submodule(path) for path in (layout.attention_norm, layout.feed_forward_norm)]
        if norms[0].eps != norms[1].eps:
            raise Unsupported(f"its layer norms have eps {norms[0].eps} and {norms[1].eps}")
        activation = type(module.get_submodule(layout.activation)).__name__
        if activation not in _ACTIVATIONS:
            raise Unsupported(f"its activation is {activation}")
        self.options = BlockOptions(
            num_heads, _ACTIVATIONS[activation], norms[0].eps, layout.norm_first, causal, precision
        )
        self.attention_dropout: Any = module.get_submodule(layout.attention_dropout)
        self.out_dropout: Any = layout.out_dropout and module.get_submodule(layout.out_dropout)
        self.down_dropout: Any = layout.down_dropout and module.get_submodule(layout.down_dropout)
        *qkv, out, up, down = parts
        modules = BlockModules(tuple(qkv), out, norms[0], up, down, norms[1])
        self._modules = modules if adapters else None
        self._linears = [part._parameters for part in parts]
        self._norms = [norm._parameters for norm in norms]
        self._transposed = [_Transposed() for _ in parts] if layout.transposed else None

    def dropouts(self) -> tuple[float, float, float]:
        """Probabilities, 0 outside training: of the attention's probabilities, of its output, of the feed-forward part's."""
        attention, out, down = (
            0.0 if dropout is None or not dropout.training else dropout.p
            for dropout in (self.attention_dropout, self.out_dropout, self.down_dropout)
        )
        return attention, out, down

    def run(self, weights: BlockWeights | None, x: Tensor, **arguments: Any) -> Tensor:
        """``fastbert.nn.transformer_block`` with what ``weights`` gave, and the block's further arguments."""
        if weights is not None:
            return transformer_block(x, weights=weights, options=self.options, **arguments)
        assert self._modules is not None
        return transformer_block_by_modules(x, modules=self._modules, options=self.options, **arguments)

    def weights(self, dtype: torch.dtype) -> BlockWeights | None:
        """The parameters as they are now; None where adapters among the modules have to be called.

        Raises Unsupported unless they are plain tensors, the matrices of this dtype.
        """
        if self._modules is not None:
            return None
        matrices: list[Any] = []
        for each in self._linears:
            weight: Any = each["weight"]
            if type(weight) is not Parameter and type(weight) is not Tensor:
                raise Unsupported(f"a weight is a {type(weight).__name__}")
            if weight.dtype is not dtype:
                raise Unsupported(f"a weight is {weight.dtype} and the hidden states are {dtype}")
            matrices.append(weight)
        if self._transposed is not None:
            matrices = [view.of(weight) for view, weight in zip(self._transposed, matrices, strict=True)]
        biases = [each["bias"] for each in self._linears]
        *qkv, out, up, down = matrices
        *qkv_bias, out_bias, up_bias, down_bias = biases
        first, second = self._norms
        return BlockWeights(
            qkv[0] if len(qkv) == 1 else (qkv[0], qkv[1], qkv[2]),
            qkv_bias[0] if len(qkv) == 1 else (qkv_bias[0], qkv_bias[1], qkv_bias[2]),
            out,
            out_bias,
            first["weight"],
            first["bias"],
            up,
            up_bias,
            down,
            down_bias,
            second["weight"],
            second["bias"],
        )


class _Transposed:
    """A weight that its module holds transposed, as [out, in]; without gradients the same object at every call.

    The cache of packed weights knows a weight by identity. The view shares the weight's memory and its version.
    """

    __slots__ = ("_of", "_view")

    def __init__(self) -> None:
        self._of: Tensor | None = None
        self._view: Tensor | None = None

    def of(self, weight: Tensor) -> Tensor:
        if torch.is_grad_enabled() and weight.requires_grad:
            return weight.t()
        view = self._view
        if view is None or self._of is not weight or view.data_ptr() != weight.data_ptr():
            self._of = weight
            with torch.inference_mode(False):  # a tensor made under inference_mode has no version, and is not packed
                self._view = view = Parameter(weight.detach().t(), requires_grad=False)
        return view


class Plan:
    """How to run a base model packed. Raises Unsupported where that cannot be.

    Attributes:
        layers: in the order in which they run; shared ones repeat.
    """

    def __init__(self, model: Any, family: Family, precision: str) -> None:
        reason = family.unsupported(model)
        if reason is not None:
            raise Unsupported(reason)
        self._family = family
        self._causal = family.is_causal(model.config)
        self._model = model._modules  # a copy of torch.nn.DataParallel has another
        try:
            self._read(model, precision)
        except AttributeError as error:
            raise Unsupported(f"its modules are not those of {family.base}: {error}") from error

    def _read(self, model: Any, precision: str) -> None:
        family = self._family
        self._stack = Watch(family)
        for path in family.stack:
            if not hasattr(model, path):
                continue  # ELECTRA's projection, where embeddings have the layers' width
            self._stack.add_all(model, path)
        heads = model.config.num_attention_heads
        modules = family.layers(model)
        made = {m: Layer(m, family.layer, heads, self._causal, precision) for m in dict.fromkeys(modules)}
        self.layers = [made[module] for module in modules]
        self._tables = self._read_embeddings(model)

    def _read_embeddings(self, model: nn.Module) -> Embeddings | None:
        self._embeddings = Watch(self._family)
        path = self._family.embeddings
        if path is None:
            return None
        root: Any = model.get_submodule(path)
        if getattr(root, "use_task_id", False):
            return None  # ERNIE's fourth table
        try:
            self._embeddings.add_all(model, path)
        except Unsupported:
            return None
        word, position, norm = root.word_embeddings, root.position_embeddings, root.LayerNorm
        token_type = getattr(root, "token_type_embeddings", None)
        if any(table is not None and table.max_norm is not None for table in (word, position, token_type)):
            return None
        return Embeddings(
            word._parameters,
            position._parameters,
            None if token_type is None else token_type._parameters,
            norm._parameters,
            norm.eps,
            word.padding_idx,
            position.padding_idx,
            root.dropout,
        )

    def changed(self, model: Any) -> str | None:
        """What of the layers was replaced, hooked or set otherwise since, or None."""
        if model._modules is not self._model:
            return "the model is a replica"
        if self._family.is_causal(model.config) is not self._causal:
            return "config.is_decoder was changed"
        return self._stack.changed()

    def tables(self, model: nn.Module) -> Embeddings | None:
        """The embeddings' parameters; None where their modules have to be called."""
        if self._embeddings.changed() is not None:
            self._tables = self._read_embeddings(model)  # resize_token_embeddings makes a new table
            if self._embeddings.changed() is not None:
                return None
        tables = self._tables
        if tables is None:
            return None
        if any(type(each["weight"]) not in (Parameter, Tensor) for each in tables[:4] if each is not None):
            return None
        return tables
