# make demo      environment, install, model, then distillation on two ranks beside a control; see runs/demo
# make test      the checks, then the tests that are not slow: 6 minutes at most on two slow cores
# make test-all  the checks, then every test: with the matrix and the slow ones, 25 minutes at most there
# make check     ruff and mypy
# make clean     what these made
#
# Everything is installed into .venv; VENV=DIRECTORY names another place, or an environment of your own. A torch that is
# there already, in VENV or in PYTHON's environment (an active conda or virtual environment included), is used and never
# replaced; without one the pinned torch is installed. See scripts/install.py.

PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.shmbridge-installed

IN_VENV := PATH="$(abspath $(VENV))/bin:$$PATH"

.PHONY: demo test test-all check clean install

demo: $(INSTALLED)
	$(IN_VENV) scripts/demo.sh

# "slow" and "matrix" are explained in pyproject.toml. Where the test of a promise is slow, because it breaks a whole run, quicker
# ones break the same thing with stand-ins for torchrun or the teacher.
test: check
	$(IN_VENV) pytest -n 2 --dist worksteal -m "not slow and not matrix"

test-all: check
	$(IN_VENV) pytest -n 2 --dist worksteal

check: $(INSTALLED)
	$(IN_VENV) ruff check
	$(IN_VENV) ruff format --check
	$(IN_VENV) mypy

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt scripts/install.py
	$(PYTHON) scripts/install.py $(VENV)
	touch $@

# A VENV of your own is left alone.
clean:
	rm -rf .venv .cache runs build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
