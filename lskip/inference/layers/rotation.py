"""A basis of the states in which none of their numbers stands out, so that rounding them costs less."""

import math

import torch
from torch import Tensor


class Rotation:
    """x [..., D] -> x R for an orthogonal R, the same for every model of a size.

    In a trained model a few of a state's numbers are far larger than the rest and set the scale that all of them are
    rounded on. R mixes them: it is the Kronecker product of two random orthogonal matrices (QuIP, arXiv 2307.13304,
    section 4.1), of sizes as near to sqrt(D) as D's divisors are, so that a product with it is two small ones.
    """

    def __init__(self, size: int):
        """Draw R for states of `size` numbers, D."""
        rows = max(count for count in range(1, math.isqrt(size) + 1) if size % count == 0)
        generator = torch.Generator().manual_seed(0)
        self.left, self.right = orthogonal(rows, generator), orthogonal(size // rows, generator)

    def rotate(self, x: Tensor) -> Tensor:
        """Return x R of [..., D], in float32."""
        cut = x.float().unflatten(-1, (len(self.left), -1))
        return (self.left.T @ cut @ self.right).flatten(-2)


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix [size, size], float32."""
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0].float()
