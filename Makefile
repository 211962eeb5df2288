# make demo   environment, install, a data set from the embedded pair, and its report
# make test   environment with the development packages, lint, and all tests
# make bench  microbenchmarks of the ops
# make clean  remove the environment and what was built

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Packages that the build needs beside the project: Torch's headers, and CMake without a system one.
BUILD_PACKAGES := torch numpy setuptools cmake ninja
INPUTS := setup.py pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test lint bench clean

demo: $(VENV)/.installed
	$(BIN)/steer-engine demo

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.installed-dev
	$(BIN)/python -m pytest bench --benchmark-only

$(VENV)/.installed: $(INPUTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt $(BUILD_PACKAGES)
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[eval]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build steer_engine/_csrc.so
