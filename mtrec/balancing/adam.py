"""Adam on a vector that is no parameter of the model, its moments in buffers so that they are in the checkpoint."""

import torch
from torch import Tensor, nn


class Adam(nn.Module):
    """Adam (Kingma & Ba, 2015) with L2 weight decay, as `torch.optim.Adam` computes it.

    Deviation: an entry that is not active keeps its value and its moments, and has a step count of its own.

    >>> adam = Adam(2, learning_rate=0.1)
    >>> adam.descend(torch.zeros(2), torch.tensor([3.0, -5.0]), torch.tensor([True, False]))
    tensor([-0.1000,  0.0000], dtype=torch.float64)
    """

    mean_K: Tensor
    square_K: Tensor
    count_K: Tensor

    def __init__(self, size: int, learning_rate: float, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.register_buffer("mean_K", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("square_K", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("count_K", torch.zeros(size, dtype=torch.float64))

    @torch.no_grad()
    def descend(self, value_K: Tensor, gradient_K: Tensor, active_K: Tensor) -> Tensor:
        """(K,) float64: `value_K` after a step against `gradient_K` where active."""
        value_K, gradient_K = value_K.double(), gradient_K.double()
        gradient_K = gradient_K + self.weight_decay * value_K
        active = active_K.double()
        self.count_K += active
        self.mean_K += active * 0.1 * (gradient_K - self.mean_K)
        self.square_K += active * 0.001 * (gradient_K.square() - self.square_K)
        count_K = self.count_K.clamp(min=1.0)
        mean_K = self.mean_K / (1.0 - 0.9**count_K)
        root_K = (self.square_K / (1.0 - 0.999**count_K)).sqrt()
        return value_K - active * self.learning_rate * mean_K / (root_K + 1e-8)
