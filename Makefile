# For those who have make; everything works without: see examples/demo.sh and tests/run.sh.
STEPS := format lint types floors unit live kernel scenarios virtual new-12 new-13 readme kills scenarios-13 mixed all-13 all-sid post-quantum

.PHONY: help demo test setup fix clean $(STEPS)

help:
	@echo "make demo    watch a live tunnel move between two gateways (root)"
	@echo "make test    everything, as CI runs it (root)"
	@echo "make setup   packages and .venv only"
	@echo "make fix     format, and repair what the linter can"
	@echo "make STEP    one of: $(STEPS)"

demo:
	examples/demo.sh

test:
	tests/run.sh

setup:
	tests/setup.sh

$(STEPS):
	tests/run.sh $@

fix:
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean:
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
