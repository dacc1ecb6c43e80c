"""What both examples share: text, a loop that shows its progress, and checkpoints to go on from."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics

import torch
from torch import Tensor, nn


def arguments(description: str, folder: str, steps: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--text", type=Path, help="a UTF-8 file to learn from; Python's own documentation unless given")
    parser.add_argument("--folder", type=Path, default=Path(folder), help="where the model and its checkpoints go")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps in all")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="the largest, after the warm-up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=50, help="steps between lines of progress, each with a checkpoint")
    parser.add_argument("--restart", action="store_true", help="begin anew where the folder has a checkpoint")
    return parser


def read_text(file: Path | None) -> str:
    """The file, or the help texts that Python ships with (half a megabyte of English and code)."""
    if file is None:
        return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    text = file.read_text(encoding="utf-8")
    if len(text) < 20_000:
        sys.exit(f"{file} has {len(text)} characters; give at least 20000, or there is nothing to learn")
    return text


def train(
    model: nn.Module,
    options: argparse.Namespace,
    loss_of: Callable[[torch.Generator], tuple[Tensor, int]],  # of a batch drawn from the generator, and its tokens
    evaluate: Callable[[], str],  # what is known of held-out text
) -> None:
    """AdamW with warm-up and linear decay; goes on from the folder's checkpoint, and leaves one behind when interrupted."""
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98))
    warm_up = max(1, options.steps // 20)

    def share(step: int) -> float:
        return min((step + 1) / warm_up, max(0.0, (options.steps - step) / (options.steps - warm_up + 1)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    generator = torch.Generator().manual_seed(options.seed)  # of the batches
    done = 0
    file = options.folder / "checkpoint.pt"

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "batches": generator.get_state(),
            "dropout": torch.get_rng_state(),
            "done": done,
        }
        torch.save(state, file.with_suffix(".new"))
        os.replace(file.with_suffix(".new"), file)

    if file.exists() and not options.restart:
        state = torch.load(file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        generator.set_state(state["batches"])
        torch.set_rng_state(state["dropout"])
        done = state["done"]
        print(f"going on from step {done} of {file}")

    model.train()
    losses: list[Tensor] = []
    tokens, since = 0, time.perf_counter()
    try:
        while done < options.steps:
            optimizer.zero_grad()
            loss, counted = loss_of(generator)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            losses.append(loss.detach())
            tokens += counted
            if done % options.every == 0 or done == options.steps:
                seconds = time.perf_counter() - since
                left = (options.steps - done) * seconds / len(losses)
                model.eval()
                held_out = evaluate()
                model.train()
                print(
                    f"step {done:5d} of {options.steps}   loss {torch.stack(losses).mean():.3f}   {held_out}   "
                    f"{tokens / seconds:6.0f} tokens/s   {left:4.0f} s left",
                    flush=True,
                )
                save()
                losses, tokens, since = [], 0, time.perf_counter()
    except KeyboardInterrupt:
        save()
        sys.exit(f"\ninterrupted after step {done}; the same command goes on from there")
    model.eval()
