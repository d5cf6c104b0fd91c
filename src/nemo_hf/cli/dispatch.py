"""Runs a command whose options are read."""

import logging
from argparse import Namespace

from datasets.exceptions import DatasetsError

from nemo_hf.models.equivalence import EquivalenceError
from nemo_hf.models.privacy import clean_command

from .commands import cut, demo, evaluate, export, inspect, push
from .report import report
from .training import train

COMMANDS = {command.__name__: command for command in (demo, train, cut, export, evaluate, push, report, inspect)}


def run(options: Namespace) -> None:
    """Runs a command; what goes wrong with its input is a ValueError, TypeError, OSError or ImportError."""
    logging.basicConfig(level=logging.WARNING)
    options.command_line = clean_command(["nemo-hf", *options.words])
    try:
        COMMANDS[options.command](options)
    except (EquivalenceError, DatasetsError) as error:
        raise ValueError(str(error)) from error
