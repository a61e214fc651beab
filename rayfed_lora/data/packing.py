"""Several texts in a row, so that few tokens are padding.

Source: packing without cross-contamination, arXiv:2107.02027; rows are filled best fit first, the
longest texts first.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rayfed_lora.data.client_table import ClientTable, IndexArray
from rayfed_lora.data.examples import COUNTED, POSITIONS, Examples

_MASK = "attention_mask"


def packed(
    examples: Examples, clients: ClientTable, held_out: ClientTable | None, most: int
) -> tuple[Examples, ClientTable, ClientTable | None]:
    """Return texts of which those that a client trains on share rows, and who holds which rows.

    Rows have `POSITIONS`, which begin anew with each text, and `COUNTED`, 0 on the first token of
    each text: the text before it does not predict it. Padding has position 0. Texts that a client
    is tested on have a row each.

    Args:
        examples: `input_ids` and `attention_mask`, (n, length), perhaps `COUNTED`.
        clients: the texts that each client trains on.
        held_out: those that it is tested on.
        most: tokens of a row; no text has more.
    """
    lengths = examples.inputs[_MASK].sum(axis=1).astype(np.int64)
    rows: list[IndexArray] = []
    tables = []
    for table in (clients, held_out):
        if table is None:
            continue
        first, offsets = len(rows), [0]
        for client in range(table.clients):
            own = table.examples(client)
            bins = (
                fitted(lengths[own], most) if table is clients else [[i] for i in range(len(own))]
            )
            rows += [own[places] for places in bins]
            offsets.append(len(rows) - first)
        order = np.arange(first, len(rows))
        tables.append(ClientTable(order, np.array(offsets, np.int64)))
    labels = examples.labels[[int(texts[0]) for texts in rows]]
    made = Examples.of(_joined(examples, lengths, rows), labels)
    return made, tables[0], tables[1] if held_out is not None else None


def fitted(lengths: npt.NDArray[np.int64], most: int) -> list[list[int]]:
    """Return the places of texts in each row: the fullest row with room takes the next longest.

    >>> fitted(np.array([3, 5, 4, 2]), 7)
    [[1, 3], [2, 0]]
    """
    bins: list[list[int]] = []
    # Room that is left, and the row, ascending.
    room: list[tuple[int, int]] = []
    for place in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[place])
        found = bisect_left(room, (size, -1))
        if found == len(room):
            bins.append([place])
            insort(room, (most - size, len(bins) - 1))
            continue
        left, row = room.pop(found)
        bins[row].append(place)
        insort(room, (left - size, row))
    return bins


def _joined(
    examples: Examples, lengths: npt.NDArray[np.int64], rows: Sequence[IndexArray]
) -> dict[str, npt.NDArray[np.int32]]:
    """Return the inputs of rows of texts, padded with zeros."""
    inputs, width = examples.inputs, max(int(lengths[texts].sum()) for texts in rows)
    names = ("input_ids", _MASK, POSITIONS, COUNTED)
    found = {name: np.zeros((len(rows), width), np.int32) for name in names}
    counts = inputs.get(COUNTED, inputs[_MASK])
    for row, texts in enumerate(rows):
        start = 0
        for text in texts.tolist():
            part = slice(start, start + int(lengths[text]))
            size = part.stop - start
            found["input_ids"][row, part] = inputs["input_ids"][text, :size]
            found[_MASK][row, part] = 1
            found[POSITIONS][row, part] = np.arange(size)
            found[COUNTED][row, part] = counts[text, :size]
            found[COUNTED][row, start] = 0
            start += size
    return found
