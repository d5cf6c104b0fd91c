"""Options of the commands of `nemo-hf`, as data."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class DemoCommand:
    """Trains, cuts, saves, reloads and measures on scikit-learn's digits, offline, on a CPU, in three minutes."""

    output_dir: str = field(metadata={"help": "Gets parent/, modules/, report.json and modules.png."})
    seed: int = field(default=0, metadata={"help": "Seed of the split, the models and the training."})
    epochs: int | None = field(default=None, metadata={"help": "Epochs of each of the two trainings."})


@dataclass
class DataOptions:
    """Data to train on or to measure with."""

    dataset: str = field(metadata={"help": "Hub data set or local folder."})
    split: str = field(default="test", metadata={"help": "Split to measure with."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels."})
    input_column: str | None = field(
        default=None, metadata={"help": "Column of the images or texts; found if left out."}
    )
    batch_size: int = field(default=64, metadata={"help": "Samples a batch when measuring."})


@dataclass
class TrainCommand(DataOptions):
    """Trains a parent from a plain model and measures it; takes all TrainingArguments as options too."""

    model: str = field(default="", metadata={"help": "Plain model: Hub repository or directory."})
    nemo_config: str | None = field(default=None, metadata={"help": "NeMoConfig as a JSON file or inline JSON."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})

    command_line = ""  # no option: the words that these options were read from


@dataclass
class ExtractCommand:
    """Cuts a module out of a saved parent and saves it."""

    parent: str = field(metadata={"help": "Parent: directory or Hub repository."})
    labels: list[str] = field(metadata={"help": "Label names, group names or label ids, in the order of the outputs."})
    output_dir: str = field(metadata={"help": "Directory of the module."})
    threshold: float | None = field(default=None, metadata={"help": "Relevance threshold, above 0 up to 1."})
    round_to: int | None = field(default=None, metadata={"help": "Fill widths up to multiples of this, such as 8."})


@dataclass
class ExportCommand:
    """Writes a saved module as a plain model of transformers, or as an ONNX file."""

    module: str = field(metadata={"help": "Module: directory or Hub repository."})
    output_dir: str = field(metadata={"help": "Directory of the export."})
    format: Literal["plain", "onnx"] = field(default="plain", metadata={"help": "Format of the export."})


@dataclass
class EvaluateCommand(DataOptions):
    """Measures modules of a saved parent beside their controls."""

    parent: str = field(default="", metadata={"help": "Parent: directory or Hub repository."})
    labels: list[str] = field(
        default_factory=list, metadata={"help": "Modules to measure, each as labels joined by '+': cat+dog car+ship."}
    )
    threshold: float | None = field(default=None, metadata={"help": "Relevance threshold, above 0 up to 1."})
    round_to: int | None = field(default=None, metadata={"help": "Fill widths up to multiples of this, such as 8."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the reports."})


@dataclass
class PushCommand(DataOptions):
    """Uploads a parent or module with its card; or a parent and modules cut from it, tied in a collection."""

    dataset: str = field(default="", metadata={"help": "Hub data set or local folder to measure the modules with."})
    path: str | None = field(default=None, metadata={"help": "Directory of a saved parent or module to upload."})
    repo_id: str | None = field(default=None, metadata={"help": "With --path: Hub repository, such as me/cat-dog."})
    parent_repo: str | None = field(default=None, metadata={"help": "With --path: repository of a module's parent."})
    parent: str | None = field(default=None, metadata={"help": "Directory of a parent to upload with --modules."})
    modules: list[str] = field(
        default_factory=list, metadata={"help": "Modules of --parent, each as labels joined by '+': cat dog cat+dog."}
    )
    namespace: str | None = field(default=None, metadata={"help": "With --parent: user or organization."})
    name: str | None = field(default=None, metadata={"help": "With --parent: its repository's name."})
    calibration_split: str | None = field(
        default=None, metadata={"help": "Split of validation data that the modules' rejection is calibrated on."}
    )
    license: str | None = field(default=None, metadata={"help": "Identifier of the license, for the cards."})
    datasets: list[str] = field(default_factory=list, metadata={"help": "Hub data sets, for the cards."})
    threshold: float | None = field(default=None, metadata={"help": "Relevance threshold, above 0 up to 1."})
    round_to: int | None = field(default=None, metadata={"help": "Fill widths up to multiples of this, such as 8."})
    compare_formats: bool = field(
        default=False, metadata={"help": "Whether to time modules as plain models and as ONNX too, for the cards."}
    )
    private: bool = field(default=False, metadata={"help": "Whether to create private repositories."})
    dry_run: bool = field(default=False, metadata={"help": "Write the card beside the model and upload nothing."})


@dataclass
class InspectCommand:
    """Prints a model's neuron sites: where masks would attach and how modules would be cut."""

    model: str = field(metadata={"help": "Plain model, parent or module: directory or Hub repository."})
    propose: bool = field(
        default=False, metadata={"help": "Look for sites by trying instead of by name, and print them as options."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether the model's own code may run."})
