# Strongroom. 'make serve' runs a store for trying out; 'make test' runs every check. Both set themselves up.

SHELL := /bin/bash
# The system's own Python: users other than the one who builds can run it too.
PYTHON ?= $(firstword $(wildcard /usr/bin/python3) python3)
VENV := .venv
BIN := $(VENV)/bin
VAR := var
# Three tests at a time: many wait for each other's processes, and more at a time make waits long.
JOBS := 3
CONFIG := $(VAR)/strongroom.toml
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: serve demo test coverage crash fuzz soak bench scan lock clean

# What runs needs no test tools: each list of pinned, hashed requirements has a stamp of its own.
$(VENV)/run.stamp: .ci/requirements/run.txt pyproject.toml
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing what the server needs (pinned, hashed)"
	@$(PIP) --require-hashes -r .ci/requirements/run.txt
	@PYTHONWARNINGS='ignore:Editable installation' $(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp .ci/requirements/test.txt
	@echo "installing what the tests need (pinned, hashed)"
	@$(PIP) --require-hashes -r .ci/requirements/test.txt
	@touch $@

# A store for trying out: key file beside it, its own authority, one peer DEMO.
$(CONFIG): | $(VENV)/run.stamp
	@$(BIN)/strongroom --config $(CONFIG) init --with-pki --key-file $(VAR)/store.key
	@$(BIN)/strongroom --config $(CONFIG) peer add DEMO --issue $(VAR)/demo --description "for trying out"

serve: $(VENV)/run.stamp $(CONFIG)
	@$(BIN)/python -m benchmarks.demo explain $(CONFIG)
	@exec $(BIN)/strongroom --config $(CONFIG) serve

demo: $(VENV)/run.stamp
	@$(BIN)/python -m benchmarks.demo run

test: $(VENV)/test.stamp
	@.ci/apt
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

# The same with what of the code the tests of this process run; processes that tests start are not counted.
coverage: $(VENV)/test.stamp
	@.ci/apt
	$(BIN)/pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder --cov --cov-report=term:skip-covered

# Every point at which a process can be killed, and 200 rounds of random kills; STRONGROOM_CRASH_SEED repeats a run.
crash: $(VENV)/test.stamp
	@.ci/apt
	STRONGROOM_CRASH=all STRONGROOM_CRASH_ROUNDS=200 $(BIN)/pytest tests/crash --timeout 7200

# Every parser that bytes from outside reach, SECONDS each, one after the other; TARGET names one of them.
SECONDS := 300
TARGET := all
fuzz: $(VENV)/test.stamp
	nice $(BIN)/python tests/fuzz/run.py $(TARGET) --seconds $(SECONDS) --corpus $(VAR)/fuzz

# Good and bad peers together for SECONDS: nothing acknowledged is lost, no process grows. An hour takes up to 12 GB under /tmp.
soak: $(VENV)/test.stamp
	STRONGROOM_SOAK_SECONDS=$(SECONDS) nice $(BIN)/pytest -s tests/soak

# Takes up to 42 GB while it runs; as root also with two users and on a journaled image. '--from var/bench.json' shows the figures again.
bench: $(VENV)/test.stamp
	@.ci/apt
	$(BIN)/python -m benchmarks.receive --rounds 3 --journal --json $(VAR)/bench.json \
	  --markdown docs/performance.md --svg docs/performance.svg
	$(BIN)/python -m benchmarks.retrieve --rounds 5
	$(BIN)/python -m benchmarks.query --instances 1000000

# What sslyze sees of the gate of 'make serve', which must run. The scanner lives apart from what the server needs.
scan: $(VENV)/run.stamp
	@test -x $(VAR)/scan/bin/sslyze || { $(PYTHON) -m venv $(VAR)/scan && $(VAR)/scan/bin/pip install --quiet sslyze==6.3.1; }
	$(VAR)/scan/bin/sslyze --cert $(VAR)/demo/DEMO.pem --key $(VAR)/demo/DEMO.key 127.0.0.1:2762

# Only after a change of the dependencies in pyproject.toml; needs uv. setuptools is what the package itself is built with.
lock:
	echo 'setuptools>=77' | uv pip compile --quiet pyproject.toml - --universal --python-version 3.11 \
	  --generate-hashes --no-header --no-annotate --no-emit-index-url --output-file .ci/requirements/run.txt
	echo 'setuptools>=77' | uv pip compile --quiet pyproject.toml - --extra test --universal --python-version 3.11 \
	  --generate-hashes --no-header --no-annotate --no-emit-index-url --output-file .ci/requirements/test.txt

clean:
	rm -rf $(VENV) build *.egg-info
