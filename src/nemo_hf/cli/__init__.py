"""The command line `nemo-hf`."""

from .main import main

__all__ = ["main"]
