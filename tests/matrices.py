"""Matrices that several tests draw."""
import torch

def noise(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def covariance(n: int, seed: int, mixed: float = 0.5) -> torch.Tensor:
    """Of correlated inputs whose sizes differ by a factor of e²."""
    sizes = torch.linspace(-1, 1, n, dtype=torch.float64).exp()
    x = noise(5 * n, n, seed=seed) @ (torch.eye(n) + mixed * noise(n, n, seed=seed + 1)) * sizes
    return x.T @ x / len(x)
