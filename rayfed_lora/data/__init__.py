"""Sources to Arrow tables, tables to clients, clients to batches."""
