"""The built-in methods of the kind `update`, one file each."""
