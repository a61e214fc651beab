"""Examples: from a source to Arrow tables, dealt to clients, cut into batches.

Source: this project.
"""

from rayfed_lora.data.batches import batch_indices
from rayfed_lora.data.partition import ClientTable, deal
from rayfed_lora.data.tables import Dataset, load

__all__ = ["ClientTable", "Dataset", "batch_indices", "deal", "load"]
