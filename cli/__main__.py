"""`python -m ikectx_cli`: the same as `ikectx`."""

from .main import main

main()
