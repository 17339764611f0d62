"""The command line and the agent: the only house that knows the others."""

__version__ = "0.1.0"
