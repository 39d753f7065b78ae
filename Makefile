# make run     install, then ask the embedded model a question
# make test    install, then lint, types and tests: what continuous integration runs
# make parity  compare every card with transformers and write docs/parity.md
# make lint | types | format | docs | bench | constraints | clean
#
# PYTHON names the interpreter (3.11 to 3.13), VENV the environment's folder.

PYTHON ?= python3
VENV ?= .venv
PROMPT ?= How many experts does Mixtral 8x7B have?
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
PRODUCT := zoo registry components
CHECKED := $(PRODUCT) tests docs

.PHONY: run test parity lint types format docs bench constraints clean python

run: $(VENV)/installed
	$(BIN)/zoo run tiny --prompt "$(PROMPT)"

test: $(VENV)/installed-tests lint types
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/installed-tests
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/python docs/generate.py --check

format: $(VENV)/installed-tests
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

# mypy cannot follow the mapping of registry/ to zoo.registry, so it reads a tree of links in which it is a folder.
types: $(VENV)/installed-tests
	rm -rf .mypy_tree && mkdir -p .mypy_tree/zoo
	ln -s "$(CURDIR)"/zoo/* "$(CURDIR)"/registry "$(CURDIR)"/components "$(CURDIR)"/cards .mypy_tree/zoo/
	ln -s "$(CURDIR)"/tests .mypy_tree/
	cd .mypy_tree && "$(abspath $(BIN))/mypy" --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p zoo -p tests

docs: $(VENV)/installed-tests
	$(BIN)/python docs/generate.py

parity: $(VENV)/installed-tests
	ZOO_PARITY_PAGE=docs/parity.md $(BIN)/python -m pytest tests/parity/test_every_card.py -k shrunk_card

bench: $(VENV)/installed-tests
	$(BIN)/python -m tests.benchmarks $(or $(ARGS),prefill decode)

constraints: $(VENV)/installed-tests
	{ sed -n '/^#/p' constraints.txt; $(PIP) freeze --all --exclude pip --exclude triton --exclude-editable | sed 's/+cpu$$//'; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) .mypy_tree .mypy_cache .ruff_cache .pytest_cache build zoo_inference.egg-info components/native/*.so

# The environment is made anew when PYTHON's version changes, and brought up to date when the requirements do.
$(VENV)/python-$(VERSION): | python
	$(PYTHON) -m venv --clear "$(VENV)"
	touch $@

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'zoo needs Python 3.11 or newer; $(PYTHON) is $(or $(VERSION),not there). Name another: make run PYTHON=python3.12' >&2; \
	  exit 2; }

$(VENV)/installed: pyproject.toml constraints.txt $(wildcard components/native/*.[ch]) $(VENV)/python-$(VERSION)
	$(PIP) install -c constraints.txt -e .
	@$(BIN)/python -c 'from zoo.components.compiled import unbuilt; why = unbuilt(); why and print("zoo: the native kernels were not built, so a CPU with AVX-512 is slower than it could be:", why)' >&2
	touch $@

# mistral-inference is compared with in tests. Its xformers has no CPU kernels, and a tree of requirements of its
# own, so both are installed bare; where xformers has no wheel, those tests say so and are skipped. Triton's interpreter
# runs the kernels of GPUs; PyTorch's builds for CUDA have brought the one that they need, so no version is named.
$(VENV)/installed-tests: $(VENV)/installed
	$(PIP) install -c constraints.txt -e '.[test,lint]'
	$(PIP) install -c constraints.txt --no-deps mistral-inference $(foreach name,xformers triton,'$(name); sys_platform == "linux" and platform_machine == "x86_64"')
	touch $@
