"""What a machine or a cluster offers, and what is wrong with it."""
