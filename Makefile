# Two commands do everything on a fresh machine: `make demo` and `make test`. `make sample PROMPT="..."` only draws, `make serve` does so in a browser. Python 3.11 or newer is all they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(shell date +%Y-%m-%d_%H-%M-%S)
RUN ?= runs/demo/$(STAMP)
PROMPT = a red apple
QUOTED = $(subst ','\'',$(subst ",\",$(value PROMPT)))

.PHONY: sample demo serve test server-test format

# Draw with the weights that come along: 64 candidates, the best 8 kept. Several prompts: PROMPT="a red apple|a blue heart"
sample: $(VENV)/demo.installed
	$(BIN)/python generate.py 'prompt="$(QUOTED)"' out=runs/sample/$(STAMP)

# Train all three on the bundled emoji, draw 64 candidates for each of four prompts, keep the best 8, judge.
demo: $(VENV)/demo.installed
	$(BIN)/python train_vae.py experiment=emoji_demo out=$(RUN)/vae
	$(BIN)/python train_dalle.py experiment=emoji_demo vae=$(RUN)/vae/vae.safetensors out=$(RUN)/dalle
	$(BIN)/python train_clip.py experiment=emoji_demo out=$(RUN)/clip
	$(BIN)/python generate.py experiment=emoji_demo weights=$(RUN)/dalle/dalle.safetensors \
		clip=$(RUN)/clip/clip.safetensors out=$(RUN)/pictures
	$(BIN)/dalle-baselines dalle=$(RUN)/dalle/dalle.safetensors \
		clip=$(RUN)/clip/clip.safetensors ranking=$(RUN)/pictures/ranking.json data.val_split=test_compose
	@echo "open: $(RUN)/pictures/grid.png (ranked samples), $(RUN)/vae/pictures (reconstructions),"
	@echo "      $(RUN)/dalle/pictures, $(RUN)/clip/pictures; curves: $(BIN)/tensorboard --logdir $(RUN)"

# A server of images on http://127.0.0.1:8000, with the weights that come along: open that page and type a prompt.
serve: $(VENV)/serve.installed
	$(BIN)/python serve.py

test: $(VENV)/test.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8 --dist=worksteal

# The server's pages in a browser, its ledger in PostgreSQL, made-up requests: apt-get install chromium chromium-driver postgresql
server-test: $(VENV)/test.installed
	$(BIN)/python -m pytest tests/serving -m "browser or postgresql or fuzz"

format: $(VENV)/test.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/demo.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/serve.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[serve]'
	touch $@ $(VENV)/demo.installed

$(VENV)/test.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/demo.installed $(VENV)/serve.installed
