# make sweep | make test | make train | make lint | make gpu | make rehearse | make notebooks | make pins: each creates .venv on first use and needs nothing before it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WORKERS ?= 2

.PHONY: sweep test train lint gpu rehearse notebooks pins clean

sweep: $(INSTALLED)
	$(BIN)/python bench/attention_sweep.py $(ARGS)

# Triton's interpreter is chosen when kernels are imported, so its lane is a process of its own. A test that hangs fails.
PYTEST := -m pytest -n $(WORKERS) -o faulthandler_timeout=300 -o faulthandler_exit_on_timeout=true
test: $(INSTALLED)
	$(BIN)/python $(PYTEST) $(ARGS)
	$(BIN)/python $(PYTEST) -m interpret $(ARGS)

# A small GPT-2 from the text that every Python brings, in minutes on two cores; then python -m model "def " --model out/tiny
train: $(INSTALLED)
	$(BIN)/python -m model.train --text builtin --size tiny --steps 500 --out out/tiny --sample "def " $(ARGS)

# All that is worth knowing on a GPU, in nine minutes; and the same plan without one, in one and a half.
gpu: $(INSTALLED)
	$(BIN)/python bench/run_all.py $(ARGS)

rehearse: $(INSTALLED)
	$(BIN)/python bench/run_all.py --rehearse $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Runs the notebooks and stores what they print and draw, as their tests require.
notebooks: $(INSTALLED)
	$(BIN)/python tests/notebooks.py $(ARGS)

# The newest versions of all but torch and triton, in an environment of their own: run the tests before committing them.
pins:
	rm -rf .pins && $(PYTHON) -m venv .pins
	grep -E '^(torch|triton)==' constraints.txt > .pins/kept.txt
	.pins/bin/python -m pip install --quiet --disable-pip-version-check -c .pins/kept.txt -e '.[test,notebooks]'
	.pins/bin/python tests/pins.py
	rm -rf .pins

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,notebooks]'
	touch $@

clean:
	rm -rf $(VENV) .pins .pytest_cache .ruff_cache .mypy_cache *.egg-info
