"""The weights of a plain model: its source's, a base's, or one client's. Source: this project."""

from __future__ import annotations

import torch
from torch import nn

from rayfed_lora.models.linear import is_transposed
from rayfed_lora.types import Base, FloatArray


class ResidentBase:
    """The parameters and buffers of a model that is built once.

    Attributes:
        parameters: by the plain model's own names.
        source: their first values, never written to: they may be read-only and shared.
        loaded: whether a base is in the parameters now.
        changes: how often the parameters were replaced.
    """

    def __init__(self, net: nn.Module, device: torch.device) -> None:
        """Take the values in a plain model as the source's."""
        # Layers whose weight is (d_in, d_out).
        self._transposed = {name for name, m in net.named_modules() if is_transposed(m)}
        self._device = device
        self.parameters = dict(net.named_parameters())
        self.source = {name: p.data for name, p in self.parameters.items()}
        floating = [buffer for buffer in net.buffers() if buffer.is_floating_point()]
        self._buffers = [(buffer, buffer.clone()) for buffer in floating]
        self._version, self.loaded = Base().version, True
        self.changes = 0

    @property
    def has_statistics(self) -> bool:
        """Whether a pass may change buffers (batch normalisation)."""
        return bool(self._buffers)

    def load(self, base: Base | None) -> None:
        """Put a base into the parameters, and the source's own values into the buffers.

        None: the parameters are to become a client's own.
        """
        if base is None or not self.loaded or self._version != base.version:
            # True again at the end only, so that an interrupted load is repeated.
            self.loaded = False
            self.changes += 1
            if base is not None:
                self._load(base)
        for buffer, source in self._buffers:
            buffer.copy_(source)

    def set(self, name: str, values: FloatArray) -> None:
        """Give a parameter other values; the tensor of its former values stays as it is."""
        self.parameters[name].data = self.tensor(values)

    def _load(self, base: Base) -> None:
        for name, source in self.source.items():
            self.parameters[name].data = source
        for name, values in (base.tensors or {}).items():
            self.set(name, values)
        for name, update in base.merged.items():
            weight = self.parameters[f"{name}.weight"]
            # From the root's own weight: the sum does not depend on the base loaded before.
            dense = self.tensor(update)
            weight.data = weight.data + (dense.t() if name in self._transposed else dense)
        self._version, self.loaded = base.version, True

    def tensor(self, values: FloatArray) -> torch.Tensor:
        """Return a copy of values on the model's device."""
        return torch.tensor(values, dtype=torch.float32, device=self._device)


def to_numpy(tensor: torch.Tensor) -> FloatArray:
    """Return a copy of a tensor's values in the host's memory."""
    array: FloatArray = tensor.detach().to("cpu", torch.float32, copy=True).numpy()
    return array
