# make train    set up .venv, build charlm, train on the names that ship, print the table and samples
# make test     the same set-up, then the tests, on as many processes as there are processors
# make test-all the same with the exhaustive ones, which take long
# make test-on-demand   those that take minutes each and repeat in another way what the others test
# make test-clang   build a copy with Clang (CLANGXX, default clang++) in build/clang, and run the tests of the ops there
# make fuzz     random calls of every op against float64, ten minutes from a fresh seed
# make thirdparty   try charlm under torch's own OpInfo and ModuleInfo, transformers, PEFT, Lightning and litgpt
# make browser  show a report and the live page in Chromium, headless: Debian's chromium, or the one that CHROMIUM names
# make docs     the reference site in build/site, from README, docs/ and docstrings; warnings are errors
# make bench    time every op beside torch, torch.compile and JAX (an idle machine; `python -m bench --help` for less)
# make lint     ruff, clang-format, mypy and pyright, nothing changed; `make format` applies the first two
# make build    compile what changed under csrc/ (ninja: one changed .cpp is one compiler run)
# make cuda-check   build for CUDA in .venv-cuda (a torch of several GB) and test what needs no GPU; needs nvcc
# make gpu      with a GPU: build for it with what is installed, test, check and time; nine minutes at most
# make clean    remove the build products; .venv stays. `make distclean` removes the .venvs and trained models too
#
# Needed: python3 (>= 3.10, with its headers), make, g++. Every target is quick the second time: the stamp
# files in .venv are newer than what they were made from.

PYTHON ?= python3
OUT ?= out

VENV := .venv
BIN := $(VENV)/bin
CXX_NAMES := -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'
CXX_FILES := $(shell find csrc $(CXX_NAMES))
LINTED_CXX_FILES := $(CXX_FILES) $(shell find bench tests $(CXX_NAMES))
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The tests of a file share what they build, so they run in one process.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --dist loadfile

# What the tests of the ops need, and those tests: `make test-clang` copies the first and runs the second.
CLANG_TREE := build/clang
CLANG_PARTS := bench charlm csrc scripts tests README.md pyproject.toml setup.py
CLANG_TESTS := build_info build_module cross_entropy* devices differentiable_metrics double_backward embedding* entropy few_classes information kl_div* options \
	large_offsets linear_cross_entropy* loss_dtype many_rows modules ngrams patching* subclasses surprisal torch_citizenship_* compiled_autograd
CLANGXX ?= clang++

.PHONY: train test test-all test-on-demand test-clang thirdparty fuzz browser docs cuda-check gpu bench lint format build clean distclean

train: $(VENV)/built
	$(BIN)/charlm train -o $(OUT) --overwrite

test: $(VENV)/dev $(VENV)/built
	$(PYTEST)

test-all: $(VENV)/dev $(VENV)/built
	$(PYTEST) -m "not browser and not on_demand"

test-on-demand: $(VENV)/dev $(VENV)/built
	$(PYTEST) -m on_demand

browser: $(VENV)/browser $(VENV)/built
	$(BIN)/python -m pytest -m browser tests/test_*_browser.py

docs: $(VENV)-docs/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict --config-file scripts/mkdocs.yml

fuzz: $(VENV)/dev $(VENV)/built
	$(BIN)/python -W ignore -m tests.fuzz

test-clang: $(VENV)/dev
	mkdir -p $(CLANG_TREE)
	cd $(CLANG_TREE) && rm -rf $(CLANG_PARTS)
	cp -a $(CLANG_PARTS) $(CLANG_TREE)
	cd $(CLANG_TREE) && rm -f charlm/_C.*.so charlm/_build_config.json
	cd $(CLANG_TREE) && CXX="$(CLANGXX)" FORCE_CUDA=0 ../../$(BIN)/python setup.py -q build_ext --inplace
	cd $(CLANG_TREE) && PYTHONPATH="$$PWD" ../../$(BIN)/python -m pytest $(CLANG_TESTS:%=tests/test_%.py)

# One thread: the tensors are tiny, and on a busy machine threads that wait for each other took ten times as long.
thirdparty: $(VENV)-thirdparty/installed $(VENV)/built
	OMP_NUM_THREADS=1 $(VENV)-thirdparty/bin/python -m pytest tests/thirdparty -W ignore --record tests/thirdparty/RESULTS.md

cuda-check:
	$(PYTHON) scripts/cuda_check.py

gpu:
	$(PYTHON) -m bench.gpu

bench: $(VENV)/bench $(VENV)/built
	$(BIN)/python -m bench

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(LINTED_CXX_FILES)
	$(BIN)/mypy
	PYTHONPATH="$(CURDIR)" $(BIN)/basedpyright --project tests --pythonpath $(BIN)/python

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(LINTED_CXX_FILES)

build: $(VENV)/built

clean:
	rm -rf build dist *.egg-info charlm/_C.*.so charlm/_build_config.json $(VENV)/built
	rm -rf .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find bench charlm tests scripts -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(VENV)-thirdparty $(VENV)-docs .venv-cuda $(OUT)

$(VENV)/runtime: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements.txt
	touch $@

$(VENV)/dev: requirements-dev.txt $(VENV)/runtime
	$(PIP) install -r requirements-dev.txt
	touch $@

$(VENV)/bench: requirements-bench.txt $(VENV)/runtime
	$(PIP) install -r requirements-bench.txt
	touch $@

$(VENV)/browser: requirements-browser.txt $(VENV)/dev
	$(PIP) install -r requirements-browser.txt
	touch $@

# An environment of its own: it takes charlm from the checkout. litgpt bounds huggingface-hub below what transformers
# needs, and its own code does not care: --no-deps.
$(VENV)-thirdparty/installed: requirements-thirdparty.txt requirements-dev.txt requirements.txt
	$(PYTHON) -m venv $(VENV)-thirdparty
	$(VENV)-thirdparty/bin/python -m pip --disable-pip-version-check install -r requirements-thirdparty.txt
	$(VENV)-thirdparty/bin/python -m pip --disable-pip-version-check install --no-deps litgpt==0.5.13
	touch $@

# Another one, without torch: 20 packages.
$(VENV)-docs/installed: requirements-docs.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip --disable-pip-version-check install -r requirements-docs.txt
	touch $@

$(VENV)/built: $(VENV)/runtime setup.py pyproject.toml charlm/_version.py $(CXX_FILES)
	$(PIP) install --no-build-isolation --editable ".[lm,report,serve]"
	touch $@
