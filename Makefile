# make install   everything into .venv (made here), with the C++ kernels where there is a compiler
# make demo      the dual loop end to end on an embedded default
# make test      all tests
# make bench     benchmarks of the ops
# make lint      ruff, and mypy on the public surface of repirl_kernels

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test bench lint clean

install: $(STAMP)

# Editable: Python sources are used from here, and only what the C++ module is made of asks for a new install.
$(STAMP): pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[train,bench,dev]'
	@$(BIN)/python -c "from repirl_kernels import choose_backend; print('repirl is installed; ops on the CPU run:', choose_backend('cpu', __import__('torch').float32))"
	@touch $@

demo: install
	$(BIN)/repirl demo

test: install
	$(BIN)/python -m pytest

bench: install
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-columns=median,iqr,rounds

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
