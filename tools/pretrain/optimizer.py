"""Muon for matrices, AdamW for the rest."""

import torch

# Coefficients of five Newton-Schulz steps towards the nearest orthogonal matrix.
STEPS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


class Muon:
    """Momentum whose orthogonalised direction is stepped along (Jordan et al. 2024); matrices of one shape go together."""

    def __init__(self, matrices: list[torch.Tensor], rate: float, momentum: float = 0.95, weight_decay: float = 0.02):
        groups: dict[tuple, list[torch.Tensor]] = {}
        for matrix in matrices:
            groups.setdefault(tuple(matrix.shape), []).append(matrix)
        self.groups = [
            (group, torch.zeros(len(group), *group[0].shape, device=group[0].device)) for group in groups.values()
        ]
        self.rate, self.momentum, self.weight_decay = rate, momentum, weight_decay

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step at `factor` times the rate; clears nothing."""
        for group, average in self.groups:
            gradient = torch.stack([matrix.grad for matrix in group])
            average.lerp_(gradient, 1 - self.momentum)
            x = gradient.lerp(average, self.momentum)
            if x.device.type == "cuda":
                x = x.bfloat16()
            tall = x.shape[1] > x.shape[2]
            x = x.transpose(1, 2) if tall else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for a, b, c in STEPS:
                square = x @ x.transpose(1, 2)
                x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
            x = x.transpose(1, 2) if tall else x
            scale = max(1.0, x.shape[1] / x.shape[2]) ** 0.5
            rate = self.rate * factor
            for matrix, direction in zip(group, x.float()):
                matrix.mul_(1 - rate * self.weight_decay).add_(direction, alpha=-rate * scale)


class Optimizer:
    """Muon on the layers' matrices of 64 rows or more, AdamW on embeddings, norms, convolutions, small projections and binding.py's matrices.

    The gradients of AdamW's weights are clipped together."""

    def __init__(self, weights: dict[str, torch.Tensor], muon_rate: float, adam_rate: float):
        is_matrix = {
            name: weight.ndim == 2 and len(weight) >= 64 and "embed" not in name for name, weight in weights.items()
        }
        self.rest = [weight for name, weight in weights.items() if not is_matrix[name]]
        self.muon = Muon([weight for name, weight in weights.items() if is_matrix[name]], muon_rate)
        self.adam_rate = adam_rate
        self.adam = torch.optim.AdamW(
            self.rest, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=self.rest[0].is_cuda
        )
        self.all = list(weights.values())

    def step(self, factor: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.rest, 1.0)
        self.muon.step(factor)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_rate * factor
        self.adam.step()
        for weight in self.all:
            weight.grad = None
