"""The command line `nemo-hf`: its commands, their options, and what happens on wrong input."""

import argparse
import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, get_args

from datasets.exceptions import DatasetsError
from transformers import HfArgumentParser, TrainingArguments

from nemo_hf.models.calibrated_cut import VOCABULARIES
from nemo_hf.models.cut_source import Score
from nemo_hf.models.equivalence import EquivalenceError
from nemo_hf.models.privacy import clean_command
from nemo_hf.pruning.budget import Cost

from . import commands
from .demo import EPOCHS


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, or 2 after one line on standard error if the input is wrong."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING)
    parser = build_parser()
    try:
        if empty := [word for word in words if re.fullmatch(r"--[\w-]+=", word)]:
            raise ValueError(f"Got {empty[0]} without a value; expected one. Write it behind the equals sign.")
        options = parser.parse_args([_with_dashes(word) for word in words])
        options.command_line = clean_command(["nemo-hf", *words])
        options.run(options)
    except (ValueError, TypeError, OSError, ImportError, EquivalenceError, DatasetsError) as error:
        print(" ".join(["nemo-hf", *words[:1]]) + ":", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


class _Parser(HfArgumentParser):
    """Wrong usage is a ValueError, as other wrong input is."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. See {self.prog} --help.")


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of all commands; each sets `run` to the function that runs it."""
    text = "Cut small stand-alone modules out of a trained classifier, or train one so that they are smaller still."
    parser = _Parser(prog="nemo-hf", description=text, formatter_class=argparse.HelpFormatter)
    parser.set_defaults(run=lambda options: parser.print_help())
    group = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], None], text: str, **options: Any) -> Callable[..., Any]:
        options = {"formatter_class": argparse.HelpFormatter, "allow_abbrev": False, **options}
        found = group.add_parser(run.__name__, help=text, description=f"{text[0].upper()}{text[1:]}.", **options)
        found.set_defaults(run=run)
        return found.add_argument

    cutting = argparse.ArgumentParser(add_help=False)
    cutting.add_argument("--threshold", type=float, help="relevance from which a neuron is kept, above 0 up to 1")
    cutting.add_argument("--round-to", type=int, metavar="N", help="fill widths up to multiples of N, such as 8")

    add = command(commands.demo, "train, cut and measure on scikit-learn's digits, offline, in two minutes")
    add("--output-dir", required=True, help="gets plain/, parent/, modules/, report.json and modules.png")
    add("--seed", type=int, default=0, help="seed of the split, the models and the training")
    add(
        "--epochs",
        type=_count,
        default=EPOCHS,
        help=f"epochs of the plain model, and half as many with masks ({EPOCHS})",
    )

    add = command(
        commands.train,
        "train a parent from a plain model; takes all TrainingArguments as options too",
        parents=[_data_options(is_required=True, has_batches=False)],
        dataclass_types=TrainingArguments,
        usage="nemo-hf train --model MODEL --dataset DATA --output-dir DIR [options]",
    )
    add("--model", required=True, help="plain model: Hub repository or directory")
    add("--nemo-config", metavar="JSON", help="NeMoConfig as a JSON file or inline JSON")
    add("--train-split", default="train", help="split to train on")

    add = command(
        commands.cut,
        "cut modules out of a plain model or a parent on calibration samples, without training",
        parents=[_data_options(is_required=False, has_batches=False, split="train", label_column=None), cutting],
        usage="nemo-hf cut MODEL --labels LABEL ... --dataset DATA [--retention SHARE ... | --max-loss POINTS] "
        "--output-dir DIR [options]\n"
        "       nemo-hf cut PARENT --labels LABEL ... [--threshold T] [--round-to N] --output-dir DIR",
    )
    _cut_options(add)

    add = command(commands.export, "write a module as a plain model of transformers, or as ONNX")
    add("--module", required=True, help="module: directory or Hub repository")
    add("--output-dir", required=True, help="directory of the export")
    add("--format", choices=["plain", "onnx"], default="plain", help="format of the export (default: plain)")

    inputs = [_data_options(is_required=True), cutting]
    add = command(commands.evaluate, "measure modules beside their parent and controls", parents=inputs)
    add("--parent", required=True, help="parent, or plain model of --modules: directory or Hub repository")
    add("--labels", nargs="+", help="modules to cut by relevance, each as labels joined by '+': cat+dog car")
    add("--modules", nargs="+", metavar="DIR", help="saved modules in place of --labels: directories or repositories")
    add("--metrics", nargs="+", metavar="NAME", help="metrics of the library evaluate, or paths of metric scripts")
    add("--output", metavar="FILE", help="JSON file for the reports")

    add = command(
        commands.push,
        "upload a parent or module with its card, or a parent with modules of it",
        parents=[_data_options(is_required=False), cutting],
        usage="nemo-hf push DIR --repo-id ME/NAME [options]\n"
        "       nemo-hf push --parent DIR --namespace ME --modules LABELS ... [options]",
    )
    add("path", nargs="?", metavar="DIR", help="saved parent or module to upload by itself")
    add("--repo-id", help="with DIR: Hub repository, such as me/cat-dog")
    add("--parent-repo", help="with DIR: repository of the module's parent, for the card")
    add("--dry-run", action="store_true", help="with DIR: write the card beside the model and upload nothing")
    add("--parent", metavar="DIR", help="saved parent to upload with --modules")
    add("--namespace", help="with --parent: user or organization")
    add("--name", help="with --parent: name of its repository")
    add("--modules", nargs="+", default=[], help="with --parent: modules, each as labels joined by '+': cat cat+dog")
    add("--calibration-split", help="with --dataset: split of validation data to calibrate the modules' rejection on")
    add("--compare-formats", action="store_true", help="with --dataset: time modules as plain models and ONNX too")
    add("--license", help="identifier of the license, for the cards")
    add("--datasets", nargs="+", default=[], help="Hub data sets, for the cards")
    add("--private", action="store_true", help="create private repositories")

    add = command(commands.inspect, "print a model's neuron sites and how modules of it would be cut")
    add("model", metavar="MODEL", help="plain model, parent or module: directory or Hub repository")
    add("--propose", action="store_true", help="find sites by experiment and not by name, and print them as options")
    add("--trust-remote-code", action="store_true", help="let the model's own code run")
    return parser


