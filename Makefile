# Two commands from a fresh clone: `make demo` and `make test`. Both make their own virtual environment in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

$(VENV)/ready: pyproject.toml constraints.txt cli.py CMakeLists.txt $(wildcard csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,dev,docs]'
	touch $@

.PHONY: install demo test check docs sanitize clean
install: $(VENV)/ready

# PCB-merge two fine-tunes of the small model in tests/models, quantize to 4 bits, measure before and after
demo: $(VENV)/ready
	$(BIN)/compress run recipes/demo.yaml -o demo-merged-4bit --overwrite

test: $(VENV)/ready
	$(BIN)/python -m pytest -q

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/mypy

# the site, in build/site; a broken link, or a page that is not in the navigation, fails it
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# the CPU kernels, every one that this machine can run, under ASan and UBSan
sanitize: $(VENV)/ready
	$(BIN)/cmake -S . -B build/sanitize -D MERGEKIT_PLUS_SANITIZE=ON -D MERGEKIT_PLUS_CUDA=OFF
	$(BIN)/cmake --build build/sanitize --target sanitize
	build/sanitize/csrc/cpu/sanitize

clean:
	rm -rf $(VENV) demo-merged-4bit build dist quant/kernels/lib
