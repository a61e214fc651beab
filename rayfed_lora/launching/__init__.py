"""Starts runs: one, several side by side, in this process or on a cluster."""
