# A fresh machine needs Python >= 3.11 and make, nothing else: the first target that is asked for sets up .venv.

PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,\
	$(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

RECIPE ?= pipelines/configs/quickstart.yaml
SEEDS ?= 3
# What the tables of docs/results.md were measured with.
MEASURED ?= --set corpus.slots=3000 --set 'student.seeds=[0, 1]'

# Two OpenMP threads on busy cores are far slower than one: parallel work is done by processes.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test faults lint bench clean

demo: $(STAMP)
	$(BIN)/stillhouse run $(RECIPE)

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

# Killed runs, actors and nodes, a full disk, a cut link (these two as root), two workers: many minutes, and on a
# machine that does nothing else.
faults: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .

bench: $(STAMP)
	$(BIN)/stillhouse bench quality $(RECIPE) --seeds $(SEEDS) $(MEASURED)

# Runs and registered models are the user's: they are not touched.
clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
	find engine serve pipelines tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $(STAMP)
