"""Trains a small GPT on the bytes of real text, on this CPU, in a few minutes, and lets it write.

    python examples/train_gpt.py

No tokenizer: the vocabulary are the 256 bytes. Bits per byte of held-out text are printed beside those of the bytes' frequencies
alone. The result is a GPT-2 folder that fastbert and transformers load.
"""

import math

import torch
from torch import Tensor
from training import arguments, read_text, train

from fastbert import PackedBatch
from fastbert.models import GPTConfig, GPTForCausalLM

SEQ = 128  # bytes of a training sequence
BATCH = 24  # sequences of a step


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], "build/train_gpt", steps=900)
    parser.add_argument("--prompt", default="The ", help="what the text it writes begins with")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    data = torch.frombuffer(bytearray(read_text(options.text).encode()), dtype=torch.uint8).to(torch.int64)
    held_out = data[-20 * SEQ :].view(20, SEQ)  # [sequences, SEQ]
    data = data[: -20 * SEQ]
    frequencies = data.bincount(minlength=256).double() / len(data)
    alone = -(frequencies[held_out].clamp(min=1e-9).log2()).mean()
    print(f"{len(data)} bytes; by their frequencies alone a byte of held-out text takes {alone:.2f} bits")

    config = GPTConfig(
        vocab_size=256,
        n_positions=4 * SEQ,
        n_embd=192,
        n_layer=4,
        n_head=6,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        eos_token_id=None,
    )
    model = GPTForCausalLM(config)
    print(f"a GPT of {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters")

    def loss_of(generator: torch.Generator) -> tuple[Tensor, int]:
        starts = torch.randint(len(data) - SEQ, (BATCH, 1), generator=generator)
        ids = data[starts + torch.arange(SEQ)].flatten()
        loss = model(PackedBatch.from_lengths(ids, [SEQ] * BATCH), labels=ids).loss
        assert loss is not None
        return loss, len(ids)

    @torch.no_grad()
    def evaluate() -> str:
        loss = model(held_out, labels=held_out).loss
        assert loss is not None
        return f"held out {loss.item() / math.log(2):.2f} bits/byte"

    train(model, options, loss_of, evaluate)

    model.save_pretrained(options.folder / "model")
    print(f"\n{options.folder / 'model'} is a folder that fastbert and transformers load. It writes:\n")
    written = bytearray(options.prompt.encode())
    for step in model.stream([list(written)], 300, do_sample=True, temperature=0.8, top_p=0.95, seed=options.seed):
        written.append(step.tokens[0])
    print(written.decode(errors="replace"))


if __name__ == "__main__":
    main()
