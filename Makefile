# `make help` explains every target. Written for GNU make 3.81 (macOS) and later.
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help lab test bench experiments docs readme tiny-model gates clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

$(INSTALLED): settings.ini setup.py pyproject.toml constraints.txt tools/setup.sh
	@sh tools/setup.sh

lab: $(INSTALLED) ## copy the course into workspace/ and open it in JupyterLab (LAB_ARGS=--no-browser on a server)
	@$(BIN)/sftlab lab workspace $(LAB_ARGS)

test: $(INSTALLED) ## run every notebook, the tests and the browser test (TEST_ARGS="-k models" for a part)
	@$(BIN)/python -m pytest $(TEST_ARGS)

bench: $(INSTALLED) ## time the course's code (nothing to time yet)
	@echo "Nothing to time yet: the lessons print how long their own steps take, and make test how long each lesson takes."

NAME ?= all
experiments: $(INSTALLED) ## run the long experiments whose code has changed (NAME=… for one of them); goes on where it was stopped
	@$(BIN)/python -c "from sftlab.experiments import main; main('$(NAME)')"

docs: $(INSTALLED) ## build the website in _docs/ (needs Quarto)
	@$(BIN)/python tools/docs.py

readme: $(INSTALLED) ## make README.md from nbs/index.ipynb
	@$(BIN)/python tools/readme.py

tiny-model: $(INSTALLED) ## rebuild the tiny model from nothing: text, tokenizer, pretraining, gates (one to two hours on two cores)
	@$(BIN)/python -c "from sftlab.pretraining import build, gates; build(); gates()"

gates: $(INSTALLED) ## measure whether the tiny model behaves as the lessons need
	@$(BIN)/python -c "from sftlab.pretraining import gates; gates()"

clean: ## remove what builds and tests leave behind (keeps .venv, workspace/ and runs/)
	rm -rf build dist *.egg-info _proc _docs .pytest_cache .hypothesis
	find . -name .venv -prune -o -name workspace -prune -o -name __pycache__ -prune -exec rm -rf {} +
