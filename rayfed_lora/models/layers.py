"""Linear layers that serve a group of clients at once, each client with weights of its own.

The rows of a group's clients stand one after the other in the first dimension, equally many a
client; what is frozen sees them all as one batch, what is trained sees each client's apart.

Source: this project; a layer with factors computes what `peft.tuners.lora.Linear` does,
LoRA, arXiv:2106.09685.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class GroupFactors:
    """The factors of one module, client by client.

    Attributes:
        a: (group, rank, d_in).
        b: (group, d_out, rank); clients of a lower rank have zeros behind it, in `a` too: their
            gradients there are zero as well, so that they stay.
        scale: (group, 1, 1), or (1, 1, 1) where it is that of all; not trained.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor


class AdaptedLinear(nn.Linear):
    """A frozen linear layer with LoRA factors for each client of a group, or with none."""

    def __init__(self, plain: nn.Linear, dropout: float) -> None:
        """Take over a plain layer's parameters, under the same names.

        Args:
            plain: the layer.
            dropout: probability of a zero in what the factors see.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias
        self.dropout = dropout
        self.factors: GroupFactors | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T + bias + scale_g (x_g A_g^T) B_g^T, (group * rows, ..., d_out)."""
        plain = functional.linear(x, self.weight, self.bias)
        if self.factors is None:
            return plain
        a, b, scale = self.factors.a, self.factors.b, self.factors.scale
        rows = functional.dropout(x, self.dropout, self.training) if self.dropout > 0 else x
        low = torch.bmm(_by_client(rows, len(a)), a.transpose(1, 2))
        update = (b * scale).transpose(1, 2)
        return torch.baddbmm(_by_client(plain, len(a)), low, update).view(plain.shape)


class ClientLinear(nn.Linear):
    """A densely trained linear layer with a copy of its weights for each client of a group."""

    def __init__(self, plain: nn.Linear) -> None:
        """Take over a plain layer's parameters, under the same names."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias
        # By parameter name, (group, d_out, d_in) and (group, d_out); none: the plain layer's own.
        self.copies: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x_g W_g^T + bias_g, (group * rows, ..., d_out)."""
        if not self.copies:
            return functional.linear(x, self.weight, self.bias)
        weight = self.copies["weight"]
        y = torch.bmm(_by_client(x, len(weight)), weight.transpose(1, 2))
        if "bias" in self.copies:
            y = y + self.copies["bias"].unsqueeze(1)
        return y.view(*x.shape[:-1], self.out_features)


def _by_client(x: torch.Tensor, group: int) -> torch.Tensor:
    """Return the rows of each client, (group, rows * ..., d)."""
    if x.shape[0] % group != 0:
        raise ValueError(
            f"need the examples of {group} clients in the first dimension, got {tuple(x.shape)}"
        )
    return x.reshape(group, -1, x.shape[-1])
