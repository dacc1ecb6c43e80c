"""Models that are read from and written to Hugging Face folders: what BERT, GPT and their heads share."""

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.utils._pytree
from torch import Tensor, nn

from fastbert.models import checkpoint
from fastbert.models.checkpoint import Tensors
from fastbert.nn import check_precision, initialize
from fastbert.nn.inference import InferenceBlock
from fastbert.nn.layer import freeable

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SHOWN = 5  # names in an error message


@dataclass(frozen=True)
class Stored:
    """Where a parameter stands in a checkpoint: parts, one below the other in ours, and how they lie there."""

    names: tuple[str, ...]
    transposed: bool = False  # [in, out], as GPT-2's


Table = dict[str, Stored]  # our parameter → Hugging Face's


def exportable(output: type) -> type:
    """A NamedTuple that torch.export can write into a file."""
    register = getattr(torch.utils._pytree, "_register_namedtuple", None)
    if register is not None:
        register(output, serialized_type_name=f"{output.__module__}.{output.__qualname__}")
    return output


def linear_or_norm(ours: str, *theirs: str, transposed: bool = False) -> Table:
    """Weight and bias of one module of ours, which is one or several of theirs."""
    return {
        f"{ours}.weight": Stored(tuple(f"{name}.weight" for name in theirs), transposed),
        f"{ours}.bias": Stored(tuple(f"{name}.bias" for name in theirs)),
    }


