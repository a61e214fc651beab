"""A base model with LoRA layers of PEFT in it, whose ranks and weights can be set at any time.

Source: LoRA, arXiv:2106.09685, as `peft.tuners.lora.Linear` computes it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from rayfed_lora.models.shapes import adapted_modules, head_parameters
from rayfed_lora.recipe import Adapter
from rayfed_lora.types import AdapterState, Base, Factors, FloatArray, Trainable

_ADAPTER = "default"


class AdaptedModel:
    """One resident model that is loaded with a base and a state, trained, and read again.

    Parameter names are the plain model's own: what PEFT's wrapping adds to them never shows.
    """

    def __init__(
        self, build: Callable[[], nn.Module], adapter: Adapter, device: torch.device | str = "cpu"
    ) -> None:
        """Build the model and put LoRA layers in.

        Args:
            build: returns the plain model with its source's weights; called again only if those
                weights are needed after they were overwritten.
            adapter: which modules get factors, and their dropout.
            device: where the model lives.
        """
        self._build = build
        self.net = build()
        names = adapted_modules(self.net, adapter)
        self._head = head_parameters(self.net, adapter)
        config = LoraConfig(r=1, target_modules=names, lora_dropout=adapter.dropout)
        with warnings.catch_warnings():
            # PEFT warns of tied or unusual layers that this project never merges in place.
            warnings.simplefilter("ignore", UserWarning)
            inject_adapter_in_model(config, self.net, _ADAPTER)
        self.net.to(device)
        self.device = torch.device(device)
        self._layers: dict[str, LoraLinear] = {n: self.net.get_submodule(n) for n in names}
        self._plain: dict[str, nn.Parameter] = {
            name.replace(".base_layer.", "."): parameter
            for name, parameter in self.net.named_parameters()
            if ".lora_" not in name
        }
        self._buffers = {
            name: buffer.clone()
            for name, buffer in self.net.named_buffers()
            if buffer.is_floating_point()
        }
        self._root, self._folded, self._clean = 0, 0, True
        self._as_built = True

    def tensors(self, trainable: Trainable) -> dict[str, FloatArray]:
        """Return the current dense tensors of a round: the head's, or in a full round all."""
        names = self._plain if trainable == "full" else self._head
        return {name: _to_numpy(self._plain[name]) for name in names}

    def initial_tensors(self, trainable: Trainable) -> dict[str, FloatArray]:
        """Return the dense tensors of a round as the source and the seed gave them."""
        if self._as_built:
            return self.tensors(trainable)
        source = dict(self._build().named_parameters())
        names = self._plain if trainable == "full" else self._head
        return {name: _to_numpy(source[name]) for name in names}

    def load(self, state: AdapterState, base: Base, trainable: Trainable) -> None:
        """Set the weights of a round and mark what is trained.

        In a full round `state.dense` is the whole model and `base` is not looked at. Running
        statistics (batch normalisation) are always the source's own: nobody sends them.
        """
        self._as_built = False
        if trainable == "full":
            self._clean = False
        else:
            self._load_base(base)
        with torch.no_grad():
            for name, tensor in state.dense.items():
                self._plain[name].copy_(torch.tensor(tensor))
            for name, buffer in self.net.named_buffers():
                if name in self._buffers:
                    buffer.copy_(self._buffers[name])
        for name, layer in self._layers.items():
            _set_factors(layer, state.factors.get(name))
        self.net.requires_grad_(False)
        for parameter in self.parameters(state).values():
            parameter.requires_grad_(True)

    def parameters(self, state: AdapterState) -> dict[str, nn.Parameter]:
        """Return the trained parameters of a loaded state, by a stable name, in a stable order."""
        found = {name: self._plain[name] for name in state.dense}
        for name, factors in state.factors.items():
            if factors.rank > 0:
                layer = self._layers[name]
                found[f"{name}.lora_A"] = layer.lora_A[_ADAPTER].weight
                found[f"{name}.lora_B"] = layer.lora_B[_ADAPTER].weight
        return found

    def read(self, like: AdapterState) -> AdapterState:
        """Return the current weights as a state with the modules and tensors of `like`."""
        factors = {name: self._read_factors(name, f) for name, f in like.factors.items()}
        return AdapterState(factors, {name: _to_numpy(self._plain[name]) for name in like.dense})

    def _read_factors(self, name: str, like: Factors) -> Factors:
        if like.rank == 0:
            return like
        layer = self._layers[name]
        a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        return Factors(_to_numpy(a), _to_numpy(b), like.scale)

    def _load_base(self, base: Base) -> None:
        fits = self._clean and self._root == base.root and self._folded <= len(base.folds)
        if not fits:
            self._reset(base.tensors)
        for fold in base.folds[self._folded if fits else 0 :]:
            self._add(fold)
        self._root, self._folded, self._clean = base.root, len(base.folds), True

    @torch.no_grad()
    def _reset(self, tensors: Mapping[str, FloatArray] | None) -> None:
        if tensors is None:
            source = dict(self._build().named_parameters())
            for name, parameter in source.items():
                self._plain[name].copy_(parameter)
            return
        for name, tensor in tensors.items():
            self._plain[name].copy_(torch.tensor(tensor))

    @torch.no_grad()
    def _add(self, fold: Mapping[str, Factors]) -> None:
        for name, f in fold.items():
            # float64, so that the sum does not depend on how a matmul splits float32 work.
            update = torch.tensor(f.b).double() @ torch.tensor(f.a).double() * f.scale
            self._plain[f"{name}.weight"].add_(update.float().to(self.device))


def _set_factors(layer: LoraLinear, factors: Factors | None) -> None:
    """Give a LoRA layer factors of any rank; none where the rank is 0."""
    if factors is None or factors.rank == 0:
        for part in (layer.lora_A, layer.lora_B):
            if _ADAPTER in part:
                del part[_ADAPTER]
        return
    weight = layer.base_layer.weight
    for part, values in ((layer.lora_A, factors.a), (layer.lora_B, factors.b)):
        tensor = torch.tensor(values)
        if _ADAPTER not in part or part[_ADAPTER].weight.shape != tensor.shape:
            out_features, in_features = tensor.shape
            part[_ADAPTER] = nn.utils.skip_init(  # type: ignore[no-untyped-call]
                nn.Linear, in_features, out_features, bias=False, device=weight.device
            )
        with torch.no_grad():
            part[_ADAPTER].weight.copy_(tensor)
    layer.r[_ADAPTER] = factors.rank
    layer.scaling[_ADAPTER] = factors.scale


def _to_numpy(tensor: torch.Tensor) -> FloatArray:
    array: FloatArray = tensor.detach().to("cpu", torch.float32, copy=True).numpy()
    return array
