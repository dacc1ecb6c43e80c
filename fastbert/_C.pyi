"""The C++ extension (csrc/bindings.cpp, csrc/tokenizer_bindings.cpp).

Of the operations: addresses are data_ptr(), 0 for an absent tensor; strides count elements;
dtypes are 0 for float32 and 1 for bfloat16. Nothing is checked here: call the launchers in fastbert.cpu.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypedDict

import numpy
import numpy.typing
from torch.nn import Module

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

AttentionArguments: TypeAlias = tuple[
    tuple[int, ...],  # batch, heads, kv_heads, seq_q, seq_k, head_dim, value_dim, packed tokens of q
    int,  # q
    tuple[int, ...],  # its strides: [batch, head, token, element], packed [token, head, element]
    int,  # k
    tuple[int, ...],
    int,  # v
    tuple[int, ...],
    int,  # cu_seqlens_q, 0: dense
    int,  # cu_seqlens_k
    int,  # kind of mask: 0 none, 1 uint8, 2 float32
    int,  # mask
    tuple[int, ...],  # [batch, head, q, k]
    int,  # padding
    tuple[int, ...],  # [batch, k]
    int,  # slopes
    int,  # their batch stride
    float,  # scale
    int,  # left
    int,  # right
    bool,  # bottom_right
    float,  # dropout_p
    int,  # seed
    int,  # offset
]

def attention(dtype: int, arguments: AttentionArguments, out: int, lse: int, threads: int, /) -> None: ...
def attention_backward(
    dtype: int,
    arguments: AttentionArguments,
    out: int,
    lse: int,
    grad_out: int,
    grad_out_strides: tuple[int, ...],
    dq: int,
    dk: int,
    dv: int,
    dmask: int,
    dmask_strides: tuple[int, ...],
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
        linears: list[
            tuple[int, int, int, list[_Vector], list[tuple[int, int, int]]]
        ],  # out, in, packed, biases, originals
        norms: list[_Vector],
        /,
    ) -> None: ...

def run_blocks(
    blocks: list[Block], rows: int, x: int, cu_seqlens: int, batch: int, max_seqlen: int, y: int, threads: int, /
) -> int: ...

class ModuleState:
    """What modules and all their parts are: classes, hooks, numbers, and of each parameter identity, memory and, but for vectors,
    version.

    ``constants`` are types whose objects never change. Raises ValueError for modules that hold what may change unnoticed: a hook,
    a buffer, an object of another type. Keeps no module and no parameter alive.
    """

    def __init__(self, modules: list[Module], constants: tuple[type, ...], /) -> None: ...
    def holds(self, modules: list[Module], /) -> bool:
        """Whether these are the same and as they were."""

    def has(self, parameter: object, /) -> bool:
        """Whether it is one of the parameters."""

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
def ids_in_range(ids: int, count: int, limit: int, /) -> bool:
    """Whether int64 ids are all in [0, limit)."""

def mask_lengths(element_bytes: int, mask: int, batch: int, seq: int, /) -> list[int] | None:
    """How many ones each row of a mask [batch, seq] of 1, 4 or 8 bytes an element has; None if there is more than 0 and 1."""

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

class TruncationError(ValueError):
    """A text is too short to be truncated as asked, or there is no second text to truncate."""

class WordPiece:
    """BERT's tokenizer, with the results of Hugging Face `tokenizers`. Any number of threads may use one at once."""

    def __init__(
        self,
        vocab: dict[str, int],
        *,
        unk_token: str = "[UNK]",
        prefix: str = "##",
        max_input_chars_per_word: int = 100,
        clean_text: bool = True,
        handle_chinese_chars: bool = True,
        strip_accents: bool = True,
        lowercase: bool = True,
        added_tokens: Sequence[tuple[int, str, bool, bool, bool, bool, bool]] = (),
        single: Sequence[tuple[int, int]] = ((-1, 0),),
        pair: Sequence[tuple[int, int]] = ((-1, 0), (-2, 1)),
    ) -> None:
        """added_tokens: (id, content, single_word, lstrip, rstrip, normalized, special). single and pair are the templates:
        (id, type) of special tokens, with -1 for the first text and -2 for the second.

        Raises ValueError where the vocabulary lacks unk_token, an id is not in [0, 2**31), an added token is empty, normalized
        or not, a string has half of a surrogate pair, or a template lacks a text.
        """

    def encode(
        self,
        texts: str | Sequence[Any],
        pairs: str | Sequence[Any] | None = None,
        *,
        is_split_into_words: bool = False,
        add_special_tokens: bool = True,
        max_length: int = -1,
        strategy: str = "longest_first",
        stride: int = 0,
        truncation_side: str = "right",
        overflow: bool = False,
        offsets: bool = False,
        split_special_tokens: bool = False,
        threads: int = 1,
    ) -> Encodings:
        """texts: a str, or a list of str, of pairs of str, of lists of words, of pairs of these. max_length counts special
        tokens; -1 is none. offsets keeps what offset_mapping and word_ids need. No result depends on the number of threads.

        Raises TypeError for an item that is no text, half of a surrogate pair included, TruncationError, and ValueError where
        stride is not below the length that truncation leaves.
        """

    def encode_utf8(
        self,
        data: Any,
        bounds: Any = None,
        *,
        add_special_tokens: bool = True,
        max_length: int = -1,
        strategy: str = "longest_first",
        stride: int = 0,
        truncation_side: str = "right",
        overflow: bool = False,
        offsets: bool = False,
        split_special_tokens: bool = False,
        threads: int = 1,
    ) -> Encodings:
        """data: bytes-like, one text or, with bounds (int32 or int64 [rows + 1]), several; a list of bytes-like; a NumPy array
        of strings; an object with Arrow's __arrow_c_array__ or __arrow_c_stream__. No Python object is made for a row.

        Raises ValueError for invalid UTF-8, naming row and byte, nulls and bounds out of range, TypeError for other data.
        """

    def fill(
        self,
        outputs: dict[str, Any],
        texts: str | list[str],
        pairs: str | list[str] | None,
        fields: int,
        add_special_tokens: bool,
        max_length: int,
        length: int,
        pad_id: int,
        convert: Callable[[numpy.typing.NDArray[numpy.int64]], Any] | bool | None,
        threads: int,
        /,
    ) -> int | Encodings | None:
        """A whole call: puts the outputs into a dict.

        fields: the bits 1 input_ids, 2 token_type_ids, 4 attention_mask, 8 special_tokens_mask, 16 offset_mapping.
        max_length: truncates on the right; -1: not at all. length: rows are padded with pad_id on the right to it; 0: to
        the longest; -1: not at all. convert: None for lists, True for arrays [rows, length], or what is made of each array.

        Returns the length of the longest row, or with offset_mapping the rows; None, with nothing done, for what is no
        string or non-empty list of them, and where arrays would not be rectangular or would be empty. Raises as encode().
        """

    @property
    def unk_id(self) -> int: ...
    def num_special_tokens(self, pair: bool) -> int: ...
    def memory(self) -> int:
        """Bytes held, working memory included."""

    def normalize(self, text: str) -> str: ...

