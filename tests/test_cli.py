"""The command line: its options, what it writes, and what it says on wrong input."""

import argparse
import json
import re
import runpy
from pathlib import Path

import datasets
import pytest
import torch
from conftest import LABELS, fresh, image_processor
from hub_server import hub as hub
from stage import stage as stage
from stage import template as template
from test_evaluation import METRIC
from transformers import AutoModelForImageClassification, pipeline

import nemo_hf
from nemo_hf.cli import commands, main
from nemo_hf.cli.data import load_data, load_samples
from nemo_hf.cli.dispatch import COMMANDS
from nemo_hf.cli.models import labels_of
from nemo_hf.models.rejection import REJECTED_LABEL
from nemo_hf_cli import build_parser, parse

pytestmark = pytest.mark.usefixtures("stage")
BERT = "google-bert/bert-base-uncased"
CUT = "cut parent --labels cat --output-dir m"
ON_SAMPLES = "cut google/vit-base-patch16-224-in21k --dataset org/animals --labels cat --output-dir m"
MEASURE = "evaluate --parent parent --labels cat --dataset org/animals"
TRAIN = f"train --model {BERT} --dataset org/texts --output-dir out --max-steps 2 --use_cpu"
TRAIN += " --label-column intent --input-column text --split test --train-split train --report-to none"
TRAIN += ' --disable-tqdm true --nemo-config {"group_column":"domain"}'


