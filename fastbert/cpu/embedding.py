"""The sum of three embeddings, its layer norm and dropout, in C++ (csrc/cpu/embedding*.cpp)."""

import torch
from torch import Tensor  # torch comes first: the extension then shares its OpenMP threads
from torch.nn import Parameter

from fastbert import _C
from fastbert.cpu._launch import (
    DTYPE_NUMBERS,
    address,
    dtype_number,
    matrix,
    nothing,
    parameters_dtype,
    seed_number,
    vector,
)

_Table = tuple[Tensor, Tensor] | None  # the table and the ids, as C++ reads them


def embedding_layer_norm(
    input_ids: Tensor,  # int [...]
    position_ids: Tensor | None,  # int [...]
    token_type_ids: Tensor | None,  # int [...]
    word: Tensor,  # [vocabulary, width]
    position: Tensor | None,  # [positions, width]
    token_type: Tensor | None,  # [types, width]
    weight: Tensor | None,  # [width]
    bias: Tensor | None,  # [width]
    eps: float,
    dropout_p: float,
    seed: Tensor | None,  # int64 [1]
    offset: int,
    save_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [..., width]; mean [...], rstd [...] float32 when save_stats, else [0].

    Args:
        input_ids, position_ids, token_type_ids: not looked at here: the operator has checked them against the tables.
        word, position, token_type: float32 or bfloat16, all the same.
        weight, bias: word's dtype or float32, both the same.
        seed, offset: of the dropout stream (fastbert/reference/dropout.py); not read when dropout_p is 0.

    Raises:
        NotImplementedError: word has another dtype.
        TypeError: the dtypes of weight and bias.
        ValueError: shapes, the seed or the offset do not fit.
    """
    operation = "embedding_layer_norm"
    dtype, width, tables = _tables(
        operation, input_ids, (word, input_ids), (position, position_ids), (token_type, token_type_ids)
    )
    parameter_dtype = parameters_dtype(operation, word, weight, bias)
    weight, bias = vector(operation, "weight", weight, width), vector(operation, "bias", bias, width)
    key = seed_number(operation, dropout_p, seed, offset)
    shape = input_ids.shape
    y = torch.empty((*shape, width), dtype=word.dtype)
    if save_stats:
        mean = torch.empty(shape, dtype=torch.float32)
        rstd = torch.empty_like(mean)
    else:
        mean, rstd = nothing(), nothing()
    words, positions, types = map(_addresses, tables)
    _C.embedding_layer_norm(
        dtype,
        input_ids.numel(),
        width,
        words,
        positions,
        types,
        address(weight),
        address(bias),
        parameter_dtype,
        eps,
        dropout_p,
        key,
        offset,
        y.data_ptr(),
        mean.data_ptr(),  # 0 when empty
        rstd.data_ptr(),
        torch.get_num_threads(),
    )
    return y, mean, rstd


def embed_directly(
    input_ids: Tensor,  # int64 [...]
    position_ids: Tensor | None,  # int64 [...]
    token_type_ids: Tensor | None,  # int64 [...]
    word: Tensor,  # [vocabulary, width]
    position: Tensor | None,  # [positions, width]
    token_type: Tensor | None,  # [types, width]
    weight: Tensor | None,  # [width]
    bias: Tensor | None,  # [width]
    eps: float,
) -> Tensor | None:
    """y [..., width], from arguments that nobody has looked at.

    None for whatever is not the common case, contiguous and of one dtype, and for all that is wrong: the operator takes the one and
    says what is the matter with the other.
    """
    for each in (input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias):
        if each is not None and not (
            type(each) in (Tensor, Parameter) and each.is_cpu and each.is_contiguous() and not each.is_neg()
        ):
            return None
    dtype, shape = word.dtype, input_ids.shape
    if dtype not in DTYPE_NUMBERS or word.dim() != 2 or word.shape[1] == 0:
        return None
    width = word.shape[1]
    parameter_dtype = dtype if weight is None else weight.dtype
    for parameter in (weight, bias):
        if parameter is not None and (parameter.dtype is not parameter_dtype or parameter.shape != (width,)):
            return None
    if parameter_dtype is not dtype and parameter_dtype is not torch.float32:
        return None
    if token_type is not None and token_type_ids is None:
        token_type_ids = torch.zeros_like(input_ids)
    addresses: list[tuple[int, int, int]] = []
    for table, ids in ((word, input_ids), (position, position_ids), (token_type, token_type_ids)):
        if table is None and ids is None:
            addresses.append((0, 0, 0))
            continue
        if table is None or ids is None or table.dtype is not dtype or ids.dtype is not torch.int64:
            return None
        if table.dim() != 2 or table.shape[1] != width or ids.shape != shape:
            return None
        at = ids.data_ptr()
        if not _C.ids_in_range(at, ids.numel(), table.shape[0]):
            return None
        addresses.append((table.data_ptr(), width, at))
    words, positions, types = addresses
    y = torch.empty((*shape, width), dtype=dtype)
    _C.embedding_layer_norm(
        DTYPE_NUMBERS[dtype],
        input_ids.numel(),
        width,
        words,
        positions,
        types,
        address(weight),
        address(bias),
        DTYPE_NUMBERS[parameter_dtype],
        eps,
        0.0,
        0,
        0,
        y.data_ptr(),
        0,
        0,
        torch.get_num_threads(),
    )
    return y


def embedding_layer_norm_backward(
    grad_y: Tensor,  # [..., width]
    input_ids: Tensor,  # int [...]
    position_ids: Tensor | None,  # int [...]
    token_type_ids: Tensor | None,  # int [...]
    word: Tensor,  # [vocabulary, width]
    position: Tensor | None,  # [positions, width]
    token_type: Tensor | None,  # [types, width]
    mean: Tensor,  # [...]
    rstd: Tensor,  # [...]
    weight: Tensor | None,  # [width]
    dropout_p: float,
    seed: Tensor | None,  # int64 [1]
    offset: int,
    padding_idx: int,  # this row of word gets no gradient; −1: every row does
    needs: list[bool],  # dword, dposition, dtoken_type, dweight, dbias
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the tables and of weight and bias, in their shapes, float32; [0] for what is not needed.

    The tokens of a row of a table are summed in their order, so that the sums are the same bit for bit for any number
    of threads. Raises as embedding_layer_norm does.
    """
    operation = "embedding_layer_norm_backward"
    dtype, width, tables = _tables(
        operation, input_ids, (word, input_ids), (position, position_ids), (token_type, token_type_ids)
    )
    parameter_dtype = parameters_dtype(operation, word, weight)
    weight = vector(operation, "weight", weight, width)
    key = seed_number(operation, dropout_p, seed, offset)
    if grad_y.shape != (*input_ids.shape, width) or grad_y.dtype is not word.dtype or grad_y.device != word.device:
        raise ValueError(
            f"{operation}: grad_y is {list(grad_y.shape)} {grad_y.dtype}; expected {[*input_ids.shape, width]} {word.dtype}"
        )
    tokens = input_ids.numel()
    if mean.dtype is not torch.float32 or rstd.dtype is not torch.float32 or {mean.numel(), rstd.numel()} != {tokens}:
        raise ValueError(
            f"{operation}: mean is {list(mean.shape)} {mean.dtype} and rstd {list(rstd.shape)} {rstd.dtype}; expected "
            f"{tokens} elements of torch.float32 each. Call the forward operation with save_stats=True."
        )
    results = [
        torch.empty(table.shape, dtype=torch.float32) if table is not None and needed else nothing()
        for table, needed in zip((word, position, token_type), needs, strict=False)
    ]
    dweight, dbias = (torch.empty(width, dtype=torch.float32) if needed else nothing() for needed in needs[3:])
    dwords, dpositions, dtypes = ((result.data_ptr(), result.shape[0]) for result in results)  # 0 when empty
    words, positions, types = map(_addresses, tables)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    grad_y, grad_y_stride = matrix(grad_y)
    _C.embedding_layer_norm_backward(
        dtype,
        tokens,
        width,
        words,
        positions,
        types,
        grad_y.data_ptr(),
        grad_y_stride,
        mean.data_ptr(),
        rstd.data_ptr(),
        address(weight),
        parameter_dtype,
        dropout_p,
        key,
        offset,
        padding_idx,
        dwords,
        dpositions,
        dtypes,
        dweight.data_ptr(),  # 0 when empty
        dbias.data_ptr(),
        torch.get_num_threads(),
    )
    return results[0], results[1], results[2], dweight, dbias


def _tables(
    operation: str, input_ids: Tensor, *tables: tuple[Tensor | None, Tensor | None]
) -> tuple[int, int, list[_Table]]:
    """The number of the tables' dtype, their width, and the tables with their ids as C++ reads them."""
    word = tables[0][0]
    assert word is not None
    dtype = dtype_number(operation, word)
    ready: list[_Table] = []
    for table, ids in tables:
        if table is None or ids is None:
            if table is not None or ids is not None:
                raise ValueError(f"{operation}: a table and its ids come together; one of them is missing")
            ready.append(None)
            continue
        if table.dim() != 2 or table.shape[1] != word.shape[-1] or table.dtype is not word.dtype:
            raise ValueError(
                f"{operation}: a table is {list(table.shape)} {table.dtype}; expected [entries, {word.shape[-1]}] {word.dtype}"
            )
        if ids.shape != input_ids.shape or ids.is_floating_point() or ids.device != word.device:
            raise ValueError(
                f"{operation}: ids are {list(ids.shape)} {ids.dtype} on {ids.device}; expected integers "
                f"{list(input_ids.shape)} on {word.device}"
            )
        ready.append((matrix(table)[0], ids.to(torch.int64).contiguous()))
    return dtype, word.shape[1], ready


def _addresses(table: _Table) -> tuple[int, int, int]:
    if table is None:
        return 0, 0, 0
    rows, ids = table
    return rows.data_ptr(), rows.stride(0), ids.data_ptr()
