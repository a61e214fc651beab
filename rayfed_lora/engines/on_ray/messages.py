"""What server and client actors send each other, as bytes.

Ray passes bytes on as they are. Anything else it pickles with cloudpickle, object by object in
Python, once for every argument of every call: for the small adapters of many short calls that took
more of both sides' time than the calls themselves (benchmarks/README.md).

Nothing else is ever read as a message: it came from a process of the same run, by Ray, which reads
pickles from there in any case.

Source: this project; out-of-band buffers: PEP 574.
"""

from __future__ import annotations

import pickle
from typing import Any

# Bytes of an array from which on it stays beside the message, so that nobody copies it: processes
# of a machine then share it in Ray's object store.
_APART = 1 << 16
# A pickle, and the arrays that are not in it.
Message = bytes | tuple[Any, ...]


def packed(value: Any) -> Message:
    """Return a message of a value; it must be picklable without cloudpickle."""
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
