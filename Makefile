# Everything runs in .venv, which the first target that needs it creates. `make help` lists the targets.
# Options: PYTHON=/path/to/python3.12 names the interpreter, ARGS="..." goes to the command that a target runs.

PYTHON ?= python3
ARGS   ?=
TORCH  := 2.13.0
BIN    := .venv/bin

# Node comes with pyright's wheel; without this the launcher may look for a newer pyright and print about it.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

# Threads that wait for each other sleep: spinning, they take the processor from the one they wait for, and on a busy
# machine every step takes ten times as long.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help env demo test app viewer lab bench lint format screenshots lock clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env:  ## create .venv, or bring it up to date; does nothing when it is
	@command -v $(PYTHON) >/dev/null || { echo "setup: no '$(PYTHON)' here; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) tools/setup_env.py --torch $(TORCH)

demo: env  ## lift, splat and match the embedded sample, and write a report
	$(BIN)/l2m demo $(ARGS)

# Half of the time tests wait, for a browser, a server or a kernel: all of them run in two processes, some (ARGS) in one.
test: env  ## run the tests (ARGS="-k name" for some of them)
	$(BIN)/python -m pytest $(or $(ARGS),-n 2 --dist worksteal)

app: env  ## start the Gradio app
	$(BIN)/python -m app $(ARGS)

viewer: env  ## start the 3D viewer
	$(BIN)/python -m app.viewer $(ARGS)

lab: env  ## open the notebooks in JupyterLab
	$(BIN)/jupyter-lab $(ARGS) notebooks

bench: env  ## measure speed with pytest-benchmark
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only $(ARGS)

lint: env  ## check format, lint, types, and that notebooks hold no outputs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
ifneq ($(wildcard notebooks/*.ipynb),)
	@$(BIN)/nbstripout --verify notebooks/*.ipynb || { echo "lint: strip these notebooks: make format" >&2; exit 1; }
endif

format: env  ## rewrite files as `make lint` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
ifneq ($(wildcard notebooks/*.ipynb),)
	$(BIN)/nbstripout notebooks/*.ipynb
endif

screenshots: env  ## take the pictures of the documentation with a real browser
	$(BIN)/python tools/screenshots.py $(ARGS)

lock: env  ## write the versions in .venv to constraints.txt
	@$(PYTHON) tools/setup_env.py --torch $(TORCH) --lock

clean:  ## remove caches and builds; .venv and outputs/ stay
	rm -rf build dist .pytest_cache .ruff_cache .benchmarks .numba_cache
	find l2m_viz app tests tools notebooks \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too
	rm -rf .venv
