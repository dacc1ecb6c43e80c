"""What stands below the first block: ids become vectors."""

import torch
from torch import Tensor, nn

from fastbert import functional as F
from fastbert.nn.init import initialize
from fastbert.nn.norm import LayerNorm
from fastbert.nn.positions import SinusoidalPositions

POSITIONS = ("learned", "sinusoidal", "rotary")


class Embeddings(nn.Module):
    """dropout(layer_norm(word[ids] + position[position ids] + token_type[token type ids])), BERT's input.

    Args:
        vocab_size: rows of the word table.
        hidden_size: width of every table.
        max_positions: rows of the position table; 0: no positions.
        positions: "learned"; "sinusoidal", the fixed table of Vaswani et al. 2017; or "rotary", none here, because attention turns
            query and key instead (RotaryPositions).
        type_vocab_size: rows of the token type table; 0: no types.
        eps: the layer norm's.
        dropout_p: in training mode only.
        padding_idx: a word whose row gets no gradient.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        max_positions: int = 512,
        type_vocab_size: int = 2,
        *,
        positions: str = "learned",
        eps: float = 1e-12,
        dropout_p: float = 0.0,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab_size, hidden_size, padding_idx, device=device, dtype=dtype)
        if positions not in POSITIONS:
            raise ValueError(f"positions is {positions!r}; expected one of {', '.join(map(repr, POSITIONS))}")
        self.position: nn.Embedding | SinusoidalPositions | None = None
        if max_positions and positions == "learned":
            self.position = nn.Embedding(max_positions, hidden_size, device=device, dtype=dtype)
        elif max_positions and positions == "sinusoidal":
            self.position = SinusoidalPositions(max_positions, hidden_size, device=device, dtype=dtype)
        self.token_type = (
            nn.Embedding(type_vocab_size, hidden_size, device=device, dtype=dtype) if type_vocab_size else None
        )
        self.norm = LayerNorm(hidden_size, eps, device=device, dtype=dtype)
        self.dropout_p = dropout_p
        initialize(self)

    def forward(
        self,
        input_ids: Tensor,  # int [total]
        position_ids: Tensor | None = None,  # int [total]
        token_type_ids: Tensor | None = None,  # int [total]; None: type 0
    ) -> Tensor:
        """[total, hidden_size]. Raises IndexError for an id outside its table (on CPU, and elsewhere under debug())."""
        # Each once: Module.__getattr__ takes 0.6 µs.
        word, position, token_type, norm = self.word, self.position, self.token_type, self.norm
        if token_type is None and token_type_ids is not None:
            raise ValueError(
                "token_type_ids are given, but these embeddings have no token types (type_vocab_size is 0)"
            )
        if position is not None and position_ids is None:
            raise ValueError("position_ids are needed: packed tokens do not know their column")
        return F.embedding_layer_norm(
            input_ids,
            word.weight,
            None if position is None else position.weight,
            None if token_type is None else token_type.weight,
            norm.weight,
            norm.bias,
            norm.eps,
            position_ids=None if position is None else position_ids,
            token_type_ids=token_type_ids,
            dropout_p=self.dropout_p if self.training else 0.0,
            padding_idx=word.padding_idx,
        )

    def extra_repr(self) -> str:
        return f"dropout_p={self.dropout_p}"
