"""Runs the command line as `python -m nemo_hf.cli`."""

from nemo_hf_cli import main

raise SystemExit(main())
