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
def bias_gelu(
    dtype: int,
    gelu: int,
    rows: int,
    width: int,
    x: int,
    x_stride: int,
    bias: int,
    bias_dtype: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def bias_gelu_backward(
    dtype: int,
    gelu: int,
    rows: int,
    width: int,
    grad_y: int,
    grad_y_stride: int,
    x: int,
    x_stride: int,
    bias: int,
    bias_dtype: int,
    dx: int,
    dbias: int,
    threads: int,
    /,
) -> None: ...
def softmax(
    dtype: int,
    rows: int,
    columns: int,
    x: int,
    x_stride: int,
    scale: float,
    mask: int,
    mask_type: int,
    sizes: list[int],
    strides: list[int],
    causal_rows: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def softmax_backward(
    dtype: int,
    rows: int,
    columns: int,
    grad_y: int,
    grad_y_stride: int,
    y: int,
    y_stride: int,
    scale: float,
    dx: int,
    threads: int,
    /,
) -> None: ...
def cross_entropy(
    dtype: int,
    rows: int,
    classes: int,
    logits: int,
    logits_stride: int,
    target: int,
    ignore_index: int,
    label_smoothing: float,
    losses: int,
    lse: int,
    threads: int,
    /,
) -> None: ...
def cross_entropy_backward(
    dtype: int,
    rows: int,
    classes: int,
    grad_losses: int,
    grad_losses_stride: int,
    logits: int,
    logits_stride: int,
    target: int,
    lse: int,
    ignore_index: int,
    label_smoothing: float,
    dlogits: int,
    threads: int,
    /,
) -> None: ...
def rotary(
    dtype: int,
    batch: int,
    seq: int,
    heads: int,
    head_dim: int,
    x: int,
    batch_stride: int,
    seq_stride: int,
    head_stride: int,
    pairs: int,
    cos: int,
    sin: int,
    table_dtype: int,
    cos_stride: int,
    sin_stride: int,
    positions: int,
    interleaved: bool,
    inverse: bool,
    y: int,
    threads: int,
    /,
) -> None: ...

# (data, distance of entries, ids), and of a gradient (data, entries)
_Table = tuple[int, int, int]
_TableGradient = tuple[int, int]

def embedding_layer_norm(
    dtype: int,
    tokens: int,
    width: int,
    word: _Table,
    position: _Table,
    token_type: _Table,
    weight: int,
    bias: int,
    parameter_dtype: int,
    eps: float,
    dropout_p: float,
    seed: int,
    offset: int,
    y: int,
    mean: int,
    rstd: int,
    threads: int,
    /,
) -> None: ...
def embedding_layer_norm_backward(
    dtype: int,
    tokens: int,
    width: int,
    word: _Table,
    position: _Table,
    token_type: _Table,
    grad_y: int,
    grad_y_stride: int,
    mean: int,
    rstd: int,
    weight: int,
    parameter_dtype: int,
    dropout_p: float,
    seed: int,
    offset: int,
    padding_idx: int,
    dword: _TableGradient,
    dposition: _TableGradient,
    dtoken_type: _TableGradient,
    dweight: int,
    dbias: int,
    threads: int,
    /,
) -> None: ...
def gated_act(
    dtype: int,
    activation: int,
    rows: int,
    width: int,
    value: int,
    value_stride: int,
    gate: int,
    gate_stride: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def gated_act_backward(
    dtype: int,
    activation: int,
    rows: int,
    width: int,
    grad_y: int,
    grad_y_stride: int,
    value: int,
    value_stride: int,
    gate: int,
    gate_stride: int,
    dvalue: int,
    dgate: int,
    gradient_stride: int,
    threads: int,
    /,
) -> None: ...
def rms_norm(
    dtype: int,
    rows: int,
    width: int,
    x: int,
    x_stride: int,
    weight: int,
    weight_dtype: int,
    eps: float,
    y: int,
    rstd: int,
    threads: int,
    /,
) -> None: ...
def rms_norm_backward(
    dtype: int,
    rows: int,
    width: int,
    grad_y: int,
    grad_y_stride: int,
    x: int,
    x_stride: int,
    rstd: int,
    weight: int,
    weight_dtype: int,
    dx: int,
    dweight: int,
    threads: int,
    /,
) -> None: ...
