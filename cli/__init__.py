"""The command line and the agent: the only package that imports all others."""

__version__ = "0.1.0"
