"""Which modules of a model are its encoder and its head. Source: this project."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from torch import nn

from rayfed_lora.errors import ModelError
from rayfed_lora.recipe.model import Adapter


def head_modules(net: nn.Module, adapter: Adapter) -> list[str]:
    """Return the names of the head's modules.

    `auto`: every direct child with parameters beside the encoder, which transformers names in
    `base_model_prefix`. Where no child has that name, the encoder is the child with the most
    parameters, and the head consists of the children registered after it.

    Raises:
        ModelError: a named module does not exist or is part of another named one, or the head is
            to be trained and the model has none.
    """
    if adapter.head_modules != "auto":
        return _checked(net, list(dict.fromkeys(adapter.head_modules)))
    own: list[str] | None = getattr(net, "own_head", None)
    if own is not None:
        return [*own]
    children, encoder = _children(net), getattr(net, "base_model_prefix", "")
    if encoder in children:
        found = [name for name in children if name != encoder]
    elif len(children) > 1:
        place = children.index(_largest(net, children))
        found = children[place + 1 :] or children[:place]
    else:
        found = []
    if not found and adapter.train_head:
        only = (children or [encoder])[0]
        raise ModelError(
            f"adapter.head_modules: the model has only its encoder {only!r}; name the head's"
            " modules, or set adapter.train_head to false"
        )
    return found


def head_notes(net: nn.Module, adapter: Adapter) -> tuple[str, ...]:
    """Return a note for the user where the encoder was chosen by its size."""
    prefix, children = getattr(net, "base_model_prefix", ""), _children(net)
    if adapter.head_modules != "auto" or prefix in children or len(children) < 2:
        return ()
    head = ", ".join(head_modules(net, adapter))
    return (
        f"adapter.head_modules: the model has no module {prefix!r}, its base_model_prefix;"
        f" {_largest(net, children)!r}, its largest, is taken as the encoder, {head} as the head",
    )


def head_parameters(net: nn.Module, adapter: Adapter) -> list[str]:
    """Return the names of the densely trained parameters: the head's, every bias, or none.

    Raises:
        ModelError: the head is to be trained, and all its weights belong to the encoder too.
    """
    modules = head_modules(net, adapter)
    head = tuple(f"{module}." for module in modules)
    names = [name for name, _ in net.named_parameters()]
    if adapter.train_head and modules and not any(name.startswith(head) for name in names):
        raise ModelError(
            f"adapter.train_head: the weights of {', '.join(modules)} are the encoder's too (tied),"
            " and cannot be trained alone; set it to false"
        )
    return [
        name
        for name in names
        if (adapter.train_head and name.startswith(head))
        or (adapter.train_biases and name.endswith("bias"))
    ]


def _checked(net: nn.Module, names: list[str]) -> list[str]:
    known = _with_parameters(net)
    absent = [name for name in names if name not in known]
    if absent:
        shallow = ", ".join(name for name in known if name.count(".") <= 1)
        raise ModelError(f"adapter.head_modules: no module {absent[0]!r}; there are {shallow}")
    for name, above in permutations(names, 2):
        if name.startswith(f"{above}."):
            raise ModelError(
                f"adapter.head_modules: {name!r} is part of {above!r}, which is named too"
            )
    return names


def _with_parameters(net: nn.Module) -> list[str]:
    return [n for n, m in net.named_modules() if n and any(True for _ in m.parameters())]


def _children(net: nn.Module) -> list[str]:
    """Return the names of the direct children that have parameters."""
    return [name for name in _with_parameters(net) if "." not in name]


def _largest(net: nn.Module, children: Sequence[str]) -> str:
    """Return the child with the most parameters, the first of equals."""
    return max(children, key=lambda n: sum(p.numel() for p in net.get_submodule(n).parameters()))
