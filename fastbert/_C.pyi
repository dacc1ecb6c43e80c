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
