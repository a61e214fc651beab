"""The aggregation rules that come with the package: a file each, found by `rules`."""
