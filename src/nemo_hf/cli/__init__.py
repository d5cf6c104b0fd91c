"""What the commands of `nemo-hf` do."""

from nemo_hf_cli import main

__all__ = ["main"]
