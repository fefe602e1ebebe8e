# make lab    sets up and runs the lab on bundled data; resumes where it stopped
# make test   sets up and runs the tests
# make lint   sets up and checks style
# make gpu    runs everything that needs a GPU, after an estimate of its time
# All are safe to repeat. PYTHON=python3.12 make lab picks another interpreter.

PYTHON ?= python3
VENV := .venv
WORKERS ?= 2# processes that share the tests, each with one thread
RUN := $(VENV)/bin/python

.PHONY: lab test lint gpu clean

lab: $(VENV)/lab.ready
	@$(RUN) -m lab

test: $(VENV)/dev.ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/dev.ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	PYTHONPATH=. $(VENV)/bin/lint-imports --no-cache

gpu: $(VENV)/dev.ready
	$(RUN) -m benchmarks.gpu

# A stamp is written after all else, so an installation that broke off is taken up again.
$(VENV)/lab.ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/dev.ready: $(VENV)/lab.ready requirements-dev.txt
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV)
