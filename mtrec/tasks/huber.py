"""The constant prediction with the least Huber loss, at which heads with that loss begin. N labels of a sample."""

from torch import Tensor


def huber_center(target_N: Tensor, delta: float) -> Tensor:
    """(1,) float64: the constant of least Huber loss (Huber, 1964) on the sample, by 50 steps of reweighted least squares; the
    mean where that is within `delta` of every label, near the median where `delta` is small.

    >>> import torch
    >>> huber_center(torch.tensor([0.0, 1.0, 2.0, 100.0]), delta=10.0).item()
    4.333333333333333
    """
    target_N = target_N.double()
    center = target_N.median()
    for _ in range(50):  # reweighted least squares: the loss has no closed minimiser
        weight_N = delta / (target_N - center).abs().clamp(min=delta)
        center = (weight_N * target_N).sum() / weight_N.sum()
    return center.reshape(1)
