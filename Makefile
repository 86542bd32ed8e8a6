# make quickstart   install, make a synthetic log, train on two workers, print the metrics beside the truth's
# make test         install with the test packages, lint, type check, all tests
# make lint         lint and type check only
# make clean        remove .venv, runs and caches
# DEVICE=cpu or DEVICE=cuda picks the build; by default deploy/install.sh decides.

DEVICE ?=
# One thread a process: the tests start several processes, which would otherwise fight for the cores.
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS

.PHONY: quickstart test lint install install-dev clean

quickstart: install
	bash pipelines/quickstart/run.sh

# Two processes: what starts Ray clusters, which is waiting for the most part, beside all else (tests/conftest.py).
test: lint
	.venv/bin/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder --durations=15

lint: install-dev
	.venv/bin/ruff check .
	.venv/bin/mypy

install:
	deploy/install.sh $(DEVICE)

install-dev:
	deploy/install.sh $(DEVICE) --dev

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .hypothesis build mtrec.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
