"""The checksum of a state: equal exactly where every bit is."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace

import numpy as np
import pytest

from rayfed_lora.lora.states import sha256
from rayfed_lora.types import AdapterState, Factors

A = np.arange(8, dtype=np.float32).reshape(2, 4)
B = np.arange(12, dtype=np.float32).reshape(6, 2)
STATE = AdapterState(
    {"q": Factors(A, B, 2.0), "v": Factors(A[:0], B[:, :0], 1.0)},
    {"head": np.ones(3, np.float32), "bias": np.zeros(2, np.float32)},
)


def with_factors(**changes: object) -> AdapterState:
    return replace(STATE, factors={**STATE.factors, "q": replace(STATE.factors["q"], **changes)})


def test_the_checksum_of_one_tensor_is_as_its_text_and_bytes_say():
    state = AdapterState({}, {"head": np.array([1.0, -2.0], np.float32)})
    text = b"dense|head|(2,)|0x1.0000000000000p+0|" + struct.pack("<2f", 1.0, -2.0)
    assert sha256(state) == hashlib.sha256(text).hexdigest()


def test_order_of_names_and_memory_layout_do_not_matter():
    turned = AdapterState(
        dict(reversed(STATE.factors.items())), dict(reversed(STATE.dense.items()))
    )
    assert sha256(turned) == sha256(STATE)
    assert sha256(with_factors(a=np.asfortranarray(A))) == sha256(STATE)


@pytest.mark.parametrize(
    "other",
    [
        with_factors(a=A + np.float32([[0, 0, 0, 1e-6]])),
        with_factors(b=np.nextafter(B, np.float32(1))),
        with_factors(scale=np.nextafter(2.0, 3.0)),
        with_factors(a=B.T.copy(), b=A.T.copy()),
        with_factors(a=A.reshape(4, 2)),
        replace(STATE, factors={"p": STATE.factors["q"], "v": STATE.factors["v"]}),
        replace(STATE, factors={"q": STATE.factors["q"]}),
        replace(STATE, dense={"head": STATE.dense["head"]}),
        replace(STATE, dense={"head": -STATE.dense["head"], "bias": STATE.dense["bias"]}),
        replace(STATE, dense={"head": STATE.dense["head"], "bias": -STATE.dense["bias"]}),
    ],
    ids=[
        *("one value", "last bits", "scale", "a and b", "shape", "module name", "empty module"),
        *("tensor gone", "sign", "sign of zero"),
    ],
)
def test_whatever_differs_changes_the_checksum(other):
    assert sha256(other) != sha256(STATE)
