"""The diagnosis of a machine or a cluster."""