def test_every_command_has_help_for_every_option_and_it_runs_as_a_module(capsys, monkeypatch):
    assert main([]) == 0
    for words in (["--help"], *([command, "--help"] for command in COMMANDS)):
        with pytest.raises(SystemExit, match="0"):
            main(words)
        assert capsys.readouterr().out.count("usage: nemo-hf") == 1 + (words == ["--help"])
    monkeypatch.setattr("sys.argv", ["nemo-hf", "extract"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("nemo_hf.cli", run_name="__main__")
    assert "nemo-hf extract: argument COMMAND: invalid choice: 'extract'" in capsys.readouterr().err
    (group,) = build_parser()._subparsers._group_actions
    assert tuple(group.choices) == tuple(COMMANDS)
    for parser in group.choices.values():
        assert [action.dest for action in parser._actions if not action.help] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("cut parent --output-dir m", "the following arguments are required: --labels"),
        ("cut parent --labels eleven --output-dir m", "unknown label 'eleven'"),
        ("cut parent --labels cat --output-dir m --threshold 2", "threshold"),
        ("cut parent --labels cat --output-dir m --round-to x", "invalid int value: 'x'"),
        ("cut org/nothing --labels cat --output-dir m", "connect"),
        ("cut google/vit-base-patch16-224-in21k --labels cat --output-dir m", "of model type 'vit'"),
        ("export --module cat-dog --output-dir m --format tflite", "invalid choice: 'tflite'"),
        ("export --module cat-dog --output-dir m --format onnx", "nemo-hf[onnx]"),
        ("evaluate --parent parent --labels cat --dataset org/animals --split dev", "Got the split 'dev'"),
        ("evaluate --parent cat-dog --labels cat --dataset org/animals", "Got a module; expected a parent"),
        (TRAIN.replace('"domain"', "domain"), "which is no JSON (Expecting value"),
        ("cut parent --labels ² --output-dir m", "unknown label '²'"),
        ("cut parent --labels cat --output-dir m --round-to 99999999999", "Got round_to=99999999999"),
        ("cut parent --labels cat --output-dir=", "Got --output-dir= without a value"),
        ("cut parent --labels cat --output-dir x/../parent", "expected two places"),
        ("export --module cat-dog --output-dir cat-dog", "expected two places"),
        ("export --module cat-dog --output-dir m --quantize int8", "Got quantize for a plain model, which is exact"),
        ("export --module cat-dog --output-dir m --format openvino --quantize int4", "expected 'int8', or None"),
        (f"{MEASURE} --output cat-dog/config.json/x", "cat-dog/config.json"),
        ("push cat-dog --repo-id a/b/c --dry-run", "Got 'a/b/c'; expected the name of a Hub repository"),
        ("push cat-dog --repo-id me/m --parent-repo ../x --dry-run", "Got '../x'; expected the name"),
        ("inspect", "the following arguments are required: MODEL"),
        ("inspect parent --prop", "unrecognized arguments: --prop"),
        ("train --dataset org/texts --model m --output-dir m --hub-tok secret", "unrecognized arguments"),
        ("push --parent parent --modules cat", "expected one of the two"),
        ("push cat-dog --repo-id me/m --threshold 0", "Got --repo-id --threshold DIR; expected one of"),
        ("push --parent parent --namespace me --dry-run", "expected one of the two"),
        ("push --parent parent --namespace me --modules cat --compare-formats", "Got no --dataset"),
        ("cut ./nothing --labels cat --output-dir m", "Got './nothing', which is no directory and no name"),
        ("cut parent/config.json --labels cat --output-dir m", "parent/config.json', which is no directory"),
        (
            "cut nothing --labels cat --output-dir m",
            "Got 'nothing', which is no directory here and can't be read",
        ),
        (f"{CUT} --drop-parts auto --stream 0.5", "Got --drop-parts --stream without --dataset"),
        (f"{CUT} --drop-parts all", "argument --drop-parts: Got 'all'; expected a number"),
        (f"{CUT} --retention 0.2 --vocabulary shared", "Got --retention --vocabulary without --dataset"),
        (f"{ON_SAMPLES} --threshold 0.5", "Got --threshold with --dataset"),
        (f"{ON_SAMPLES} --retention 0.2 --max-loss 1", "Got retention=0.2 and max_loss=1.0; expected one of them"),
        (f"{ON_SAMPLES} --retention 0.2 1.5", "Got retention=1.5"),
        (f"{ON_SAMPLES} --scores size", "invalid choice: 'size'"),
        (f"{ON_SAMPLES} --split dev", "Got the split 'dev'"),
        (f"{ON_SAMPLES} --label-column intent", "Got no column 'intent'"),
        (f"{ON_SAMPLES} --dataset org/texts", "Got the columns [] of images; expected one"),
        (f"{ON_SAMPLES} --labels cot", "Got the unknown label 'cot'"),
        (f"{CUT} --labels cat cat", "Got the labels ['cat'] more than once"),
        (f"{CUT} --labels 9", "Got the label id 9; expected 0 to 4"),
        (f"{CUT} --threshold nan", "Got threshold=nan"),
        (f"{CUT} --round-to -8", "Got round_to=-8"),
        (f"{CUT} --output-dir parent/config.json", "which is a file; expected a directory"),
        ("inspect nothing/at/all", "Got 'nothing/at/all', which is no directory and no name"),
        (f"{MEASURE} --labels cat+none", "Got the unknown label 'none'"),
        (f"evaluate --parent {BERT} --labels cat --dataset org/texts", "name them with --modules"),
        (f"{MEASURE} --labels cat+dgo", "Did you mean 'dog'?"),
        (f"{CUT} --labels dog+cta", "Did you mean 'cat'?"),
        (f"{ON_SAMPLES} --labels Catt", "Did you mean 'cat'?"),
        ("push --parent parent --namespace me --modules shipp", "Did you mean 'ship'?"),
        (f"{CUT} --labels cat+dog ship", "Join all of them, as in cat+dog+ship"),
        (f"{MEASURE} --batch-size 0", "Got '0'; expected a number of 1 or more"),
        (f"{MEASURE} --output parent", "Got --output parent, which is a directory; expected a file"),
        (f"{MEASURE} --dataset org/texts --label-column intent", "expected data of the same kind"),
        (f"{MEASURE} --label-column image --input-column image", "Got labels of type"),
        ("demo --output-dir m --epochs 0", "Got '0'; expected a number of 1 or more"),
        (f"{TRAIN} --model ./nothing", "Got './nothing', which is no directory and no name"),
        (TRAIN.replace('{"group_column":"domain"}', "parent/model.safetensors"), "is no JSON ('utf-8' codec can't"),
        (TRAIN.replace('{"group_column":"domain"}', "nothing.json"), "No such file or directory: 'nothing.json'"),
        (TRAIN.replace('"domain"', '"none"'), "Got no column 'none'"),
        *(
            (TRAIN.replace("group_column", name).replace('"domain"', value), message)
            for name, value, message in [
                ("retention_target", "0", "Got retention_target=0; expected a number in (0, 1]"),
                ("retention_target", "1.5", "Got retention_target=1.5; expected a number in (0, 1]"),
                ("retention_target", '"much"', "Got retention_target='much'; expected a number"),
                ("retention", "0.5", "Got unknown options ['retention']; expected some of"),
                ("label_groups", '{"pets":["none"]}', "Got the unknown label 'none'"),
            ]
        ),
    ],
)
def test_wrong_input_ends_in_one_line_and_status_2(words, message, capsys, stage, monkeypatch):
    monkeypatch.setattr("nemo_hf.export.tracing.find_spec", lambda name: None)
    assert main(words.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [message in line for line in lines] == [True]
    assert lines[0].startswith(f"nemo-hf {words.split()[0]}: ")
    assert not (stage / "m").exists()


class Recorded(argparse.Namespace):
    """Options that remember which of them were read."""

    def __getattribute__(self, name):
        if not name.startswith("_"):
            self.__dict__["_read"].add(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize(
    "lines",
    [
        "demo --output-dir demo",
        TRAIN,
        "cut parent --labels cat --output-dir m\n"
        "cut google/vit-base-patch16-224-in21k --labels cat --dataset org/animals --output-dir m",
        "export --module cat-dog --output-dir m\n"
        "export --module cat-dog --output-dir n --format onnx --quantize int8 --dataset org/animals --min-agreement 0",
        "evaluate --parent parent --labels cat --dataset org/animals",
        "push cat-dog --repo-id me/m --dry-run\n"
        "push --parent parent --namespace me --modules cat --dataset org/animals --calibration-split validation",
        "report google/vit-base-patch16-224-in21k --output r.html --dataset org/animals --retention 0.5",
        "inspect google/vit-base-patch16-224-in21k",
    ],
    ids=COMMANDS,
)
def test_no_option_is_ignored(lines, hub, monkeypatch):
    monkeypatch.setattr(commands, "run_demo", lambda *args, **kwargs: None)
    monkeypatch.setattr(commands, "format_demo", str)
    read, known = set(), set()
    for line in lines.splitlines():
        found = vars(parse(build_parser(), line.split())) | {"command_line": line}
        known |= set(found) - {"command", "command_line", "words"}
        COMMANDS[found["command"]](Recorded(**found, _read=read))
    assert known - read == set()


def test_names_of_labels_come_before_ids(stage, capsys):
    words = "cut parent --labels 1 0 --output-dir by-id --threshold=0.9 --round_to 16"
    assert main(words.split()) == 0
    assert "['dog', 'cat']" in capsys.readouterr().out
    config = json.loads((stage / "by-id" / "config.json").read_text())
    assert (config["relevance_threshold"], config["round_to"]) == (0.9, 16)
    assert {site["widths"].get("intermediate", 0) % 16 for site in config["sites"]} == {0}
    assert main(["cut", "parent", "--labels", "1", "0", "--output-dir", "odd", "--threshold", "0.9"]) == 0
    odd = json.loads((stage / "odd" / "config.json").read_text())["sites"]
    assert {site["widths"].get("intermediate", 0) % 16 for site in odd} != {0}
    config = json.loads((stage / "parent" / "config.json").read_text())
    config |= {"id2label": {str(i): str(i + 1) for i in range(5)}, "label2id": {str(i + 1): i for i in range(5)}}
    (stage / "parent" / "config.json").write_text(json.dumps(config))
    assert main(["cut", "parent", "--labels", "1", "2", "--output-dir", "by-name"]) == 0
    assert "['1', '2']" in capsys.readouterr().out


@pytest.mark.parametrize("more", ["--threshold 0.9", "--dataset org/animals --split train"])
def test_labels_that_are_joined_are_those_of_one_module(more, stage):
    configs = []
    for index, labels in enumerate(["dog cat", "dog+cat", "1+cat"]):
        assert main(f"cut parent --labels {labels} --output-dir m{index} {more}".split()) == 0
        configs.append(json.loads((stage / f"m{index}" / "config.json").read_text()))
    assert [config["label_ids"] for config in configs] == [[1, 0]] * 3
    assert configs[0]["sites"] == configs[1]["sites"] == configs[2]["sites"]
    assert labels_of("c++", {"c++", "c"}) == ["c++"]


def test_modules_of_a_parent_that_trained_none_are_cut_on_samples(stage, hub, capsys):
    parent = nemo_hf.make_parent(fresh("vit"), nemo_hf.NeMoConfig())
    parent.attach_processor(image_processor())
    parent.save_pretrained("assigned")
    samples = load_samples("org/animals", "validation", "image", LABELS)
    module = nemo_hf.extract_module(parent, ["cat", "dog"], samples, 0.5, processing_class=image_processor())
    how = "--parent assigned --dataset org/animals --cut-split validation --retention 0.5"
    assert main(f"push {how} --namespace me --modules cat+dog".split()) == 0
    pushed = AutoModelForImageClassification.from_pretrained("me/cat-dog").state_dict()
    assert all(torch.equal(tensor, pushed[name]) for name, tensor in module.state_dict().items())
    assert main(f"evaluate {how} --labels cat+dog --output r.json".split()) == 0
    (report,) = json.loads(Path("r.json").read_text())
    names = ("accuracy", "parameters", "weight_retention_rate")
    before = json.loads(hub.files("me/cat-dog")["report.json"])
    assert [report[name] for name in names] == [before[name] for name in names]
    capsys.readouterr()
    for words in (
        "push --parent assigned --namespace me --modules cat",
        "push --parent parent --namespace me --modules cat --retention 0.5",
        f"evaluate {how} --labels cat --threshold 0.5",
        f"evaluate {how} --modules cat-dog",
    ):
        assert main(words.split()) == 2
        assert re.search("Got no --dataset|Got --threshold or|cut already", capsys.readouterr().err)


def test_evaluate_prints_each_module_when_it_is_measured(capsys, monkeypatch):
    measure, printed = commands.evaluate_module, []

    def recorded(*args, **kwargs):
        printed.append(capsys.readouterr().out)
        return measure(*args, **kwargs)

    monkeypatch.setattr(commands, "evaluate_module", recorded)
    words = "evaluate --parent parent --dataset org/animals --split train --labels cat+dog car --output r.json"
    assert main(words.split()) == 0
    printed.append(capsys.readouterr().out)
    heads = [text.split() for text in printed[0].splitlines()]
    assert [set(heads[0]) >= {"samples", "AUROC", "speed-up"}, set("".join(heads[1]))] == [True, {"-"}]
    assert [text.split()[:2] for text in printed[1:]] == [["cat+dog", "12"], ["car", "6"]]
    for report, text in zip(json.loads(Path("r.json").read_text()), printed[1:], strict=True):
        assert f"{report['rejection']['auroc']:.3f}" in text.split()
        times = zip(report["parent_latency_ms"].values(), report["latency_ms"].values(), strict=True)
        assert text.split()[-1] == "/".join(f"{parent / module:.1f}" for parent, module in times)


def test_a_quick_evaluation_measures_less(monkeypatch):
    monkeypatch.setattr(commands, "QUICK_SAMPLES", 10)
    words = "evaluate --parent parent --dataset org/animals --split train --labels cat+dog --output"
    for more in ("whole", "quick --quick"):
        assert main(f"{words} {more}".split()) == 0
    (whole,), (quick,) = (json.loads(Path(name).read_text()) for name in ("whole", "quick"))
    assert (whole["samples"], quick["samples"]) == (12, 4)
    assert list(quick["latency_ms"]) == ["1"]
    assert set(quick["controls"].values()) == {None}
    assert quick["parameters"] == whole["parameters"]


def test_cut_makes_a_module_for_each_retention_and_prints_a_table(stage, capsys):
    words = f"cut {BERT} --labels dog cat --dataset org/texts --label-column intent --retention 0.6 0.3 --samples 9"
    assert main(f"{words} --max-positions 20 --vocabulary calibration --output-dir m".split()) == 0
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("['dog', 'cat'], cut on 9 samples")
    assert [row.split()[:2] for row in rows[2:]] == [["m/0.6", "0.6"], ["m/0.3", "0.3"]]
    large, small = (json.loads((stage / "m" / share / "config.json").read_text()) for share in ("0.6", "0.3"))
    assert small["extraction"]["bytes"] < large["extraction"]["bytes"] < large["extraction"]["source_bytes"]
    assert large["extraction"]["vocabulary"]["positions"] == 20
    assert large["label_ids"] == [1, 0]
    answers = pipeline("text-classification", model="m/0.3", top_k=None)(["w1 w2"])[0]
    assert {answer["label"] for answer in answers} == {"dog", "cat", REJECTED_LABEL}
    words = f"evaluate --parent {BERT} --dataset org/texts --label-column intent --split train"
    assert main(f"{words} --modules m/0.6 m/0.3 --output r.json".split()) == 0
    reports = json.loads((stage / "r.json").read_text())
    assert [report["neuron_retention_rate"] for report in reports] == [
        config["extraction"]["neurons"] for config in (large, small)
    ]
    assert main([*words.split(), "--modules", "m/0.3", "--labels", "dog"]) == 2


def test_cut_with_its_other_options(stage, capsys):
    words = "--labels cat dog --dataset org/animals --max-loss 100 --validation-split validation --scores magnitude"
    words += " --no-reconstruct --refine-epochs 1 --drop-parts 1 --stream 0.75"
    assert main(f"cut parent {words} --output-dir m".split()) == 0
    done = json.loads((stage / "m" / "config.json").read_text())["extraction"]
    assert (done["scores"], done["refine_epochs"], done["retention"]) == ("magnitude", 1, None)
    assert done["weights"] < 0.1
    assert (len(done["dropped"]), done["stream"]["width"]) == (1, 24)
    assert "layers" not in done
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[:2] == ["m", "-"]
    # Data without labels serve as well, and names of the data's own column.
    folder = saved({"sentence": ["w1 w2", "w3"] * 8, "number": [1, 2] * 8})
    assert main(["cut", BERT, "--labels", "cat", "4", "--dataset", folder, "--output-dir", "texts"]) == 0
    config = json.loads((stage / "texts" / "config.json").read_text())
    assert (config["extraction"]["retention"], config["extraction"]["samples"], config["rejection"]) == (0.2, 16, None)


def test_train_and_evaluate(stage, capsys):
    assert main(TRAIN.split()) == 0
    config = json.loads((stage / "out" / "config.json").read_text())
    assert config["nemo_config"]["group_column"] == "domain"
    assert config["training"]["command"].startswith("nemo-hf train --model")
    assert "eval_accuracy" in json.loads((stage / "out" / "report.json").read_text())["metrics"]
    capsys.readouterr()
    words = "evaluate --parent out --dataset org/texts --label-column intent --labels animals cat+ship --output r.json"
    assert main(words.split()) == 0
    reports = json.loads((stage / "r.json").read_text())
    assert [report["labels"] for report in reports] == [["cat", "dog", "frog"], ["cat", "ship"]]
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["animals", "24"], ["cat+ship", "16"]]


def test_evaluate_adds_metrics_of_the_library(stage, capsys):
    (stage / "agreement.py").write_text(METRIC)
    words = "evaluate --parent parent --dataset org/animals --labels cat+dog --output r.json --metrics ./agreement.py"
    assert main(words.split()) == 0
    (report,) = json.loads((stage / "r.json").read_text())
    assert report["metrics"]["agreement"] == pytest.approx(report["accuracy"])
    assert f"cat+dog: {report['metrics']}, parent: {report['parent_metrics']}" in capsys.readouterr().out
    assert main([*words.split(), "none.py"]) == 2
    assert "The metric 'none.py' can't be loaded" in capsys.readouterr().err


def test_evaluate_passes_its_options_on(stage):
    words = "evaluate --parent parent --dataset org/animals --labels cat --split train --batch-size 7 --output"
    for more in ("a", "b --threshold 0.9", "c --round-to 16"):
        assert main(f"{words} {more}".split()) == 0
    usual, narrow, wide = (json.loads((stage / name).read_text())[0] for name in "abc")
    assert narrow["neuron_retention_rate"] < usual["neuron_retention_rate"] < wide["neuron_retention_rate"]
    assert narrow["threshold"] == 0.9
    assert usual["samples"] == 6  # of 30 in the split


def test_push_uploads_one_model_or_a_parent_with_modules(hub, stage, capsys):
    words = "push --parent parent --namespace me --name animals --modules cat cat+dog --private --license mit"
    assert main(words.split()) == 0
    assert "cat+dog: me/cat-dog" in capsys.readouterr().out
    assert hub.repos["me/animals"].private
    assert b"license: mit" in hub.files("me/cat")["README.md"]
    assert main(["push", "parent", "--repo_id", "me/again"]) == 0
    assert hub.files("me/again")["model.safetensors"] == hub.files("me/animals")["model.safetensors"]
    words = "push cat-dog --repo-id me/m --parent-repo me/animals --datasets org/a --dry-run"
    assert main(words.split()) == 0
    assert capsys.readouterr().err == ""  # no warning of a card that was not there
    card = (stage / "cat-dog" / "README.md").read_text()
    assert [text in card for text in ("me/animals", "org/a")] == [True, True]
    assert "me/m" not in hub.repos


@pytest.mark.parametrize("source", ["google/vit-base-patch16-224-in21k", "cat-dog"])
def test_inspect_lists_the_sites(source, capsys):
    assert main(["inspect", source]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1][:2] == ["vit.layers.0.attention", "attention"]
    assert int(rows[2][2]) == 48 if source != "cat-dog" else int(rows[2][2]) < 48


def saved(rows, names=None):
    features = names and datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=names))
    datasets.Dataset.from_dict(rows, features=features).to_parquet("data/train-0.parquet")
    return "data"


