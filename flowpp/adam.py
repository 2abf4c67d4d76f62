"""Adam with decoupled decay of weights (Loshchilov & Hutter): PyTorch's own fused step.

`torch.optim.AdamW` would import PyTorch's graph compiler when it is made, for which no
training process has any use.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # the state of a parameter


class Adam:
    """`groups` are parameters, each with its weight decay; `state` has the `MOMENTS` of those that ever had a gradient.

    Each step it is the same, bit for bit, as `torch.optim.AdamW(fused=True)`.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[nn.Parameter], float]]) -> None:
        self.groups = groups
        self.state: dict[Tensor, Mapping[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Moves each parameter that has a gradient."""
        for parameters, decay in self.groups:
            moved = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
            for parameter, _ in moved:
                if parameter not in self.state:
                    self.state[parameter] = self.beginning(parameter)
            steps, averages, squares = ([self.state[parameter][moment] for parameter, _ in moved] for moment in MOMENTS)
            adam(
                [parameter for parameter, _ in moved],
                [gradient for _, gradient in moved],
                averages,
                squares,
                [],
                steps,
                fused=True,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=learning_rate,
                weight_decay=decay,
                eps=1e-8,
                maximize=False,
                decoupled_weight_decay=True,
            )

    @staticmethod
    def beginning(parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter that no gradient has reached yet: zeros."""
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
