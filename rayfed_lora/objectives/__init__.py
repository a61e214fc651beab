"""Objectives of local training: hooks, the clients' memory, and what is sent beside the update."""
