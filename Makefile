# Two commands on a fresh machine with python3 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: install demo test docs pictures oldest sweep format bench training engines gpu zoo foreign study clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

demo: install  ## the report of a sparse ResNet-50, then sparse training on real data
	$(BIN)/sparsify resnet50 --density 0.1 --distribution erk --input 1x3x224x224
	$(BIN)/python examples/digits.py --quick

test: install  ## the whole gate
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -n 2
	$(BIN)/python tests/check_wheel.py

docs: install  ## the site, build/site/index.html
	$(BIN)/python docs/build_site.py

pictures: install  ## those that the tutorials show, of what they write
	$(BIN)/python docs/take_pictures.py

oldest: install  ## the oldest torch that the package claims to work with: the wheel in an empty environment, then the suite
	$(BIN)/python tests/check_wheel.py --torch 2.6.0
	$(PYTHON) -m venv build/oldest
	build/oldest/bin/python -m pip install --quiet --disable-pip-version-check torch==2.6.0 torchvision==0.21.0 --editable '.[test]'
	build/oldest/bin/python -m pytest -n 2

sweep: install  ## every combination and every model that the gate samples, in about half an hour
	$(BIN)/python -m pytest -n 2 -m sweep tests

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## ratios side by side; other libraries run in an environment of their own
	$(BIN)/python benchmarks/run.py

training: install  ## training steps with kept weights only against dense ones: a section of benchmarks/RESULTS.md
	$(BIN)/python benchmarks/training.py --write

engines: install  ## lowered models against other engines, in an hour: a section of benchmarks/RESULTS.md
	$(BIN)/python benchmarks/engines.py --write

gpu:  ## checks and measures on a GPU, with the torch that is installed: benchmarks/RESULTS-GPU.md
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py

zoo: install  ## the table of every torchvision model, benchmarks/ZOO.md
	$(BIN)/python benchmarks/zoo.py --write

foreign: install  ## other people's models, from packages in an environment of their own: benchmarks/FOREIGN.md
	$(BIN)/python benchmarks/foreign.py --write

study: install  ## every method on real small data, within 90 minutes on 2 cores: examples/STUDY.md
	$(BIN)/python examples/study.py

clean:
	rm -rf $(VENV) build dist
