"""Clients on Ray actors."""
