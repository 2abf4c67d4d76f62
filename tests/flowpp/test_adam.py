"""Our Adam beside PyTorch's class of it."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from flowpp.adam import MOMENTS, Adam

TRAIN = """
import sys, torch
from flowpp.learner import Learner
from flowpp.presets import resolve_model, resolve_training
from flowpp.processes import Processes
alone = Processes(0, 1, torch.device("cpu"))
learner = Learner(resolve_model("tiny", {}, (3, 8, 8)), resolve_training("tiny", {}), alone)
images = torch.randint(0, 256, (learner.training.batch_size, 3, 8, 8), dtype=torch.uint8)
learner.initialize(images)
learner.take_step(images)
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_its_steps_are_those_of_pytorch_bit_for_bit(dtype: torch.dtype) -> None:
    """Some parameters decay, one has its numbers in another order of memory, and one gets no gradient at first."""
    shapes = [(4, 3, 2, 2), (4, 3, 2, 2), (7,), ()]
    ours, theirs = (
        [nn.Parameter(torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))) for shape in shapes]
        for _ in range(2)
    )
    for parameters in (ours, theirs):
        parameters[1].data = parameters[1].data.to(memory_format=torch.channels_last)
    optimizer = Adam([(ours[:2], 0.1), (ours[2:], 0.0)])
    reference = torch.optim.AdamW(
        [{"params": theirs[:2], "weight_decay": 0.1}, {"params": theirs[2:], "weight_decay": 0.0}], fused=True
    )
    for step in range(1, 6):
        for one, other in zip(ours, theirs, strict=True):
            if step == 1 and one is ours[2]:
                continue
            one.grad, other.grad = (torch.full_like(each, step).mul_(each.detach()) for each in (one, other))
        optimizer.step(0.1 / step)
        for group in reference.param_groups:
            group["lr"] = 0.1 / step
        reference.step()
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)
            state = reference.state[other]
            assert (one in optimizer.state) == bool(state)
            for moment in MOMENTS if state else ():
                found, expected = optimizer.state[one][moment], state[moment]
                assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
                assert torch.equal(found, expected)


def test_a_step_of_training_does_not_import_the_graph_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", TRAIN], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
