"""Reports: figures, plots and HTML pages of runs."""