class Encodings:
    """Rows of tokens: one a text, and one for each overflowing window right behind it.

    Fields: input_ids, token_type_ids, attention_mask, special_tokens_mask, position_ids, sequence_ids (-1 for none), and with
    offsets=True offset_mapping (a last dimension of 2) and word_ids (-1 for none). ValueError for any other.
    """

    def __len__(self) -> int: ...
    @property
    def total(self) -> int:
        """Tokens of all rows."""

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""

    def lengths(self) -> numpy.typing.NDArray[numpy.int64]:
        """[rows]"""

    def cu_seqlens(self) -> numpy.typing.NDArray[numpy.int32]:
        """[rows + 1]. Raises OverflowError beyond 2**31 - 1 tokens."""

    def samples(self) -> numpy.typing.NDArray[numpy.int64]:
        """[rows]: the text that each row comes from."""

    def packed(self, field: str) -> numpy.typing.NDArray[numpy.int64]:
        """[total]: the rows one after another."""

    def packed_batch(
        self, with_types: bool
    ) -> tuple[
        numpy.typing.NDArray[numpy.int64],
        numpy.typing.NDArray[numpy.int32],
        numpy.typing.NDArray[numpy.int64],
        numpy.typing.NDArray[numpy.int64] | None,
        list[int],
    ]:
        """(input_ids, cu_seqlens, position_ids, token_type_ids, lengths). Raises as cu_seqlens()."""

    def padded(self, field: str, length: int, value: int = 0, left: bool = False) -> numpy.typing.NDArray[numpy.int64]:
        """[rows, length], filled up with value on the right or the left. Raises ValueError for a shorter length than longest."""

    def lists(self, field: str) -> list[list[Any]]: ...
    def list(self, field: str, row: int, /) -> list[Any]:
        """Raises IndexError."""
