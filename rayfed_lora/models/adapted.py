"""A resident base model that computes a group of clients, each with an adapter of its own.

Source: LoRA, arXiv:2106.09685; computing several clients at once: this project.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from rayfed_lora.lora.resize import pad
from rayfed_lora.lora.stacked import A, B, StackedStates
from rayfed_lora.models.group_layers import AdaptedLinear, ClientLinear, GroupFactors
from rayfed_lora.models.heads import head_parameters
from rayfed_lora.models.resident import ResidentBase, to_numpy
from rayfed_lora.models.shapes import adapted_modules, fusion_obstacle
from rayfed_lora.recipe.model import Adapter
from rayfed_lora.types import (
    AdapterState,
    Base,
    Factors,
    FloatArray,
    Frozen,
    GlobalModel,
    Trainable,
)

_Layer = TypeVar("_Layer", bound=nn.Module)


class AdaptedModel:
    """One resident model that is loaded with a base and states, trained, and read again.

    Parameter names are the plain model's own. The weights of the plain model are never written
    to: they may be read-only, and shared with others.
    """

    def __init__(
        self,
        net: nn.Module,
        adapter: Adapter,
        device: torch.device | str = "cpu",
        obstacle: str | None = None,
        modules: Sequence[str] | None = None,
    ) -> None:
        """Put layers for adapters into a plain model.

        Args:
            net: the plain model with its source's weights, changed in place.
            adapter: which modules get factors, and their dropout.
            device: a torch device.
            obstacle: why several clients cannot be computed together; None: the layers decide.
            modules: names of the modules that get factors, as in a `ModelShape`; None: those that
                the adapter names, of any size.
        """
        self.net = net.to(device)
        self.device = torch.device(device)
        # Why several clients cannot be computed together; None: they can.
        self.obstacle = obstacle or fusion_obstacle(net, adapter)
        if modules is None:
            modules = adapted_modules(net, adapter)
        self._head = head_parameters(net, adapter)
        self.resident = ResidentBase(net, self.device)
        self._plain = self.resident.parameters
        self._layers = {
            n: _replaced(net, n, lambda m: AdaptedLinear(m, adapter.dropout)) for n in modules
        }
        owners = dict.fromkeys(name.rpartition(".")[0] for name in self._head)
        self._copied = {} if self.obstacle else {n: _replaced(net, n, ClientLinear) for n in owners}
        net.requires_grad_(False)
        # All modules in one mode, the new layers too.
        net.train()
        every = list(net.modules())
        plain = all(type(module).train is nn.Module.train for module in every)
        # Attributes that `nn.Module.train` sets; setting them directly saves 0.1 ms for 60 modules.
        self._switch = [module.__dict__ for module in every] if plain else None
        # The trained tensors, in the order of `parameters`.
        self.trained: list[torch.Tensor] = []
        # Their names as in `lora.stacked.named`; whether each lacks the client's dimension.
        self.trained_names: list[str] = []
        self.without_client: list[bool] = []
        # Number of loaded clients.
        self._group = 0
        self._frozen: Frozen | None = None
        # Weights of the loaded states, (group, values) each, and their shapes in a stack.
        self._held: list[torch.Tensor] = []
        self._shapes: dict[str, tuple[int, ...]] = {}
        # Versions of the model that is loaded and not trained since.
        self._shown: tuple[str, tuple[int, int], Trainable] | None = None

    def own_tensors(self) -> dict[str, torch.Tensor] | None:
        """Return what the loaded clients have of their own; None where the whole model is.

        Returns:
            By module, A, B and scale of its factors, and what is densely trained, as
            `holding` takes them.
        """
        if not self.resident.loaded:
            return None
        found: dict[str, torch.Tensor] = {}
        for name, layer in self._layers.items():
            if layer.factors is not None:
                f = layer.factors
                found |= {f"{name}.a": f.a, f"{name}.b": f.b, f"{name}.scale": f.scale}
        for name, copied in self._copied.items():
            found |= {f"{name}.{part}": tensor for part, tensor in copied.copies.items()}
        return found

    @contextmanager
    def holding(self, own: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Compute with others in place of `own_tensors`, of the same names and shapes."""
        factors = {name: layer.factors for name, layer in self._layers.items()}
        copies = {name: copied.copies for name, copied in self._copied.items()}
        try:
            for name, layer in self._layers.items():
                if layer.factors is not None:
                    parts = (own[f"{name}.{part}"] for part in ("a", "b", "scale"))
                    layer.factors = GroupFactors(*parts)
            for name, copied in self._copied.items():
                copied.copies = {part: own[f"{name}.{part}"] for part in copied.copies}
            yield
        finally:
            for name, layer in self._layers.items():
                layer.factors = factors[name]
            for name, copied in self._copied.items():
                copied.copies = copies[name]

    def tensors(self, trainable: Trainable) -> dict[str, FloatArray]:
        """Return the first client's dense tensors: the head's, or in a full round all."""
        names = self._plain if trainable == "full" else self._head
        held = {name: self._holder(name) for name in names}
        return {n: to_numpy(t if t is self._plain[n] else t[0]) for n, t in held.items()}

    def initial_tensors(self, trainable: Trainable) -> dict[str, FloatArray]:
        """Return the dense tensors of a round as the source and the seed gave them."""
        names = self._plain if trainable == "full" else self._head
        return {name: to_numpy(self.resident.source[name]) for name in names}

    def load(
        self,
        states: Sequence[AdapterState],
        base: Base,
        trainable: Trainable,
        frozen: Frozen | None = None,
    ) -> None:
        """Set the weights of a round, and mark the trained ones.

        In a full round there is one client, its `dense` is the whole model and `base` is not
        used. Running statistics (batch normalisation) are always the source's own, since they are
        never sent. Ranks may differ between clients, modules and dense names may not. `frozen` is
        the factor of every module that is not trained.

        Raises:
            ValueError: several clients, and this model can hold only one at a time.
        """
        self._shown = None
        alone = trainable == "full" or self.obstacle is not None
        if alone and len(states) != 1:
            raise ValueError(f"need one client at a time, got {len(states)}: {self.obstacle}")
        for parameter in self.trained:
            # The gradients of a full-model round are as large as the model.
            parameter.grad = None
            parameter.requires_grad_(False)
        self._held = []
        self.resident.load(None if trainable == "full" else base)
        self._group = len(states)
        self._frozen = frozen
        if not alone and all(state.version == states[0].version for state in states):
            # One state for all: each tensor is copied from it at once.
            states = states[:1]
        for name, layer in self._layers.items():
            layer.factors = self._stacked([state.factors.get(name) for state in states])
        self._load_dense([state.dense for state in states], trainable)
        self._hold(states[0])
        found = self.parameters(states[0])
        self.trained = list(found.values())
        self.trained_names = [_named(name, states[0]) for name in found]
        self.without_client = [self._plain.get(name) is p for name, p in found.items()]
        for parameter in self.trained:
            parameter.requires_grad_(True)

    def show(self, model: GlobalModel) -> None:
        """Load a model that will not be trained, unless it is loaded already."""
        shown = model.state.version, model.base.version, model.trainable
        if self._shown != shown:
            self.load([model.state], model.base, model.trainable)
            self._shown = shown

    def train(self, mode: bool) -> None:
        """Switch between training and evaluation."""
        # Visiting every module takes as long as computing a small one.
        if self.net.training == mode:
            return
        if self._switch is None:
            self.net.train(mode)
        else:
            for attributes in self._switch:
                attributes["training"] = mode

    def parameters(self, state: AdapterState) -> dict[str, torch.Tensor]:
        """Return the trained tensors of loaded states, by a stable name, in a stable order.

        In an adapter round their first dimension is the client in the group; in a model with an
        `obstacle` the dense ones lack it. `state` is any loaded one, for its modules and names.
        """
        found = {name: self._holder(name) for name in state.dense}
        for name in state.factors:
            factors = self._layers[name].factors
            if factors is not None and self._frozen != "a":
                found[f"{name}.lora_A"] = factors.a
            if factors is not None and self._frozen != "b":
                found[f"{name}.lora_B"] = factors.b
        return found

    def read_from(self, likes: Sequence[AdapterState], client: int) -> StackedStates:
        """Return the current weights of neighbouring clients of the group, from `client` on.

        `likes` are the states that these clients were loaded with.
        """
        parts = self._held
        if len(likes) < self._group:
            parts = [part[client : client + len(likes)] for part in parts]
        rows = torch.cat(parts, dim=1) if parts else torch.zeros(len(likes), 0)
        return StackedStates(rows.cpu().numpy(), likes, self._shapes)

    def _hold(self, like: AdapterState) -> None:
        """Keep views of all loaded tensors, through which weights trained in place are read."""
        self._shapes = {name: tensor.shape for name, tensor in like.dense.items()}
        held = [self._holder(name) for name in like.dense]
        for name, f in like.factors.items():
            factors = self._layers[name].factors
            if factors is None:
                self._shapes |= {A + name: f.a.shape, B + name: f.b.shape}
            else:
                a, b = factors.a, factors.b
                self._shapes |= {A + name: tuple(a.shape[1:]), B + name: tuple(b.shape[1:])}
                held += [a, b]
        self._held = [tensor.detach().view(self._group, -1) for tensor in held]

    def keep(self, clients: int) -> None:
        """Keep only the first clients of the group."""
        self._group = clients
        for name, layer in self._layers.items():
            if layer.factors is not None:
                a, b, scale = layer.factors.a, layer.factors.b, layer.factors.scale
                a.data, b.data = a.data[:clients], b.data[:clients]
                self._layers[name].factors = GroupFactors(a, b, scale[:clients])
        for copied in self._copied.values():
            for tensor in copied.copies.values():
                tensor.data = tensor.data[:clients]

    def _holder(self, name: str) -> torch.Tensor:
        """Return the tensor that holds dense values now: copies by client, or the parameter."""
        owner, _, attribute = name.rpartition(".")
        layer = self._copied.get(owner)
        return self._plain[name] if layer is None or not layer.copies else layer.copies[attribute]

    def _load_dense(self, states: Sequence[Mapping[str, FloatArray]], trainable: Trainable) -> None:
        for layer in self._copied.values():
            layer.copies = {}
        for name in states[0] if trainable == "adapter" else ():
            owner, _, attribute = name.rpartition(".")
            if owner in self._copied:
                copies = self._by_client([dense[name] for dense in states])
                self._copied[owner].copies[attribute] = copies
        for name, tensor in states[0].items():
            if self._holder(name) is self._plain[name]:
                self.resident.set(name, tensor)

    def _stacked(self, clients: Sequence[Factors | None]) -> GroupFactors | None:
        """Return the clients' factors of one module, lower ranks padded with zeros."""
        found = [f for f in clients if f is not None]
        rank = max((f.rank for f in found), default=0)
        if rank == 0:
            return None
        found = [pad(f, rank) for f in found]
        a, b = self._by_client([f.a for f in found]), self._by_client([f.b for f in found])
        scales = self.resident.tensor(np.array([f.scale for f in found]))
        return GroupFactors(a, b, scales.view(-1, 1, 1))

    def _by_client(self, arrays: Sequence[FloatArray]) -> torch.Tensor:
        """Return (group, ...) from an array for each client, or from one for all."""
        if len(arrays) == self._group:
            return self.resident.tensor(np.asarray(arrays))
        return self.resident.tensor(arrays[0]).expand(self._group, *arrays[0].shape).clone()


def _named(name: str, state: AdapterState) -> str:
    """Return the name of a trained tensor in `lora.stacked.named`."""
    if name in state.dense:
        return name
    module, _, factor = name.rpartition(".")
    return (A if factor == "lora_A" else B) + module


def _replaced(net: nn.Module, name: str, make: Callable[[Any], _Layer]) -> _Layer:
    """Put a layer in the place of a linear one; return it."""
    owner, _, attribute = name.rpartition(".")
    parent = net.get_submodule(owner)
    layer = make(getattr(parent, attribute))
    setattr(parent, attribute, layer)
    return layer
