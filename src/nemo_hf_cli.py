"""The command line `nemo-hf`: its commands, their options, and what happens on wrong input.

It stands beside the package, whose import takes seconds, and imports it once the options are read.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

COSTS = ("weights", "operations")
SCORES = ("activity", "fisher", "magnitude", "relevance")
VOCABULARIES = ("shared", "calibration")
FORMATS, WIDTHS = ("plain", "onnx", "openvino"), ("int8", "int4")
STARTING_VALUES = {
    "text-classification": {"num_train_epochs": 8, "per_device_train_batch_size": 32},
    "image-classification": {"num_train_epochs": 8, "per_device_train_batch_size": 64},
}
"""What `train` takes for arguments of training that are not given, by the task."""
EVALUATION_BATCH = 128  # samples; likewise, for evaluation and relevance
SMALL, LEARNING_RATES = 50_000_000, (5e-4, 5e-5)  # likewise: up to so many parameters, and above
TRAINING_NOTE = """
All TrainingArguments of transformers are options as well; --help-all lists them. Those that are not given start from
{texts[num_train_epochs]} epochs in batches of {texts[per_device_train_batch_size]} texts, or
{images[num_train_epochs]} epochs in batches of {images[per_device_train_batch_size]} images, and a learning rate of
{rates[0]:g} for models of up to {small:.0f} million parameters, {rates[1]:g} for larger ones. Evaluation and relevance
take batches of {evaluation} (--per-device-eval-batch-size). With --max-steps for less than an epoch, a dry run, they
are limited to a few samples of each label.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, or 2 after one line on standard error if the input is wrong."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    try:
        if empty := [word for word in words if re.fullmatch(r"--[\w-]+=", word)]:
            raise ValueError(f"Got {empty[0]} without a value; expected one. Write it behind the equals sign.")
        options = parse(parser, words)
        if options.command is None:
            parser.print_help()
        else:
            from nemo_hf.cli.dispatch import run  # here, since it takes seconds that --help and mistakes need not wait

            run(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(" ".join(["nemo-hf", *words[:1]]) + ":", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Reads the options of a command; of `train` those that are not its own, `TrainingArguments`, stay as words."""
    options, others = parser.parse_known_args([_with_dashes(word) for word in words])
    if options.command == "train":
        options.training_words = others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    options.words = list(words)
    return options


class _Parser(argparse.ArgumentParser):
    """Wrong usage is a ValueError, as other wrong input is."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. See {self.prog} --help.")


class _HelpAll(argparse.Action):
    """Prints the help of `TrainingArguments` and behind it that of the command."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from nemo_hf.cli.training import training_parser

        print("TrainingArguments of transformers:\n")
        training_parser().print_help()
        print(f"\nOptions of {parser.prog}:\n")
        parser.print_help()
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of all commands."""
    text = "Cut small stand-alone modules out of a trained classifier, or train one so that they are smaller still."
    parser = _Parser(prog="nemo-hf", description=text)
    group = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")

    def command(name: str, text: str, **options: Any) -> Callable[..., Any]:
        options = {"allow_abbrev": False, "description": f"{text[0].upper()}{text[1:]}.", **options}
        return group.add_parser(name, help=text, **options).add_argument

    cutting = argparse.ArgumentParser(add_help=False)
    cutting.add_argument("--threshold", type=float, help="relevance from which a neuron is kept, above 0 up to 1")
    cutting.add_argument("--round-to", type=int, metavar="N", help="fill widths up to multiples of N, such as 8")
    on_samples = argparse.ArgumentParser(add_help=False)
    text = "split of DATA whose samples modules are cut on (default, for parents that trained no modules: train)"
    on_samples.add_argument("--cut-split", metavar="SPLIT", help=text)
    text = "share of the weights that modules cut on samples keep (default: 0.2)"
    on_samples.add_argument("--retention", type=float, metavar="SHARE", help=text)

    add = command("demo", "train, cut and measure on scikit-learn's digits, offline, in two minutes")
    add("--output-dir", required=True, help="gets plain/, parent/, modules/, report.json, modules.png and report.html")
    add("--seed", type=int, default=0, help="seed of the split, the models and the training")
    add("--epochs", type=_count, default=40, help="epochs of the plain model, half as many with masks (default: 40)")

    texts, images = STARTING_VALUES["text-classification"], STARTING_VALUES["image-classification"]
    values = {"rates": LEARNING_RATES, "small": SMALL / 1e6, "evaluation": EVALUATION_BATCH}
    add = command(
        "train",
        "train a parent from a plain model, of labels or label groups",
        parents=[_data_options(is_required=True, batch_size=None)],
        usage="nemo-hf train --model MODEL --dataset DATA --output-dir DIR [options]",
        epilog=TRAINING_NOTE.format(texts=texts, images=images, **values),
    )
    _train_options(add)

    samples = _data_options(is_required=False, batch_size=None, has_length=False, split="train", label_column=None)
    add = command(
        "cut",
        "cut modules out of a plain model or a parent on calibration samples, without training",
        parents=[samples, cutting],
        usage="nemo-hf cut MODEL --labels LABEL ... --dataset DATA [--retention SHARE ... | --max-loss POINTS] "
        "--output-dir DIR [options]\n"
        "       nemo-hf cut PARENT --labels LABEL ... [--threshold T] [--round-to N] --output-dir DIR",
    )
    _cut_options(add)

    add = command(
        "export",
        "write a module as a plain model of transformers, as ONNX, or for OpenVINO",
        parents=[samples],
        usage="nemo-hf export --module MODULE --output-dir DIR [--format FORMAT [--quantize WIDTH] [--dataset DATA]]",
    )
    add("--module", required=True, help="module: directory or Hub repository")
    add("--output-dir", required=True, help="directory of the export")
    add("--format", choices=FORMATS, default="plain", help="format of the export (default: plain)")
    add("--quantize", choices=WIDTHS, help="ONNX and OpenVINO: bits of the weights (default: float32)")
    text = "with --dataset: share of the samples whose answer must be the module's (default: 0.98)"
    add("--min-agreement", type=float, metavar="SHARE", help=text)

    inputs = [_data_options(is_required=True), cutting, on_samples]
    add = command("evaluate", "measure modules beside their parent and controls", parents=inputs)
    add("--parent", required=True, help="parent, or plain model of --modules: directory or Hub repository")
    add("--labels", nargs="+", help="modules to cut, each as labels joined by '+': cat+dog car")
    add("--modules", nargs="+", metavar="DIR", help="saved modules in place of --labels: directories or repositories")
    add("--metrics", nargs="+", metavar="NAME", help="metrics of the library evaluate, or paths of metric scripts")
    add("--output", metavar="FILE", help="JSON file for the reports")
    add("--quick", action="store_true", help="at most 1000 samples, no controls, and times for single samples alone")

    add = command(
        "push",
        "upload a parent or module with its card, or a parent with modules of it",
        parents=[_data_options(is_required=False), cutting, on_samples],
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
    text = "add a page: FILE that nemo-hf report wrote, or without FILE one of what is known"
    add("--report-page", nargs="?", const="", metavar="FILE", help=text)
    add("--private", action="store_true", help="create private repositories")

    add = command(
        "report",
        "write one page about a model: neurons, accuracy, latency, and a choice of labels to cut",
        parents=[_data_options(is_required=False, label_column=None)],
        usage="nemo-hf report MODEL --output report.html [--dataset DATA [--labels LABEL ...] [options]]\n"
        "       nemo-hf report MODULE --output report.html [--parent SOURCE] [--dataset DATA [options]]",
    )
    add("model", metavar="MODEL", help="parent, module or plain model: directory or Hub repository")
    add("--output", required=True, metavar="FILE", help="HTML file of the page")
    add("--parent", metavar="SOURCE", help="of a module: the parent or plain model that it was cut from")
    add("--labels", nargs="+", help="with --dataset: labels or groups of the modules that are cut and measured")
    text = "with --dataset: shares of the weights that these modules keep (default: 0.4 0.2 0.1)"
    add("--retention", nargs="+", type=float, metavar="SHARE", help=text)
    add("--calibration-split", help="with --dataset: split whose samples modules are cut on (default: train)")
    add("--samples", type=_count, metavar="N", help="with --dataset: most samples to measure on (default: 2000)")
    add("--trust-remote-code", action="store_true", help="let the model's own code run")

    add = command("inspect", "print a model's neuron sites and how modules of it would be cut")
    add("model", metavar="MODEL", help="plain model, parent or module: directory or Hub repository")
    add("--propose", action="store_true", help="find sites by experiment and not by name, and print them as options")
    add("--trust-remote-code", action="store_true", help="let the model's own code run")
    return parser


def _train_options(add: Callable[..., Any]) -> None:
    """Adds the options of `train` that are not training arguments."""
    add("--model", required=True, help="plain model: Hub repository or directory")
    add("--output-dir", required=True, help="directory of the parent")
    add("--group-column", metavar="NAME", help="column of the label group of each sample, such as an intent's domain")
    text = "label groups, each as NAME=LABEL+LABEL (without any: each label by itself): pets=cat+dog boats=ship"
    add("--label-groups", nargs="+", metavar="GROUP", help=text)
    add("--nemo-config", metavar="JSON", help="options of NeMoConfig, as a JSON file or inline JSON")
    add("--train-split", default="train", help="split to train on")
    add("--baseline", action="store_true", help="train the plain model alike too, and show it beside the parent")
    text = "samples, spread over the labels, to {} (default: all, or 2 of each label in a dry run)"
    add("--max-relevance-samples", type=_count, metavar="N", help=text.format("count the relevance on"))
    add("--max-eval-samples", type=_count, metavar="N", help=text.format("evaluate on"))
    add("--help-all", action=_HelpAll, nargs=0, dest=argparse.SUPPRESS, help="show the TrainingArguments too, and exit")


def _cut_options(add: Callable[..., Any]) -> None:
    """Adds the options of `cut`, which are those of `nemo_hf.extract_module`."""
    add("model", metavar="MODEL", help="plain model or parent: directory or Hub repository")
    text = "label names, group names or label ids, in the order of the outputs: cat dog, or cat+dog"
    add("--labels", required=True, nargs="+", help=text)
    add("--output-dir", required=True, help="directory of the module; of several, each in a folder named as its share")
    add("--retention", nargs="+", type=float, metavar="SHARE", help="share of the weights to keep (default: 0.2)")
    add("--max-loss", type=float, metavar="POINTS", help="find the smallest module that loses at most so many points")
    add(
        "--validation-split",
        help="split to measure the module or its loss, and to calibrate rejection on",
    )
    add("--samples", type=_count, metavar="N", help="most samples of the module's labels (default: 1000)")
    add("--scores", choices=SCORES, help="how neurons are scored (default: activity)")
    add("--cost", choices=COSTS, help="what the retention counts (default: weights)")
    text = "whole attention and feed-forward parts to drop, or 'auto' for as many as bring the module nearest"
    add("--drop-parts", type=_parts, metavar="N", help=text)
    add("--stream", type=float, metavar="SHARE", help="share of the residual stream's width to keep (ViT, Llama)")
    add("--no-reconstruct", action="store_true", help="leave the layers as they are after the cut")
    add("--refine-epochs", type=_count, metavar="N", help="train the module towards the model's answers")
    add("--vocabulary", choices=VOCABULARIES, help="texts: which tokens have embeddings of their own")
    add("--max-positions", type=_count, metavar="N", help="texts: tokens of the longest text to come")
    add("--trust-remote-code", action="store_true", help="let the model's own code run")


def _data_options(
    is_required: bool,
    batch_size: int | None = 64,
    has_length: bool = True,
    split: str = "test",
    label_column: str | None = "label",
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--dataset", required=is_required, help="Hub data set or local folder")
    use = "measure with" if split == "test" else "take samples from"
    parser.add_argument("--split", default=split, help=f"split to {use} (default: {split})")
    named = "label" if label_column else "label, if there is one"
    parser.add_argument("--label-column", default=label_column, help=f"column of the labels (default: {named})")
    parser.add_argument("--input-column", help="column of the samples; found if left out")
    if has_length:
        text = "texts: tokens of the longest; longer ones are truncated, also by the tokenizer that is saved"
        parser.add_argument("--max-length", type=_count, metavar="N", help=text)
    if batch_size:
        text = f"samples per batch (default: {batch_size})"
        parser.add_argument("--batch-size", type=_count, default=batch_size, help=text)
    return parser


def _count(word: str) -> int:
    """A number of 1 or more, as an option says it."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"Got {word!r}; expected a number of 1 or more")
    return int(word)


def _parts(word: str) -> int | str:
    """A number of parts or `auto`, as an option says it."""
    return word if word == "auto" else _count(word)


def _with_dashes(word: str) -> str:
    """Lets options be written with underscores too: `--round_to`."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word
