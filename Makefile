# Each target makes .venv when it is missing, with the pinned versions of constraints.txt.
PYTHON ?= python3.11
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
# Without an NVIDIA GPU take the CPU build of torch: the default one pulls gigabytes of CUDA.
CPU_INDEX := https://download.pytorch.org/whl/cpu
# One short question, because pip would ask many times and warn each time. It trusts nobody: pip checks certificates itself.
ANSWERS := $(PYTHON) -c "import ssl, urllib.request as u; c = ssl.create_default_context(); c.check_hostname = False; \
	c.verify_mode = ssl.CERT_NONE; u.urlopen('$(CPU_INDEX)/torch/', timeout=5, context=c)" 2>/dev/null

.PHONY: demo test lint bench clean

demo: .venv/ready
	$(BIN)/whence demo --output_dir demo

test: .venv/ready lint
	$(BIN)/pytest -n 2

lint: .venv/ready
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/ready
	WHENCE_LONG=1 $(BIN)/pytest tests/wild/test_examples.py
	$(BIN)/python benchmarks/features.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/datamodels.py
	$(BIN)/python benchmarks/ekfac.py
	$(BIN)/python benchmarks/unroll.py
	$(BIN)/python benchmarks/lora.py
	$(BIN)/python benchmarks/digits.py
	$(BIN)/python benchmarks/further.py
	$(BIN)/python benchmarks/further_variants.py
	$(BIN)/python benchmarks/likelihood.py
	$(BIN)/python benchmarks/counterfactual.py

clean:
	rm -rf .venv demo

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@if command -v nvidia-smi >/dev/null 2>&1; then index=; \
	elif $(ANSWERS); then index="--extra-index-url $(CPU_INDEX)"; \
	else index=; echo "$(CPU_INDEX) does not answer, so torch comes from the usual index"; fi; \
	$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt $$index torch==2.13.0
	$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/pip install -qq --disable-pip-version-check --no-deps -c constraints.txt kronfluence
	touch .venv/ready