class PretrainedModel(nn.Module):
    """A module that knows its Hugging Face folder.

    A subclass has the name of its architecture there, and says under which names its parameters are stored.
    """

    architecture: ClassVar[str]
    family: ClassVar[str] = "BERT"
    first_tensor: ClassVar[str] = "embeddings.word_embeddings.weight"  # for an error message
    config: Any
    gradient_checkpointing = False

    @classmethod
    def _config_from(cls, values: Mapping[str, Any]) -> Any:
        """The configuration from a config.json. Raises ValueError where it describes another architecture."""
        raise NotImplementedError

    @classmethod
    def _table(cls, config: Any, **arguments: Any) -> Table:
        """What every checkpoint has to have."""
        raise NotImplementedError

    @classmethod
    def _head_table(cls, config: Any) -> Table:
        """What starts anew where the checkpoint has none of it."""
        return {}

    @classmethod
    def _canonical(cls, in_files: list[str], folder: Path) -> dict[str, str]:
        """Hugging Face's names of the tensors that a model of this kind reads → their names in the files."""
        raise NotImplementedError

    @classmethod
    def _is_known(cls, name: str, **arguments: Any) -> bool:
        """Whether a stored tensor that the tables lack may be left out in silence."""
        return False

    @classmethod
    def _hint(cls, missing: list[str]) -> str:
        """A way out, where these tensors are missing."""
        return ""

    @classmethod
    def _load(
        cls,
        path_or_hub_id: str | os.PathLike[str],
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        revision: str | None,
        changes: Mapping[str, Any],
        **arguments: Any,  # of the constructor
    ) -> Self:
        if dtype is not None and dtype not in FLOATS:
            error = ValueError if isinstance(dtype, torch.dtype) else TypeError
            raise error(f"dtype is {dtype!r}; expected None or one of {', '.join(map(str, FLOATS))}")
        folder = checkpoint.find_folder(path_or_hub_id, revision)
        values = checkpoint.read_config(folder)
        try:
            config = cls._config_from(values)
            if changes:
                config = config.changed(**changes)
        except ValueError as reason:
            raise ValueError(f"{folder / checkpoint.CONFIG}: {reason}") from reason
        tensors = checkpoint.open_tensors(folder)
        names = cls._match(tensors.names(), folder, config, **arguments)
        with torch.device("meta"):  # no memory and no random numbers for what the checkpoint fills
            model = cls(config, **arguments)
        model._fill(tensors, names, folder, dtype, device)
        return model.eval()

    @classmethod
    def _match(
        cls, in_files: list[str], folder: Path, config: Any, **arguments: Any
    ) -> dict[str, tuple[list[str], bool]]:
        """Our parameter → its parts' names in the files, and whether they are transposed there.

        Raises ValueError naming what is missing, left over or twice there: before there is a model, as a damaged config may ask
        for more layers than could ever be built.
        """
        stored = cls._canonical(in_files, folder)
        if not stored:
            raise ValueError(
                f"{folder} has none of a {cls.family}'s tensors, such as {cls.first_tensor}; "
                f"it has {_some(sorted(in_files)) or 'no tensor'}"
            )
        if config.num_hidden_layers > len(stored):
            raise ValueError(
                f"{folder} has {len(stored)} tensors; its config asks for {config.num_hidden_layers} layers (num_hidden_layers)"
            )
        table, head = cls._table(config, **arguments), cls._head_table(config)
        wanted = {name for entry in table.values() for name in entry.names}
        missing = sorted(wanted - stored.keys())
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing)} of the {len(wanted)} tensors its config asks for: "
                f"{_some(missing)}{cls._hint(missing)}"
            )
        found, fresh = dict(table), set()
        for ours, entry in head.items():
            present = [name in stored for name in entry.names]
            if all(present):
                found[ours] = entry
            else:
                fresh.add(_module_of(ours))
        halves = sorted(fresh & {_module_of(ours) for ours in found})
        if halves:
            raise ValueError(f"{folder} has a part of {cls.__name__}'s {halves[0]} and lacks the rest")
        in_head = {name for entry in head.values() for name in entry.names}
        extra = sorted(name for name in stored.keys() - wanted - in_head if not cls._is_known(name, **arguments))
        if extra:
            raise ValueError(f"{folder} has {len(extra)} tensors that its config has no place for: {_some(extra)}")
        return {ours: ([stored[name] for name in entry.names], entry.transposed) for ours, entry in found.items()}

    @torch.no_grad()
    def _fill(
        self,  # on the meta device
        tensors: Tensors,
        names_in_files: dict[str, tuple[list[str], bool]],  # from _match
        folder: Path,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        """Gives every parameter its memory and the checkpoint's values.

        Raises ValueError naming what is of another shape than the configuration says, or no float.
        """
        parameters = dict(self.named_parameters())
        stored: dict[str, list[Tensor]] = {}
        for ours, (names, transposed) in names_in_files.items():
            shape = list(parameters[ours].shape)
            shape[0] //= len(names)
            stored[ours] = []
            for name in names:
                part = tensors.read(name)
                expected = shape[::-1] if transposed else shape
                if list(part.shape) != expected:
                    raise ValueError(f"{folder}: {name} has shape {list(part.shape)}; the config expects {expected}")
                if part.dtype not in FLOATS:
                    raise ValueError(
                        f"{folder}: {name} is {part.dtype}; expected floating point (quantized checkpoints are not read)"
                    )
                stored[ours].append(part.t() if transposed else part)
        # As stored; where a file mixes dtypes the widest, which loses nothing.
        dtype = dtype or reduce(torch.promote_types, {part.dtype for parts in stored.values() for part in parts})
        for ours, parameter in parameters.items():
            # One copy out of the file, which may be mapped into memory: to the dtype, the device and the merged place at
            # once.
            whole = torch.empty(parameter.shape, dtype=dtype, device=device)
            parts = stored.get(ours, [])
            for place, part in zip(whole.chunk(max(len(parts), 1)), parts, strict=bool(parts)):
                place.copy_(part)
            self.get_submodule(_module_of(ours)).register_parameter(ours.rpartition(".")[2], nn.Parameter(whole))
        fresh = sorted(parameters.keys() - stored.keys())
        if not fresh:
            return
        for ours in fresh:
            initialize(self.get_submodule(_module_of(ours)), self.config.initializer_range)
        warnings.warn(
            f"{folder} lacks parts of a {type(self).__name__}, which start with random weights, to be trained: {_some(fresh)}",
            stacklevel=4,
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes config.json and model.safetensors, which transformers' model of the same kind loads with the same outputs.

        The folder is made if need be; each file appears whole or not at all.
        """
        config = self.config.to_dict()
        config.pop("torch_dtype", None)
        config["architectures"] = [self.architecture]
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        checkpoint.write_folder(Path(folder).expanduser(), config, self.to_checkpoint())

    def to_checkpoint(self) -> dict[str, Tensor]:
        """The parameters under Hugging Face's names."""
        for module in self.modules():
            if isinstance(module, InferenceBlock):
                module.refuse("be saved")
        tensors: dict[str, Tensor] = {}
        table = {**self._table(self.config, **self._arguments()), **self._head_table(self.config)}
        parameters = dict(self.named_parameters())
        assert table.keys() == parameters.keys()
        for ours, entry in table.items():
            parts = parameters[ours].detach().chunk(len(entry.names))
            tensors.update(zip(entry.names, (part.t() if entry.transposed else part for part in parts), strict=True))
        return tensors

    def _arguments(self) -> dict[str, Any]:
        """The constructor's arguments that decide which parameters there are."""
        return {}

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """In training every layer's activations are computed again in the backward pass instead of kept.

        The arguments are those that transformers' Trainer passes: activation_checkpointing_kwargs may say ``use_reentrant``, which
        is False here anyway; every_n_layers is 1 and offload False. Raises ValueError for others.
        """
        given = activation_checkpointing_kwargs or {}
        others = {name: value for name, value in given.items() if name != "use_reentrant"}
        if others:
            raise ValueError(f"the keywords of checkpointing are {others}; expected nothing but use_reentrant")
        if every_n_layers != 1 or offload:
            raise ValueError(
                f"every_n_layers is {every_n_layers} and offload {offload}; expected 1 and False: all layers are computed again"
            )
        self._set_gradient_checkpointing(True)

    def activation_checkpointing_disable(self) -> None:
        self._set_gradient_checkpointing(False)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """`activation_checkpointing_enable` under transformers' older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        """`activation_checkpointing_disable` under transformers' older name."""
        self.activation_checkpointing_disable()

    def _set_gradient_checkpointing(self, enabled: bool) -> None:
        for module in self.modules():
            if isinstance(module, PretrainedModel):
                module.gradient_checkpointing = enabled


class StackOfBlocks(PretrainedModel):
    """A model whose ``layers`` are transformer blocks; its constructor sets ``_precision``, and theirs."""

    layers: nn.ModuleList
    _precision: str

    @property
    def precision(self) -> str:
        return self._precision

    @precision.setter
    def precision(self, precision: str) -> None:
        check_precision(precision)
        for layer in self.layers:
            layer.precision = precision  # type: ignore[assignment]
        self._precision = precision

    def free_weights(self) -> int:
        """For inference on a CPU alone: the layers keep packed weights in their precision, and give their own memory back.

        Set `precision` before: of the layers' float32 parameters "int8" leaves about a quarter, "bf16" half, "fp32" all, once
        instead of twice. From then on the layers have no parameters: training, saving, moving, another precision and generation
        with a cache raise RuntimeError. `fastbert.packed_weights_info` reports what is left.

        Returns:
            the bytes that the layers' parameters held. Memory goes where nobody else holds them.

        Raises:
            ValueError: the model is in training, not on a CPU, or a layer has hooks, adapters or exchanged parts. Nothing has
                changed then.
        """
        if all(isinstance(layer, InferenceBlock) for layer in self.layers):
            return 0
        held = sum(parameter.nbytes for parameter in self.layers.parameters())
        layers = [freeable(layer) for layer in self.layers]  # before anything is packed
        self.layers = nn.ModuleList([InferenceBlock(layer.weights(), layer.options) for layer in layers])
        return held

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for layer in self._freed():  # before anything has moved
            layer.check_move(fn)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Self:
        for layer in self._freed():  # before anything is in training
            layer.train(mode)
        return super().train(mode)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        for layer in self._freed():  # before anything is loaded
            layer.refuse("take other weights")
        super()._load_from_state_dict(*arguments)

    def _freed(self) -> list[InferenceBlock]:
        return [layer for layer in self.layers if isinstance(layer, InferenceBlock)]

    def extra_repr(self) -> str:
        return f"dtype={self.dtype}, device={self.device}, precision={self.precision!r}"


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
