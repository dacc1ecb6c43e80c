"""BERT's parameters in Hugging Face's names: one table, read in both directions."""

from pathlib import Path

from fastbert.models.pretrained import Stored, Table, linear_or_norm

_PARTS = ("embeddings.", "encoder.", "pooler.")


def name_table(layers: int, pooler: bool) -> Table:
    """Our parameter → Hugging Face's, of which several are one below the other in ours (query, key, value)."""
    table: Table = {
        "embeddings.word.weight": Stored(("embeddings.word_embeddings.weight",)),
        "embeddings.position.weight": Stored(("embeddings.position_embeddings.weight",)),
        "embeddings.token_type.weight": Stored(("embeddings.token_type_embeddings.weight",)),
        **linear_or_norm("embeddings.norm", "embeddings.LayerNorm"),
    }
    for i in range(layers):
        ours, theirs = f"layers.{i}", f"encoder.layer.{i}"
        attention = f"{theirs}.attention"
        table |= {
            **linear_or_norm(
                f"{ours}.attention.qkv", *(f"{attention}.self.{part}" for part in ("query", "key", "value"))
            ),
            **linear_or_norm(f"{ours}.attention.out", f"{attention}.output.dense"),
            **linear_or_norm(f"{ours}.attention_norm", f"{attention}.output.LayerNorm"),
            **linear_or_norm(f"{ours}.feed_forward.up", f"{theirs}.intermediate.dense"),
            **linear_or_norm(f"{ours}.feed_forward.down", f"{theirs}.output.dense"),
            **linear_or_norm(f"{ours}.feed_forward_norm", f"{theirs}.output.LayerNorm"),
        }
    return table | linear_or_norm("pooler.dense", "pooler.dense") if pooler else table


def canonical(names: list[str], folder: Path, heads: tuple[str, ...] = ()) -> dict[str, str]:
    """The encoder's tensors as BertModel calls them → their names in the file, and those of heads that begin so."""
    prefix = "bert." if any(name.startswith("bert.") for name in names) else ""
    found: dict[str, str] = {}
    for name in names:
        short = name.removeprefix(prefix)
        in_encoder = name.startswith(prefix) and short.startswith(_PARTS) and short != "embeddings.position_ids"
        if not in_encoder:
            if not name.startswith(heads):
                continue
            short = name
        if short.endswith(".gamma"):  # TensorFlow's names, in the oldest checkpoints
            short = short.removesuffix("gamma") + "weight"
        elif short.endswith(".beta"):
            short = short.removesuffix("beta") + "bias"
        if short in found:
            raise ValueError(f"{folder} has both {found[short]} and {name}; expected one of them")
        found[short] = name
    return found