def _cut_options(add: Callable[..., Any]) -> None:
    """Adds the options of `cut`, which are those of `nemo_hf.extract_module`."""
    add("model", metavar="MODEL", help="plain model or parent: directory or Hub repository")
    add("--labels", required=True, nargs="+", help="label names, group names or label ids, in the order of the outputs")
    add("--output-dir", required=True, help="directory of the module; of several, each in a folder named as its share")
    add("--retention", nargs="+", type=float, metavar="SHARE", help="share of the weights to keep (default: 0.2)")
    add("--max-loss", type=float, metavar="POINTS", help="find the smallest module that loses at most so many points")
    add(
        "--validation-split",
        help="split to measure the module or its loss, and to calibrate rejection on",
    )
    add("--samples", type=_count, metavar="N", help="most samples of the module's labels (default: 1000)")
    add("--scores", choices=get_args(Score), help="how neurons are scored (default: activity)")
    add("--cost", choices=get_args(Cost), help="what the retention counts (default: weights)")
    add("--no-reconstruct", action="store_true", help="leave the layers as they are after the cut")
    add("--refine-epochs", type=_count, metavar="N", help="train the module towards the model's answers")
    add("--vocabulary", choices=VOCABULARIES, help="texts: which tokens have embeddings of their own")
    add("--max-positions", type=_count, metavar="N", help="texts: tokens of the longest text to come")
    add("--trust-remote-code", action="store_true", help="let the model's own code run")


def _data_options(
    is_required: bool, has_batches: bool = True, split: str = "test", label_column: str | None = "label"
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--dataset", required=is_required, help="Hub data set or local folder")
    use = "measure with" if split == "test" else "take samples from"
    parser.add_argument("--split", default=split, help=f"split to {use} (default: {split})")
    named = "label" if label_column else "label, if there is one"
    parser.add_argument("--label-column", default=label_column, help=f"column of the labels (default: {named})")
    parser.add_argument("--input-column", help="column of the samples; found if left out")
    if has_batches:
        parser.add_argument("--batch-size", type=_count, default=64, help="samples per batch (default: 64)")
    return parser


def _count(word: str) -> int:
    """A number of 1 or more, as an option says it."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"Got {word!r}; expected a number of 1 or more")
    return int(word)


def _with_dashes(word: str) -> str:
    """Lets options be written with underscores too: `--round_to`."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word
