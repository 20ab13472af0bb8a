# Each target does its own set-up: a virtual environment in .venv with the locked packages.
PYTHON ?= python3
BIN := .venv/bin
CORES ?= 2
# Stand-ins are for a CPU: on a GPU, several of their jobs at once, other numbers than README's come out.
export CUDA_VISIBLE_DEVICES :=
SNAKEMAKE := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/snakemake --cores $(CORES)

.PHONY: demo page report unit test coverage check trust bench clean
.DEFAULT_GOAL := demo

# The main job, on the built-in stand-in; ends with the score table.
demo: .venv/installed
	$(SNAKEMAKE) submissions/tiny.zip results/tiny/leaderboard.md
	@cat results/tiny/leaderboard.md

# The same on one page, with the rows to look at; and below with layers, peers and claims: some three hours on two cores.
page: .venv/installed
	$(SNAKEMAKE) results/tiny/report.html --config full_report=False
	@echo "made results/tiny/report.html: open it in a browser"

report: .venv/installed
	$(SNAKEMAKE) results/tiny/report.html
	@echo "made results/tiny/report.html: open it in a browser"

# Everything that needs no run of the workflow: two to three minutes.
unit: .venv/installed
	$(BIN)/python -m pytest -m "not slow"

# Which lines and branches the fast tests reach; fails under 90 %.
coverage: .venv/installed
	$(BIN)/coverage run -m pytest -m "not slow"
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

test: check
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n $(CORES) --dist loadfile

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile

# Kills, full disks, same bytes, edits, fuzzing; an hour, the mounts need root.
trust: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.trust

# Our engines beside plain references, on what has been made of tiny, lume and 135m. Needs a quiet machine and half an hour.
bench: .venv/installed
	$(SNAKEMAKE) submissions/tiny.zip
	$(BIN)/python -m bench --output bench/results.jsonl

# What the workflow made; not the virtual environment.
clean:
	rm -rf data/raw data/split models results submissions/*.zip submissions/*.cost.json .snakemake

.venv/installed: requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.lock
	touch $@
