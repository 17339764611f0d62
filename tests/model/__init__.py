"""A model of one transfer for the model checker spin: `python -m tests.model`."""
