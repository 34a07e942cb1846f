# Everything runs in .venv, which the first target that needs it makes. That takes make, Python >= 3.10
# with pip, and a network once; a .venv that has a torch already keeps it.
#   make demo PYTHON=python3.12     another Python for a new .venv
#   make demo TORCH=torch==2.12.1   another torch for a new .venv
#   make test ARGS="-k house"       arguments for pytest
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ARGS ?=

.DELETE_ON_ERROR:
.PHONY: help demo studio test lint bench soak thumbnails screenshots clean

help:
	@echo 'make demo    a picture from the embedded model'
	@echo 'make studio  the editor, in your browser'
	@echo 'make test    the tests; ARGS="-k name --slow" goes to pytest'
	@echo 'make lint    style, format, types'
	@echo 'make bench   every benchmark, one after the other'
	@echo 'make soak    the studio under load: 20,000 hostile requests, then 10,000 jobs'
	@echo 'make thumbnails  the example workflows again, each with a picture that it made'
	@echo 'make screenshots  the pictures of docs/images anew; needs Chromium'
	@echo 'make clean   remove caches and build leftovers; .venv stays'

demo: $(VENV)/ready-run
	$(BIN)/seedling demo

studio: $(VENV)/ready-host
	$(BIN)/seedling studio

test: $(VENV)/ready-dev
	$(BIN)/pytest -q --durations=10 $(ARGS)

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# -m, not the file: run as files they would put benchmarks/ on the import path and lose the package.
bench: $(VENV)/ready-dev
	@set -e; for file in benchmarks/[!_]*.py; do [ -e "$$file" ] || continue; \
	  name=$$(basename $$file .py); echo "== $$name"; $(BIN)/python -m seedling.benchmarks.$$name; \
	done

soak: $(VENV)/ready-dev
	SOAK_REQUESTS=20000 SOAK_JOBS=10000 $(BIN)/pytest -q -s --slow tests/test_host_soak.py $(ARGS)

thumbnails: $(VENV)/ready-dev
	$(BIN)/python tests/workflows/make.py --thumbnails

screenshots: $(VENV)/ready-dev
	$(BIN)/python tests/screenshots.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# A system Python without ensurepip makes a .venv without pip, which its own pip then fills.
$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and \
	  "Python >= 3.10 is needed, $(PYTHON) is %d.%d; say which to use: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(BIN)/python install pip; }

# torch first and exactly as named: a looser requirement may fetch another build of it. What follows
# is held to the build that is there.
$(VENV)/torch.txt: | $(VENV)/pyvenv.cfg
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install '$(TORCH)'
	$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $@.part
	mv $@.part $@

$(VENV)/ready-run: EXTRAS := run
$(VENV)/ready-host: EXTRAS := run,host
$(VENV)/ready-dev: EXTRAS := run,dev
$(VENV)/ready-run $(VENV)/ready-host $(VENV)/ready-dev: pyproject.toml setup.py | $(VENV)/torch.txt
	$(PIP) install --quiet --constraint $(VENV)/torch.txt --editable '.[$(EXTRAS)]'
	@# The link lets pyright find the package: it cannot follow an editable install's import hook.
	@mkdir -p $(VENV)/types && ln -sfn ../.. $(VENV)/types/seedling
	@touch $@
