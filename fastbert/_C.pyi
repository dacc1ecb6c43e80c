"""The C++ extension (csrc/bindings.cpp). Addresses are data_ptr(), 0 for an absent tensor; strides count elements;
dtypes are 0 for float32 and 1 for bfloat16. Nothing is checked here: call the launchers in fastbert.cpu.
"""

from typing import TypedDict

class _BuildInfo(TypedDict):
    version: str
    openmp: bool
    compiler: str

def build_info() -> _BuildInfo: ...
def isas() -> list[str]:
    """Instruction sets that this machine supports, best first."""

def isa() -> str:
    """The one that answers."""

def set_isa(name: str) -> None:
    """Let another one answer, in the whole process. Raises ValueError where it is not supported."""

def philox(seed: int, offset: int, count: int) -> list[int]:
    """Words of the dropout stream from index ``offset``, a multiple of 4, on."""

def layer_norm(
    dtype: int,
    rows: int,
    width: int,
    x: int,
    x_stride: int,
    weight: int,
    bias: int,
    parameter_dtype: int,
    eps: float,
    y: int,
    mean: int,
    rstd: int,
    threads: int,
    /,
) -> None: ...
def add_layer_norm(
    dtype: int,
    rows: int,
    width: int,
    x: int,
    x_stride: int,
    residual: int,
    residual_stride: int,
    x_bias: int,
    x_bias_dtype: int,
    weight: int,
    bias: int,
    parameter_dtype: int,
    eps: float,
    dropout_p: float,
    seed: int,
    offset: int,
    y: int,
    sum: int,
    mean: int,
    rstd: int,
    threads: int,
    /,
) -> None: ...
def add_layer_norm_backward(
    dtype: int,
    rows: int,
    width: int,
    grad_y: int,
    grad_y_stride: int,
    grad_sum: int,
    grad_sum_stride: int,
    sum: int,
    sum_stride: int,
    mean: int,
    rstd: int,
    weight: int,
    parameter_dtype: int,
    dropout_p: float,
    seed: int,
    offset: int,
    dx: int,
    dresidual: int,
    dx_bias: int,
    dweight: int,
    dbias: int,
    threads: int,
    /,
) -> None: ...
def attention(
    dtype: int,
    shape: tuple[int, ...],  # batch, heads, kv_heads, seq_q, seq_k, head_dim, value_dim, packed tokens of q
    q: int,
    q_strides: tuple[int, ...],  # [batch, head, token, element], packed [token, head, element]
    k: int,
    k_strides: tuple[int, ...],
    v: int,
    v_strides: tuple[int, ...],
    cu_seqlens_q: int,  # 0: dense
    cu_seqlens_k: int,
    mask_kind: int,  # 0 none, 1 uint8, 2 float32
    mask: int,
    mask_strides: tuple[int, ...],  # [batch, head, q, k]
    padding: int,
    padding_strides: tuple[int, ...],  # [batch, k]
    slopes: int,
    slopes_batch: int,
    scale: float,
    left: int,
    right: int,
    bottom_right: bool,
    dropout_p: float,
    seed: int,
    offset: int,
    out: int,
    lse: int,
    threads: int,
    /,
) -> None: ...

# Linear layers. Precisions are 0 for fp32, 1 for bf16 and 2 for int8; activations those of fastbert.cpu.linear.

def linear_packed_bytes(precision: int, out: int, in_features: int, /) -> int:
    """Of a packed weight, for the current instruction set."""

def linear_pack(
    precision: int,
    weight: int,
    dtype: int,
    stride: int,
    out: int,
    in_features: int,
    packed: int,
    threads: int,
    /,
) -> None: ...
def linear(
    precision: int,
    rows: int,
    out: int,
    in_features: int,
    x: int,
    x_dtype: int,
    x_stride: int,
    packed: int,
    bias: int,
    bias_dtype: int,
    activation: int,
    residual: int,
    residual_dtype: int,
    residual_stride: int,
    y: int,
    y_dtype: int,
    y_stride: int,
    threads: int,
    /,
) -> None: ...
def fingerprint(data: int, nbytes: int, /) -> int:
    """Of a few samples of memory."""

_Vector = tuple[int, int]  # address, dtype

class Block:
    """A transformer block on packed weights, see csrc/cpu/block.h."""

    def __init__(
        self,
        precision: int,
        stream_dtype: int,
        heads: int,
        activation: int,
        eps: float,
        norm_first: bool,
        causal: bool,
        linears: list[tuple[int, int, int, _Vector, list[tuple[int, int, int]]]],  # out, in, packed, bias, originals
        norms: list[_Vector],
        /,
    ) -> None: ...
    def run(self, rows: int, x: int, cu_seqlens: int, batch: int, max_seqlen: int, y: int, threads: int, /) -> int: ...

def attention_decode(
    dtype: int,
    shape: tuple[int, ...],  # batch, heads, kv_heads, seq_q, capacity, head_dim, value_dim
    q: int,
    q_strides: tuple[int, ...],  # [batch, token, head, element]
    k: int,
    k_strides: tuple[int, ...],
    v: int,
    v_strides: tuple[int, ...],
    lengths: int,
    slopes: int,
    slopes_batch: int,
    scale: float,
    left: int,
    out: int,
    lse: int,
    threads: int,
    /,
) -> None: ...
