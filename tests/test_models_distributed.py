"""Two processes train as one does: replicated (DDP) and sharded (FSDP2), with gloo on CPUs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import distributed_models

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """What two processes made of every case."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "tests.distributed_models"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(folder / "meeting"), str(folder / "states.pt")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return torch.load(folder / "states.pt")


@pytest.mark.parametrize("kind, way", distributed_models.CASES, ids=lambda value: value)
def test_a_step_equals_that_of_one_process(states, kind, way):
    model = distributed_models.build(kind).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    distributed_models.step(model, slice(None))
    actual = states[f"{kind}-{way}"]
    assert actual.keys() == before.keys()
    for name, expected in model.state_dict().items():
        # Adam's first step is lr · sign(gradient): where a gradient is all rounding, its sign is.
        torch.testing.assert_close(actual[name], expected, rtol=0, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert not torch.equal(expected, before[name]), f"{name} did not move"
