"""An own codec of uploads: the sign of each value and one scale a tensor, 1 bit a value."""

import math

import numpy as np

import rayfed_lora
from rayfed_lora.plugins import update


def size(shapes):
    """Return the bytes of a message: packed signs, and a float32 a tensor."""
    return sum(math.ceil(math.prod(shape) / 8) + 4 for shape in shapes.values())


@update(size=size)
def scaled_sign(tensors, rng):
    """Send the sign of each value and the mean magnitude (arXiv:1802.04434, scaled)."""
    seen, sent = {}, 0
    for name, x in tensors.items():
        signs = np.packbits(x.ravel() >= 0)
        scale = np.float32(np.abs(x).mean()) if x.size else np.float32(0)
        bits = np.unpackbits(signs, count=x.size).astype(np.float32).reshape(x.shape)
        seen[name] = (2 * bits - 1) * scale
        sent += signs.nbytes + scale.nbytes
    return seen, sent


if __name__ == "__main__":
    base = rayfed_lora.Recipe.load("examples/small.yaml", plugins=[scaled_sign])
    for codec in ("float32", "scaled-sign"):
        result = rayfed_lora.run(base.with_({"wire.up": codec}), plugins=[scaled_sign])
        sent = result.summary["communication"]
        print(codec, result.rounds["eval_accuracy"].iloc[-1], f"{sent['bytes_up'] / 1e6:.2f} MB up")