def test_texts_with_labels_by_name_and_images_are_prepared():
    data = load_data(saved({"text": ["w1 w2", "w3"], "label": ["dog", "cat"], "rest": [1, 2]}), BERT, ["train"])
    assert (data.task, data.names) == ("text-classification", ["cat", "dog"])
    batch = data.collator([data.splits["train"][index] for index in (0, 1)])
    assert set(batch) - {"token_type_ids"} == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].tolist() == [[3, 4], [5, 0]]
    assert batch["labels"].tolist() == [1, 0]
    data = load_data("org/animals", "google/vit-base-patch16-224-in21k", ["train"])
    batch = data.collator([data.splits["train"][index] for index in (0, 1)])
    assert (data.task, batch["pixel_values"].shape) == ("image-classification", (2, 3, 16, 16))
    assert batch["labels"].tolist() == [0, 1]


@pytest.mark.parametrize("names", [None, ["dog", "ant"]])
def test_labels_are_numbered_as_the_model_numbers_them(names):
    labels = [0, 1, 0] if names else ["dog", "ant", "dog"]
    source = saved({"text": ["w1", "w2", "w3"], "label": labels}, names)
    assert load_data(source, BERT, ["train"], names=["ant", "bee", "dog"]).splits["train"]["labels"] == [2, 0, 2]
    unnamed = ["LABEL_0", "LABEL_1"]
    if names:
        assert load_data(source, BERT, ["train"], names=unnamed).splits["train"]["labels"] == [0, 1, 0]
    with pytest.raises(ValueError, match=r"Got the labels \['ant'\].*expected some of.*'ant' may be 'ants'"):
        load_data(source, BERT, ["train"], names=["dog", "ants"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": ["test"]}, r"Got the split 'test'.*expected one of \['train'\]"),
        ({"label_column": "intent"}, r"Got no column 'intent'.*expected one of"),
        ({"input_column": "sentence"}, r"Got no column 'sentence'.*expected one of"),
        ({}, r"Got the columns \['text', 'title'\].*expected one"),
    ],
)
def test_missing_columns_are_named(options, message):
    source = saved({"text": ["w1"], "title": ["w2 w3"], "label": [0]})
    with pytest.raises(ValueError, match=message):
        load_data(source, BERT, **{"splits": ["train"], **options})
    assert load_data(source, BERT, ["train"], input_column="title").splits["train"][0]["input_ids"] == [4, 5]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"text": ["w1", "w2"], "label": ["cat", None]}, "Got 1 samples of the split 'train' .* column 'label'"),
        ({"text": ["w1", None], "label": ["cat", "dog"]}, "Got 1 samples of the split 'train' .* column 'text'"),
        ({"text": ["w1", "w2"], "label": [0.5, 1.0]}, "Got labels of type float64 in the column 'label'"),
        ({"text": ["w1", "w2"], "label": [[0, 1], [1, 0]]}, "Got labels of type List in the column 'label'"),
    ],
)
def test_samples_without_a_label_or_an_input_are_counted(rows, message):
    with pytest.raises(ValueError, match=rf"^{message}.*; expected .*\. [A-Z]"):
        load_data(saved(rows), BERT, ["train"], input_column="text")
