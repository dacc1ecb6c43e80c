"""GPT-2's configuration, under Hugging Face's names."""

from dataclasses import dataclass

from fastbert.models.config import ACTIVATIONS, Config, check_numbers, takes_use_cache

_UNSUPPORTED = {
    "scale_attn_weights": ((None, True), "attention without its scale is not supported"),
    "scale_attn_by_inverse_layer_idx": ((None, False), "a scale for each layer is not supported"),
    "reorder_and_upcast_attn": (
        (None, False),
        "it changes the order of roundings; the attention here sums in float32 anyway",
    ),
    "add_cross_attention": ((None, False), "cross-attention is not supported"),
    "tie_word_embeddings": ((None, True), "a matrix of its own for the words' logits is not supported"),
    "quantization_config": ((None,), "quantized checkpoints are not read"),
}


@takes_use_cache
@dataclass(frozen=True)
class GPTConfig(Config):
    """The numbers that make a GPT-2 (Radford et al. 2019); defaults are gpt2's, the smallest of them.

    The attributes have Hugging Face's names and meaning.

    Raises:
        ValueError: a value the model cannot be made with, named with what was expected.
    """

    model_type = "gpt2"
    _unsupported = _UNSUPPORTED

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # 4 · n_embd
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    eos_token_id: int | list[int] | None = 50256

    def __post_init__(self) -> None:
        sizes = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"]
        check_numbers(
            self,
            integers=[*sizes, *(["n_inner"] if self.n_inner is not None else [])],
            probabilities=["resid_pdrop", "embd_pdrop", "attn_pdrop"],
            epsilon="layer_norm_epsilon",
            smallest={"n_layer": 0},
        )
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd is {self.n_embd}; expected a multiple of n_head, {self.n_head}")
        self._check_activation("activation_function")
        self._check_unsupported()

    @property
    def num_hidden_layers(self) -> int:
        return self.n_layer

    @property
    def activation(self) -> str:
        """activation_function under the name that fastbert.functional has for it."""
        return ACTIVATIONS[self.activation_function]

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """eos_token_id as a tuple."""
        ids = self.eos_token_id
        return () if ids is None else tuple(ids) if isinstance(ids, list | tuple) else (ids,)
