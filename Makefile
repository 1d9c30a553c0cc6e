# make run   the main job on this machine: a small base model learns to reason by reinforcement learning alone
# make test  the tests
# Each target makes its own environment first. Settings: make run ARGS='--config.zero.loop.steps=200', PYTHON=python3.12, VENV=…

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PYTEST_ARGS ?=
# Few worker processes, each with neighbouring tests; more would compile the same programs again.
WORKERS ?= 2
PYTEST = $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: run shape-model test test-slow test-py312 kernels-check bench tables lint clean
.DELETE_ON_ERROR:

run: $(VENV)/.installed
	$(BIN)/python -m experiments.run --config=experiments/configs/deepseek_r1/quickstart.py $(ARGS)

# A small Hunyuan3D to make meshes of images with: shapes to learn, the VAE, the transformer; each goes on where it was.
shape-model: data/shapes/heldout/index.json
	$(BIN)/python -m experiments.run --config=experiments/configs/hunyuan3d_2/vae.py --workdir=runs/vae $(ARGS)
	$(BIN)/python -m experiments.run --config=experiments/configs/hunyuan3d_2/dit.py --workdir=runs/dit $(ARGS)
	@echo "Now: $(BIN)/python -m experiments.shape --image=chair.png --checkpoint=runs/dit --out=chair.glb"

data/shapes/heldout/index.json: | $(VENV)/.installed-shape
	$(BIN)/python -m research.hunyuan3d_2.data.build --out=data/shapes --train=2000 --heldout=200 --workers=2

test: $(VENV)/.installed-dev
	$(PYTEST) $(PYTEST_ARGS)

# Minutes-long checks, the comparison with PyTorch implementations, reasoning-gym, the notebooks. Many wait for processes
# of their own, so there is one worker more.
test-slow: WORKERS = 3
test-slow: $(VENV)/.installed-all
	$(PYTEST) -m "slow or parity or gym" $(PYTEST_ARGS)

# A part of the suite on the other pair of JAX and Flax that setup.cfg names: with it come the GPU kernels' interpreted
# tests, for which the first pair has no interpreter.
test-py312:
	$(MAKE) test PYTHON=python3.12 VENV=.venv312 \
	  PYTEST_ARGS="tests/core tests/rl $(addprefix tests/lm/test_,decoder.py sampler.py kernels.py) \
	  tests/hunyuan3d_2/test_geometry_*.py tests/pallas_kernels/*_gpu.py $(PYTEST_ARGS)"

# Every Pallas kernel: right when interpreted, compiled by the real compilers of GPU and TPU, within its budget.
kernels-check:
	$(MAKE) .kernels-check PYTHON=python3.12 VENV=.venv-kernels

.PHONY: .kernels-check
.kernels-check: $(VENV)/.installed-kernels
	$(BIN)/python -m pallas_kernels.check $(ARGS)

# Sampling, GRPO, RLOO and PPO steps, tokenising and packing beside public rivals on the same work.
bench: $(VENV)/.installed-all
	$(BIN)/python -m experiments.bench $(ARGS)

# The papers' tables at the scale of this machine, each with its own seeds: one to two hours for a paper on two cores.
# make tables TABLES=minimax_01/cost
TABLES ?= deepseek_r1/zero $(addprefix minimax_01/,scaling retrieval architecture length cost) \
  $(addprefix reinforce_pp/,bias proxy noise comparison overfit knights transfer tools) \
  $(addprefix hunyuan3d_2/,reconstruction decoding generation)
tables: $(VENV)/.installed $(if $(findstring hunyuan3d_2,$(TABLES)),data/shapes/heldout/index.json)
	for table in $(TABLES); do $(BIN)/python -m experiments.table $$table --scale=cpu $(ARGS) || exit 1; done

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

clean:
	rm -rf .venv .venv312 .venv-kernels .cache build *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.cfg | $(BIN)/python
	$(PIP) -e . && touch $@

$(VENV)/.installed-shape: setup.cfg | $(BIN)/python
	$(PIP) -e '.[shape]' && touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: setup.cfg | $(BIN)/python
	$(PIP) -e '.[dev]' && touch $@ $(VENV)/.installed

$(VENV)/.installed-all: setup.cfg | $(BIN)/python
	$(PIP) -e '.[dev,parity,notebooks,gym]' && touch $@ $(VENV)/.installed $(VENV)/.installed-dev

$(VENV)/.installed-kernels: setup.cfg | $(BIN)/python
	$(PIP) -e '.[kernels]' && touch $@
