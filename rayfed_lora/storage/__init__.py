"""Files of a run folder, on a local disk or in an object store. Source: this project."""

from rayfed_lora.storage.filesystems import open_filesystem, refuse_secrets
from rayfed_lora.storage.run_folder import RunFolder

__all__ = ["RunFolder", "open_filesystem", "refuse_secrets"]
