"""Rotary position embedding (Su et al. 2021, RoFormer); backward is the rotation by the negative angles.

    (x1, x2) -> (x1 * cos - x2 * sin, x1 * sin + x2 * cos)

for the pairs of a head's first rotary_dim features: the halves of these features, or neighbours when interleaved.

On paper, 16384 tokens of 16 heads 64 wide in bfloat16 on H200 (4.3 TB/s): 67 MB of x and y, 4 MB of float32 angles: 17 us.
"""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import _configs
from fastbert.kernels._launch import AotCase, check_device, check_tensors, device_of, launch
from fastbert.kernels._rows import DTYPE_NAMES, dense, meta_tensor

#: Tokens are counted in 32 bits, a tile past the end included.
_MAX_TOKENS = 2**31 - 2**16


@triton.jit(do_not_specialize=["tokens", "positions"])
def _rotary_kernel(
    x,  # [batch, seq, heads, head_dim]; tokens = batch * seq
    cos,  # [positions, HALF] contiguous
    sin,  # [positions, HALF] contiguous
    position_ids,  # [tokens] or None: a token's place in its sequence
    y,  # [tokens, heads, head_dim] contiguous, written
    tokens, seq, heads, positions, batch_stride, seq_stride, head_stride,
    HALF: tl.constexpr, HEAD_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of tokens * tiles of heads. The angles are read for each head anew, but from the cache."""
    head_tiles = tl.cdiv(heads, HEADS)
    row = tl.arange(0, TOKENS * HEADS)
    token = (tl.program_id(0) // head_tiles) * TOKENS + row // HEADS
    head = (tl.program_id(0) % head_tiles) * HEADS + row % HEADS
    in_rows = (token < tokens) & (head < heads)
    place = token % seq
    x_row = x + (
        (token // seq).to(tl.int64) * batch_stride + place.to(tl.int64) * seq_stride + head.to(tl.int64) * head_stride
    )
    y_row = y + (token.to(tl.int64) * heads + head) * HEAD_DIM
    if position_ids is None:
        position = place.to(tl.int64)
    else:
        position = tl.load(position_ids + token, mask=in_rows, other=0).to(tl.int64)
        position = tl.minimum(tl.maximum(position, 0), positions - 1)  # nothing is read outside the tables

    column = tl.arange(0, HALF_BLOCK)
    in_bounds = in_rows[:, None] & (column < HALF)[None, :]
    angle = position[:, None] * HALF + column[None, :]
    c = tl.load(cos + angle, mask=in_bounds, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=in_bounds, other=0.0).to(tl.float32)
    if INVERSE:
        s = -s
    if INTERLEAVED:
        pair_column = tl.arange(0, 2 * HALF_BLOCK)
        pairs_in_bounds = in_rows[:, None] & (pair_column < 2 * HALF)[None, :]
        pairs = tl.load(x_row[:, None] + pair_column[None, :], mask=pairs_in_bounds, other=0.0)
        x1, x2 = tl.split(tl.reshape(pairs, [TOKENS * HEADS, HALF_BLOCK, 2]))
        x1, x2 = x1.to(tl.float32), x2.to(tl.float32)
        turned = tl.join((x1 * c - x2 * s).to(y.dtype.element_ty), (x1 * s + x2 * c).to(y.dtype.element_ty))
        turned = tl.reshape(turned, [TOKENS * HEADS, 2 * HALF_BLOCK])
        tl.store(y_row[:, None] + pair_column[None, :], turned, mask=pairs_in_bounds)
    else:
        x1 = tl.load(x_row[:, None] + column[None, :], mask=in_bounds, other=0.0).to(tl.float32)
        x2 = tl.load(x_row[:, None] + HALF + column[None, :], mask=in_bounds, other=0.0).to(tl.float32)
        tl.store(y_row[:, None] + column[None, :], (x1 * c - x2 * s).to(y.dtype.element_ty), mask=in_bounds)
        tl.store(y_row[:, None] + HALF + column[None, :], (x1 * s + x2 * c).to(y.dtype.element_ty), mask=in_bounds)
    if REST_BLOCK:
        rest = 2 * HALF + tl.arange(0, REST_BLOCK)
        rest_in_bounds = in_rows[:, None] & (rest < HEAD_DIM)[None, :]
        kept = tl.load(x_row[:, None] + rest[None, :], mask=rest_in_bounds, other=0.0)
        tl.store(y_row[:, None] + rest[None, :], kept, mask=rest_in_bounds)


def rotary(
    x: Tensor,  # [tokens, heads, head_dim] or [batch, seq, heads, head_dim]
    cos: Tensor,  # [positions, rotary_dim / 2]
    sin: Tensor,  # [positions, rotary_dim / 2]
    position_ids: Tensor | None,  # int [tokens] or [batch, seq]; None: 0, 1, … along the dimension before the heads
    interleaved: bool,
    inverse: bool,
) -> Tensor:
    """x rotated, like x, contiguous.

    Raises ValueError for a head_dim above 1024, more than 2**31 - 2**16 tokens or a tensor that is not on the kernels' device,
    TypeError for a dtype.
    """
    check_tensors("rotary", x=x, cos=cos, sin=sin)
    if position_ids is not None:
        check_device("rotary", "position_ids", position_ids)
    half, head_dim = cos.shape[1], x.shape[-1]
    if head_dim > _configs.MAX_ROTARY_HEAD_DIM:
        raise ValueError(
            f"rotary: head_dim is {head_dim}; the Triton kernel takes at most {_configs.MAX_ROTARY_HEAD_DIM}. "
            "Use fastbert.use_reference()."
        )
    if half == 0:
        return x.clone(memory_format=torch.contiguous_format)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return y
    sequences = x if x.dim() == 4 else x.unsqueeze(0)
    if sequences.stride(-1) != 1:
        sequences = sequences.contiguous()
    batch, seq, heads, _ = sequences.shape
    tokens = batch * seq
    if tokens > _MAX_TOKENS:
        raise ValueError(f"rotary: {tokens} tokens; the Triton kernel takes at most {_MAX_TOKENS}. Split the batch.")
    half_block = triton.next_power_of_2(half)
    rest_block = triton.next_power_of_2(head_dim - 2 * half) if head_dim > 2 * half else 0
    tile = _configs.element_tile("rotary", device_of(x))
    rows = max(tile.tile // max(2 * half_block, rest_block), 1)
    # Heads in the tile that divide their number, so that few lanes idle.
    tile_heads = next(n for n in (8, 4, 2, 1) if heads % n == 0 or n == 1) if rows >= 8 else 1
    tile_tokens = min(rows // tile_heads, triton.next_power_of_2(tokens))
    launch(
        _rotary_kernel, (triton.cdiv(tokens, tile_tokens) * triton.cdiv(heads, tile_heads),), x,
        sequences, dense(cos), dense(sin), None if position_ids is None else position_ids.reshape(-1).contiguous(), y,
        tokens, seq, heads, cos.shape[0], *sequences.stride()[:3],
        num_warps=tile.num_warps, HALF=half, HEAD_DIM=head_dim, INTERLEAVED=interleaved, INVERSE=inverse,
        TOKENS=tile_tokens, HEADS=tile_heads, HALF_BLOCK=half_block, REST_BLOCK=rest_block,
    )  # fmt: skip
    return y


def aot_cases() -> Iterator[AotCase]:
    """What is compiled ahead of time: usual and odd heads, both kinds of pairs, each dtype, packed and dense."""
    for head_dim, half in ((32, 16), (64, 32), (80, 16), (96, 48), (128, 64), (256, 128), (70, 33), (1024, 512)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for interleaved in (False, True):
                angles = meta_tensor(64, half, dtype=torch.float32)
                ids = meta_tensor(96, dtype=torch.int64)
                calls = {
                    "packed": functools.partial(
                        rotary, meta_tensor(96, 12, head_dim, dtype=dtype), angles, angles, ids, interleaved, False
                    )
                }
                if head_dim == 64:
                    dense_x = meta_tensor(2, 64, 12, head_dim, dtype=dtype)
                    calls["dense"] = functools.partial(rotary, dense_x, angles, angles, None, interleaved, True)
                for kind, call in calls.items():
                    pairs = "interleaved" if interleaved else "halves"
                    name = f"rotary-d{head_dim}-{2 * half}-{DTYPE_NAMES[dtype]}-{pairs}-{kind}"
                    yield AotCase(name, call, head_dim == 64 and dtype is torch.bfloat16 and kind == "packed")
