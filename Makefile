# `make demo` and `make test` need nothing but Python 3.11 or newer: they make .venv and install what they use.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ringsim-installed
SOURCES := $(shell find ringsim backends topologies -name '*.py' -o -name '*.yaml') setup.cfg pyproject.toml
MPIEXEC := $(abspath $(BIN))/mpiexec
RINGSIM := $(abspath $(BIN))/ringsim

.PHONY: demo test bindings check docs clean

demo: $(READY)
	@mkdir -p demo
	@echo "== calibrating this machine with 4 ranks at work (some seconds)"
	@cd demo && $(MPIEXEC) -n 4 $(RINGSIM) calibrate -o here.yaml --head-dim 64 </dev/null
	@echo "== running the ring on 4 ranks, next to its prediction"
	@cd demo && $(MPIEXEC) -n 4 $(RINGSIM) compare --topology here.yaml --seq 8K --heads 8 --head-dim 64 --causal \
		--partition zigzag --check --json compare.json --trace trace.json </dev/null
	@echo "== demo/here.yaml: this machine; demo/compare.json: these facts; demo/trace.json: open it in ui.perfetto.dev"

test: $(READY)
	@echo "== running the tests, those over MPI included (some minutes)"
	@$(BIN)/pytest -q -m "not mpi" -n auto
	@$(BIN)/pytest -q -m mpi

bindings: $(READY)
	@echo "== installing torch and jax (1.5 GB) and running the tests of ringsim.bindings"
	@$(BIN)/pip install --quiet --disable-pip-version-check '.[mpich,dev,torch,jax]'
	@rm -rf build
	@$(BIN)/pytest -q tests/test_bindings_torch.py tests/test_bindings_jax.py tests/test_api.py

check: $(READY)
	@echo "== ruff and mypy"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@cd tests && ../$(BIN)/mypy --config-file ../pyproject.toml -p ringsim

docs: $(READY)
	@echo "== writing the figure and the table of docs/ from runs on this machine (some minutes)"
	@$(BIN)/pip install --quiet --disable-pip-version-check '.[mpich,plots]'
	@$(BIN)/python docs/make.py

clean:
	rm -rf .venv build demo *.egg-info

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "ringsim needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 2; }
	@echo "== making .venv"
	@$(PYTHON) -m venv .venv

$(READY): $(SOURCES) | .venv/bin/python
	@echo "== installing ringsim, an MPI (mpich) and the test tools into .venv"
	@rm -rf build
	@$(BIN)/pip install --quiet --disable-pip-version-check '.[mpich,dev]'
	@rm -rf build
	@touch $@
