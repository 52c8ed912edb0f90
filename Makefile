# Each target does all of its own set-up: a machine with Python, make and git is enough (Linux, macOS).
.PHONY: treat test test-slow test-torchvision test-ui quality style setup clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Python 3.10 gets the newest releases that still run on it, which are older than the pins.
PINS := $(shell $(PYTHON) -c "import sys; print('-c constraints.txt' * (sys.version_info >= (3, 11)))")
PIP := python -m pip install -q --disable-pip-version-check $(PINS)
# Left alone, accelerate gives a process one thread.
THREADS := $$($(BIN)/python -c "import os; print(os.cpu_count())")

setup: $(STAMP)

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) torch
	$(BIN)/$(PIP) -e ".[dev]"
	touch $(STAMP)

# Diagnose and treat the embedded miniature pipeline; ends with a report in runs/miniature.
treat: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(THREADS)} $(BIN)/accelerate launch --quiet \
		--config_file examples/accelerate/single_process.yaml \
		examples/treat_flux.py --pipeline miniature --output_dir runs/miniature --overwrite_output_dir

# Two processes of one thread each: much of a test's time goes into starting others and waiting for them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test: $(STAMP)
	$(PYTEST)

test-slow: $(STAMP)
	$(PYTEST) -m slow

# The image processor's other backend, which transformers takes wherever torchvision is: so it lies apart.
test-torchvision: $(STAMP)
	$(BIN)/$(PIP) --no-deps --upgrade --target $(VENV)/torchvision torchvision
	PYTHONPATH=tests/beside_torchvision:$(VENV)/torchvision $(BIN)/python -m pytest tests/detector

# gradio asks for an older Pillow than the one that is pinned: so it lies apart, as does the library that drives a browser.
PAGES := $(VENV)/pages

test-ui: $(STAMP)
	grep -v "^pillow" constraints.txt > $(VENV)/constraints-ui.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check $(subst constraints.txt,$(VENV)/constraints-ui.txt,$(PINS)) \
		--target $(PAGES) --upgrade "gradio>=6.20" playwright
	@command -v chromium chromium-browser google-chrome > /dev/null || test "$$(id -u)" != 0 || ! command -v apt-get > /dev/null \
		|| { apt-get update -qq && apt-get install -y -qq chromium > /dev/null; }
	PYTHONPATH=$(PAGES) $(PYTEST) tests/ui

quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
