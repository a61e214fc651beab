"""Progress, tables, summary and plots of a run."""
