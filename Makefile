# make help says what there is.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# What tests use beside Python: a browser for the report; Slurm, of which tests start their own.
DEBIAN := chromium chromium-driver slurm-wlm munge slurmdbd mariadb-server

.PHONY: help env demo bench test check format pins debian clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

env: $(INSTALLED) ## make the environment in .venv (a virtual environment, with uv inside it)

demo: $(INSTALLED) ## from images to report on this machine, in one to three minutes; it prints where the report is
	$(BIN)/python -m paws_hpc.launch

bench: $(INSTALLED) ## measures the image store beside the least that reading could cost: about 15 minutes
	$(BIN)/python -m paws_hpc.bench store

test: $(INSTALLED) debian ## all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/slurm
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder tests/slurm  # apart: each file has its own Slurm

check: $(INSTALLED) ## format, lint, types, direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

pins: $(INSTALLED) ## write the versions now in .venv to constraints.txt
	{ head -1 constraints.txt; $(BIN)/uv pip freeze --python $(BIN)/python | grep -v '^-e' | sort -f; } > constraints.new
	mv constraints.new constraints.txt

# Without root, or where there is no apt, the tests that need these are skipped, and say so.
debian:
	@missing=$$(for name in $(DEBIAN); do dpkg -s $$name 2>/dev/null | grep -q '^Status: .* installed$$' || echo $$name; done); \
	[ -z "$$missing" ] || { [ "$$(id -u)" = 0 ] && apt-get update -q && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; } || \
	  echo "Tests that need them will be skipped: apt-get install" $$missing

clean: ## remove the environment and caches; runs and packed shards stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache *.egg-info

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "Debian keeps venv in the package python3.11-venv: install it and run make again."; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $@
