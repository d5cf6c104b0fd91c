"""Runs the command line as `python -m nemo_hf.cli`."""

from .main import main

raise SystemExit(main())
