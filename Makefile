# `make help` explains every target. Written for GNU make 3.81 (macOS) and later.
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help lab test bench experiments exercises nbgrader docs readme tiny-model gates clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

$(INSTALLED): settings.ini setup.py pyproject.toml constraints.txt tools/setup.sh
	@sh tools/setup.sh

lab: $(INSTALLED) ## copy the course into workspace/ and open it in JupyterLab (LAB_ARGS=--no-browser on a server)
	@$(BIN)/sftlab lab workspace $(LAB_ARGS)

test: $(INSTALLED) ## run every notebook, the tests and the browser test, two at a time (TEST_ARGS="-k models" for a part)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup $(TEST_ARGS)

bench: $(INSTALLED) ## time our training and data preparation against TRL's, on a quiet machine (SFTLAB_REAL_DATA=… for real files too)
	@HF_HUB_OFFLINE=1 $(BIN)/python -c "from sftlab.study.bench import main; main()"

NAME ?= all
experiments: $(INSTALLED) ## run the long experiments whose code has changed (NAME=… for one of them); goes on where it was stopped
	@$(BIN)/python -c "from sftlab.study.experiments import main; main('$(NAME)')"

exercises: $(INSTALLED) ## make the learners' notebooks and sftlab/study/checks/ from exercises/solutions/
	@$(BIN)/nbdev_clean --fname exercises/solutions
	@$(BIN)/nbdev_export --path exercises/solutions
	@$(BIN)/python -c "from sftlab.study.exercises import make_notebooks; print(*make_notebooks(), sep='\n')"

nbgrader: $(INSTALLED) ## make a course for nbgrader in _nbgrader/ (there: nbgrader generate_assignment 01_generation)
	@$(BIN)/python -c "from sftlab.study.exercises import make_nbgrader; print(*make_nbgrader(), sep='\n')"

docs: $(INSTALLED) ## build the website in _docs/ (needs Quarto)
	@$(BIN)/python tools/docs.py

readme: $(INSTALLED) ## make README.md from nbs/index.ipynb
	@$(BIN)/python tools/readme.py

tiny-model: $(INSTALLED) ## rebuild the tiny model from nothing: text, tokenizer, pretraining, gates (one to two hours on two cores)
	@$(BIN)/python -c "from sftlab.tiny.pretraining import build, gates; build(); gates()"

gates: $(INSTALLED) ## measure whether the tiny model behaves as the lessons need
	@$(BIN)/python -c "from sftlab.tiny.pretraining import gates; gates()"

clean: ## remove what builds and tests leave behind (keeps .venv, workspace/ and runs/)
	rm -rf build dist *.egg-info _proc _docs .pytest_cache .hypothesis
	find . -name .venv -prune -o -name workspace -prune -o -name __pycache__ -prune -exec rm -rf {} +
