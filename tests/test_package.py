"""What is published: the wheel, its types, its versions, and what it imports and requires."""

import ast
import configparser
import importlib.util
import os
import re
import subprocess
import sys
import venv
import zipfile
from email import message_from_string
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")

CUT = """
import torch, transformers
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification
import nemo_hf

sizes = dict(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
model = ViTForImageClassification(ViTConfig(**sizes, intermediate_size=32, num_labels=4)).eval()
batches = [{"pixel_values": torch.randn(32, 3, 8, 8)}]
module = nemo_hf.extract_module(model, [0, 2], calibration=batches, retention=0.5, show_progress=False)
module.save_pretrained("module")
loaded = AutoModelForImageClassification.from_pretrained("module")
assert torch.equal(loaded(**batches[0]).logits, module(**batches[0]).logits)
assert nemo_hf.NeMoTrainer.__mro__[1] is transformers.Trainer
print(nemo_hf.__file__)
"""
PROJECT = """
from typing import assert_type

import nemo_hf
from nemo_hf import ModuleReport, NeMoConfig, NeMoForImageClassification, NeMoTrainer

config = NeMoConfig(retention_target=0.3)
assert_type(config.retention_target, float | None)
NeMoConfig(retention_target="0.3")  # type: ignore[arg-type]
NeMoConfig(no_such_option=1)  # type: ignore[call-arg]


def measured(parent: NeMoForImageClassification, trainer: NeMoTrainer) -> float:
    report = nemo_hf.evaluate_module(parent, ["cat"], [])
    assert_type(report, ModuleReport)
    nemo_hf.evaluate_module(parent, ["cat"])  # type: ignore[call-arg]
    trainer.extract_module(["cat"])
    return report.accuracy
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def required(name, extra="", found=None):
    """The installed distributions that one requires, with those that these require, by name."""
    found = {} if found is None else found
    for line in distribution(name).requires or ():
        wanted = Requirement(line)
        if wanted.name not in found and (wanted.marker is None or wanted.marker.evaluate({"extra": extra})):
            try:
                found[wanted.name] = distribution(wanted.name)
            except PackageNotFoundError:  # of CUDA, beside a build of torch without
                continue
            for option in ("", *wanted.extras):
                required(wanted.name, option, found)
    return found


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory):
    """The Python of an environment with the wheel and what it requires, linked from this one, and nothing else."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin" / "python"
    (site,) = (folder / "lib").glob("python*/site-packages")
    tops = {
        each.locate_file(file.parts[0])
        for each in required("nemo-hf").values()
        for file in each.files
        if file.parts[0] not in ("..", "__pycache__")
    }
    for top in tops:
        (site / top.name).symlink_to(top)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return python


def ran(command, folder):
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, cwd=folder, env=kept | {"HF_HUB_OFFLINE": "1"}
    )


def test_the_wheel_holds_all_folders_the_templates_and_the_types(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    source = ROOT / "src"
    files = {file.relative_to(source).as_posix() for ending in ("py", "jinja") for file in source.rglob(f"*.{ending}")}
    assert {"nemo_hf/py.typed", *files} <= names
    assert "nemo_hf/hub/templates/model_card.md.jinja" in files


def test_the_wheel_has_the_version_of_changelog_and_citation(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        about = message_from_string(archive.read(name).decode())
    released = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert about["Version"] == released[0] == cited[1]
    assert released == sorted(released, key=Version, reverse=True)
    assert about["Description-Content-Type"] == "text/markdown"
    assert about["Requires-Python"] == SETUP["options"]["python_requires"]


def test_the_oldest_versions_that_are_tried_are_those_that_are_allowed():
    lines = (ROOT / "tests" / "minimum_versions.txt").read_text(encoding="utf-8").splitlines()
    tried = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = SETUP["options.extras_require"]
    listed = [SETUP["options"]["install_requires"], *(text for name, text in extras.items() if name != "test")]
    wanted = [Requirement(line) for text in listed for line in text.split()]
    assert tried == {each.name: str(each.specifier).removeprefix(">=") for each in wanted}
    for line in extras["test"].split():  # what a test needs of an extra is as old there
        own = Requirement(line)
        assert str(own.specifier) == f">={tried.get(own.name, str(own.specifier)[2:])}"


def test_what_the_code_imports_is_required_and_nothing_else():
    named = {"huggingface_hub": "huggingface-hub", "sklearn": "scikit-learn", "PIL": "pillow", "markupsafe": "jinja2"}
    imported = set()
    for node in (
        node for path in (ROOT / "src").rglob("*.py") for node in ast.walk(ast.parse(path.read_text("utf-8")))
    ):
        names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        imported |= {named.get(top, top) for top in (name.split(".")[0] for name in names)}
    imported -= {*sys.stdlib_module_names, "nemo_hf", "nemo_hf_cli"}
    needed = {Requirement(line).name for line in SETUP["options"]["install_requires"].split()}
    extras = {Requirement(line).name for line in "".join(SETUP["options.extras_require"].values()).split()}
    assert needed <= imported <= needed | extras


def test_importing_takes_no_library_that_only_some_calls_need():
    unused = {"datasets", "evaluate", "matplotlib", "onnx", "onnxruntime", "pandas", "pyarrow", "transformers.trainer"}
    code = (
        f"import sys, nemo_hf; print(sys.modules.keys() & {unused}, set(nemo_hf.__all__) - set(dir(nemo_hf)))\n"
        "from nemo_hf import *; print(NeMoTrainer.__name__, compute_relevance.__name__, hasattr(nemo_hf, 'Trainer'))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["set()", "set()", "NeMoTrainer", "compute_relevance", "False"]


@pytest.mark.slow
def test_the_wheel_works_with_nothing_but_what_it_requires(clean, tmp_path):
    found = ran([clean, "-c", CUT], tmp_path)
    assert not found.returncode, found.stderr
    assert Path(found.stdout.split()[-1]).is_relative_to(clean.parents[1])
    found = ran(
        [clean, "-c", "import sys, nemo_hf_cli; sys.exit(nemo_hf_cli.main())", "demo", "--output-dir", "x"], tmp_path
    )
    assert found.returncode == 2
    assert "Got no pillow and no scikit-learn" in found.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs mypy")
def test_a_users_project_is_checked_against_the_types(clean, tmp_path):
    (tmp_path / "project.py").write_text(PROJECT, encoding="utf-8")
    skipped = "[mypy]\nstrict = True\n[mypy-torch.*,transformers.*,datasets.*]\nfollow_imports = skip\n"
    (tmp_path / "mypy.ini").write_text(skipped, encoding="utf-8")
    found = ran([sys.executable, "-m", "mypy", "--python-executable", clean, "project.py"], tmp_path)
    assert not found.returncode, found.stdout + found.stderr
