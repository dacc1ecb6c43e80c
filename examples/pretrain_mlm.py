"""Pre-trains a small BERT on real text, on this CPU, in a few minutes: masked words, drawn anew at every step.

    python examples/pretrain_mlm.py

The vocabulary is learnt first (with Hugging Face's tokenizers), then the model. Its accuracy on masked tokens of text that it never
saw is printed beside what guessing the most frequent token would reach. The result is a folder that fastbert and transformers load.
"""

from collections import Counter
from pathlib import Path

import torch
from tokenizers import BertWordPieceTokenizer
from torch import Tensor
from training import arguments, read_text, train

from fastbert import BertConfig, PackedBatch, WordPieceTokenizer
from fastbert.models import BertForMaskedLM

SEQ = 64  # tokens of a training sequence
BATCH = 48  # sequences of a step
VOCABULARY = 3000
MASKED = 0.15


def learn_vocabulary(text: str, folder: Path) -> WordPieceTokenizer:
    """A WordPiece vocabulary of the text, kept in the folder."""
    if not (folder / "vocab.txt").exists():
        trainer = BertWordPieceTokenizer(lowercase=True)
        trainer.train_from_iterator(text.splitlines(), vocab_size=VOCABULARY, min_frequency=2, show_progress=False)
        trainer.save_model(str(folder))
    return WordPieceTokenizer.from_pretrained(folder)


class Masking:
    """Sequences of a text, tokens of them masked as Devlin et al. (2019) do: 80 % [MASK], 10 % another token, 10 % as they are."""

    def __init__(self, ids: Tensor, tokenizer: WordPieceTokenizer) -> None:
        cls, sep = torch.tensor([tokenizer.cls_token_id]), torch.tensor([tokenizer.sep_token_id])
        inner = SEQ - 2
        count = len(ids) // inner
        rows = ids[: count * inner].view(count, inner)
        # [sequences, SEQ]; every tenth is held out
        sequences = torch.cat((cls.expand(count, 1), rows, sep.expand(count, 1)), dim=1)
        held_out = torch.arange(count) % 10 == 9
        self.training, self.held_out = sequences[~held_out], sequences[held_out]
        self.mask_id, self.vocabulary = tokenizer.mask_token_id, len(tokenizer)
        self.special = torch.tensor(tokenizer.all_special_ids)

    def batch(self, sequences: Tensor, generator: torch.Generator) -> tuple[PackedBatch, Tensor]:
        """A packed batch of [n, SEQ] with masked ids, and the labels [n · SEQ]."""
        ids = sequences.flatten()
        draw = torch.rand(ids.shape, generator=generator)
        chosen = (draw < MASKED) & ~torch.isin(ids, self.special)
        labels = ids.masked_fill(~chosen, -100)
        how = torch.rand(ids.shape, generator=generator)
        others = torch.randint(self.vocabulary, ids.shape, generator=generator)
        masked = torch.where(chosen & (how < 0.8), self.mask_id, ids)
        masked = torch.where(chosen & (how >= 0.9), others, masked)
        return PackedBatch.from_lengths(masked, [SEQ] * len(sequences)), labels


def main() -> None:
    options = arguments(__doc__.splitlines()[0], "build/pretrain_mlm", steps=900).parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    text = read_text(options.text)
    tokenizer = learn_vocabulary(text, options.folder)
    encoded = tokenizer(text.splitlines(), add_special_tokens=False, return_tensors="packed")
    data = Masking(encoded.values, tokenizer)
    most_frequent, count = Counter(data.held_out.flatten().tolist()).most_common(1)[0]
    print(
        f"{encoded.total} tokens, {len(tokenizer)} in the vocabulary; guessing {tokenizer.decode([most_frequent])!r} "
        f"would be right for {count / data.held_out.numel():.1%}"
    )

    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=768,
        max_position_embeddings=SEQ,
        hidden_dropout_prob=0.05,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertForMaskedLM(config)
    print(f"a BERT of {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters")

    def loss_of(generator: torch.Generator) -> tuple[Tensor, int]:
        rows = torch.randint(len(data.training), (BATCH,), generator=generator)
        batch, labels = data.batch(data.training[rows], generator)
        loss = model(batch, labels=labels).loss
        assert loss is not None
        return loss, batch.total

    @torch.no_grad()
    def evaluate() -> str:
        batch, labels = data.batch(data.held_out, torch.Generator().manual_seed(0))
        logits = model(batch).logits
        assert logits is not None
        known = labels != -100
        right = (logits[known].argmax(-1) == labels[known]).float().mean()
        return f"held out {right:.1%}"

    train(model, options, loss_of, evaluate)

    model.save_pretrained(options.folder / "model")
    tokenizer.save_pretrained(options.folder / "model")
    print(f"\n{options.folder / 'model'} is a folder that fastbert and transformers load. It fills masks:")
    for sentence in ("the function returns a [MASK] object .", "raises an [MASK] if the name is not found ."):
        batch = tokenizer([sentence], return_tensors="packed")
        with torch.no_grad():
            logits = model(batch).logits
        assert logits is not None
        (place,) = (batch.values == tokenizer.mask_token_id).nonzero()
        best = logits[place].topk(5).indices[0]
        print(f"  {sentence}   " + ", ".join(tokenizer.convert_ids_to_tokens(best.tolist())))


if __name__ == "__main__":
    main()
