# make demo   compress a photograph, decompress it, show both
# make test   lint, the documentation site and the whole test suite
# make results IMAGES=folder   curves, BD-rates, tables, plots and a page to look at into results/
# make fuzz   coverage-guided fuzzing of streams for FUZZ_SECONDS (60), finds into fuzz/
# make bench IMAGES=folder PHOTOS=folder   benchmarks into benchmarks/results/
# make docs   the documentation site into site/
# make notebooks   runs all notebooks; leaves them, with what they show, in notebooks/executed/
# make package   sdist and wheel into dist/; installs the wheel in a fresh environment and runs the demo there
# make lint   ruff and mypy only
# make format let ruff rewrite the code

# TensorFlow Compression's last release has wheels for Python 3.9 to 3.11 only.
PYTHON ?= $(shell for p in python3.11 python3.10 python3.9 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 9) <= sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
export TF_CPP_MIN_LOG_LEVEL := 3

.PHONY: setup demo test results fuzz bench docs notebooks package lint format clean
setup: .venv/done

.venv/done: requirements.txt setup.py
	@$(if $(PYTHON),$(PYTHON),false) -c 'import sys; sys.exit(not (3, 9) <= sys.version_info < (3, 12))' 2>/dev/null || \
		{ echo "goconv_tf needs Python 3.9, 3.10 or 3.11 (TensorFlow Compression has no newer release): install python3.11, then run make again."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

demo: setup
	$(BIN)/python experiments/demo.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint docs
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

results: setup
	@test -n "$(IMAGES)" || { echo "make results IMAGES=folder: which pictures? (Kodak, for the papers' tables)"; exit 2; }
	$(BIN)/python experiments/tables/all.py "$(IMAGES)" --output "$(or $(OUTPUT),results)"

fuzz: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check atheris==2.3.0
	$(BIN)/python tests/fuzz.py $(or $(FUZZ_SECONDS),60)

# The peer has an environment of its own: torch and TensorFlow want different packages.
.venv-peer/done: benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-peer
	.venv-peer/bin/python -m pip install --quiet --disable-pip-version-check --extra-index-url https://download.pytorch.org/whl/cpu -r benchmarks/requirements.txt
	.venv-peer/bin/python -m pip install --quiet --disable-pip-version-check --no-deps compressai==1.2.8 pytorch-msssim==1.0.0
	touch $@

bench: setup .venv-peer/done
	@test -n "$(IMAGES)" -a -n "$(PHOTOS)" || { echo "make bench IMAGES=kodak-folder PHOTOS=training-folder [SECTIONS='peer peak ...']"; exit 2; }
	$(BIN)/python benchmarks/bench.py --images "$(IMAGES)" --photos "$(PHOTOS)" --peer_python .venv-peer/bin/python $(SECTIONS)

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs --quiet build --strict

notebooks: setup
	NOTEBOOKS_OUTPUT="$(CURDIR)/notebooks/executed" $(BIN)/python -m pytest tests/test_notebooks.py

# Dependencies of the wheel come in the versions that are tested; nothing of this folder but the demo's script is used.
package: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	folder=$$(mktemp -d) && trap "rm -rf $$folder" EXIT && unset PYTHONPATH GOCONV_TF_ZOO && \
	$(PYTHON) -m venv $$folder/venv && \
	$$folder/venv/bin/pip install --quiet --disable-pip-version-check -c requirements.txt "$$(ls dist/*.whl)[demo]" && \
	cd $$folder && PATH="$$folder/venv/bin:$$PATH" && pip check && \
	python "$(CURDIR)/experiments/demo.py" && goconv models && goconv info demo/coffee-0.4.gcv && goconv-train --help | grep checkpoint_dir > /dev/null

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-peer build dist demo site notebooks/executed *.egg-info .pytest_cache .ruff_cache .mypy_cache
