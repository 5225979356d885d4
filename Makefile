# `make help` explains every target. Written for GNU make 3.81 (macOS) and later.
BIN := .venv/bin
LAB := .venv/.installed
DEV := .venv/.installed-dev
PINS := settings.ini setup.py pyproject.toml constraints.txt tools/setup.sh tools/uv_settings.py

.DEFAULT_GOAL := help
.PHONY: help lab test test-quick test-all test-colab lint bench experiments lessons exercises nbgrader docs live readme tiny-model gates clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

$(LAB): $(PINS)
	@sh tools/setup.sh lab

$(DEV): $(PINS)
	@sh tools/setup.sh dev

lab: $(LAB) ## copy the course into workspace/ and open it in JupyterLab (LAB_ARGS=--no-browser on a server)
	@$(BIN)/sftlab lab workspace $(LAB_ARGS)

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

test: $(DEV) lint ## set up, check the form, run every notebook, the tests and the browser test (TEST_ARGS="-k models" for a part)
	@$(PYTEST) $(TEST_ARGS)

test-quick: $(DEV) lint ## for authors, in three minutes: what trains nothing and starts no notebook
	@$(PYTEST) --quick $(TEST_ARGS)

test-all: $(DEV) lint ## whole matrices, and as many kills as patience allows: what is too long for every change
	@$(PYTEST) --all $(TEST_ARGS)

FREEZE ?= tests/colab/freeze.txt
test-colab: $(DEV) ## run some notebooks with Colab's versions, from their own install cell (FREEZE=… for a newer list; COLAB_PYTHON=/path/to/its/python3)
	@$(BIN)/python tests/colab/run.py --freeze $(FREEZE) $(PAGES)

lint: $(DEV) ## check the form of notebooks, tests and tools
	@$(BIN)/ruff check --quiet .

bench: $(DEV) ## time our training, packing and data preparation against TRL's, on a quiet machine (SFTLAB_REAL_DATA=… for real files too)
	@HF_HUB_OFFLINE=1 $(BIN)/python -c "from sftlab.study.bench import main; main()"

NAME ?= all
HOW ?= run
experiments: $(DEV) ## run the long experiments whose code has changed (NAME=… for one; HOW=confirm where it was only rewritten)
	@$(BIN)/python -c "from sftlab.study.experiments import main; main('$(NAME)', '$(HOW)')"

exercises: $(DEV) ## make the learners' notebooks and sftlab/study/checks/ from exercises/solutions/
	@$(BIN)/nbdev_clean --fname exercises/solutions
	@$(BIN)/nbdev_export --path exercises/solutions
	@$(BIN)/python -c "from sftlab.study.masters import make_notebooks; print(*make_notebooks(), sep='\n')"

nbgrader: $(DEV) ## make a course for nbgrader in _nbgrader/ (there: nbgrader generate_assignment 01_generation)
	@$(BIN)/python -c "from sftlab.study.masters import make_nbgrader; print(*make_nbgrader(), sep='\n')"

lessons: $(DEV) ## bring all that lists lessons in step with tools/lessons.yml; badges, installation on Colab and links with settings.ini
	@$(BIN)/python tools/lessons.py
	@$(BIN)/python tools/colab.py

docs: $(DEV) ## build the website in _docs/ (needs Quarto; then: python tools/check_site.py)
	@$(BIN)/python tools/docs.py

live: $(DEV) ## serve the live page, the tiny model in a browser, on http://127.0.0.1:8000
	@$(BIN)/python tools/live.py serve

readme: $(DEV) ## make README.md from nbs/index.ipynb
	@$(BIN)/python tools/readme.py

tiny-model: $(DEV) ## rebuild the tiny model from nothing: text, tokenizer, pretraining, gates (one to two hours on two cores)
	@$(BIN)/python -c "from sftlab.tiny.pretraining import build_tiny_model; from sftlab.tiny.gates import gates; build_tiny_model(); gates()"

gates: $(DEV) ## measure whether the tiny model behaves as the lessons need
	@$(BIN)/python -c "from sftlab.tiny.gates import gates; gates()"

clean: ## remove what builds and tests leave behind (keeps .venv, workspace/ and runs/)
	rm -rf build dist *.egg-info _proc _docs _live .pytest_cache .hypothesis
	find . -name .venv -prune -o -name workspace -prune -o -name __pycache__ -prune -exec rm -rf {} +
