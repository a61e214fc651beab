"""Examples: from a source to Arrow tables, dealt to clients, cut into batches."""
