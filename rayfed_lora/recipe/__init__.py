"""The recipe: its sections, its checks, and where it comes from."""
