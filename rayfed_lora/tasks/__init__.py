"""The tasks of a run: messages, and the seam between round loop, engines and trainers."""
