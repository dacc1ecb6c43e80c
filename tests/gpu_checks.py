"""What every operation must stand on a GPU: capture in a CUDA graph, and no synchronisation with the host."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def without_synchronisation(step: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """What `step` gives, the second time: the first compiles. Raises where it waits for the device."""
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_graph(
    step: Callable[[], Sequence[Tensor]], changes: Iterable[Callable[[], object]]
) -> list[Sequence[Tensor]]:
    """Captured once, `step` replays after each of the changes to its inputs what it gives then, bit for bit. The replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    replays = []
    for change in changes:
        change()
        graph.replay()
        replays.append([tensor.clone() for tensor in captured])
        for actual, wanted in zip(replays[-1], step(), strict=True):
            assert torch.equal(actual, wanted)
    return replays
