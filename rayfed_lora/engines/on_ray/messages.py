"""What driver and client actors send each other, as bytes.

Ray passes bytes on as they are. Anything else it pickles with cloudpickle, object by object in
Python, for each argument of each call, which takes longer than a short call itself.

Source: this project; out-of-band buffers: PEP 574.
"""

from __future__ import annotations

import pickle
from typing import Any

import ray

# Arrays of at least so many bytes stay outside the pickle: processes of a machine share them in
# Ray's object store.
_APART = 1 << 16
# Messages of at most so many bytes travel inside each call.
_IN_CALL = 1 << 16
# A pickle, and the arrays that are not in it.
Message = bytes | tuple[Any, ...]


def packed(value: Any) -> Message:
    """Return a message of a value, which plain pickle must know."""
    apart: list[pickle.PickleBuffer] = []

    def stays(buffer: pickle.PickleBuffer) -> bool:
        if buffer.raw().nbytes < _APART:
            return True
        apart.append(buffer)
        return False

    data = pickle.dumps(value, protocol=5, buffer_callback=stays)
    return (data, *apart) if apart else data


def unpacked(message: Message) -> Any:
    """Return the value of a message; large arrays in it are read-only where Ray brought it."""
    if isinstance(message, bytes):
        return pickle.loads(message)
    data, *apart = message
    return pickle.loads(data, buffers=apart)


def sent(value: Any) -> Message | ray.ObjectRef:
    """Return a message that several calls are given; a large one is put into the object store."""
    message = packed(value)
    small = isinstance(message, bytes) and len(message) <= _IN_CALL
    return message if small else ray.put(message)
