"""Ray Tune over recipes: one trial is one run."""
