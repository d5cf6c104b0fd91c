"""Every code block of README and docs/ runs, page by page, on tiny models of the same names."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import datasets
import pytest
import torch
from conftest import LABELS, generated, image_processor, image_samples
from hub_server import hub as hub
from PIL import Image
from saving_helpers import without_drawing
from stage import stage as stage
from stage import template as template
from transformers import AutoModelForImageClassification, TrainingArguments

import nemo_hf
from nemo_hf.cli import commands, main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
UNTRIED = ("python3 -m venv", "python examples/case_studies/", "curl ")  # test_case_*.py tries the latter
SLURM = {"SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "first,second", "SLURM_JOB_ID": "7"}


def provided():
    """What the pages take for granted: data, and models by the names that the text gives them."""
    parent = AutoModelForImageClassification.from_pretrained("parent")
    plain = [AutoModelForImageClassification.from_pretrained("google/vit-base-patch16-224-in21k") for _ in range(2)]
    test = image_samples(20, seed=1)
    args = TrainingArguments("out", max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
    batch = datasets.Dataset.from_list(test).with_format("torch")[:]
    models = {"model": plain[0], "weak": plain[1], "parent": parent, "strong": parent}
    data = {"train": image_samples(), "test": test, "validation": image_samples(20, seed=2)}
    return models | data | {
        "names": LABELS, "id2label": dict(enumerate(LABELS)), "args": args, "processor": image_processor(),
        "validation_batches": [batch], "inputs": {"pixel_values": batch["pixel_values"]},
        "trainer": nemo_hf.NeMoTrainer(parent, args, eval_dataset=test, processing_class=image_processor()),
        "module": parent.extract_module(["cat", "dog"]), "images": [random_image(seed) for seed in range(20)],
    }  # fmt: skip


def random_image(seed):
    pixels = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def run_bash(code):
    """Runs commands of ours through `main`, scripts of SLURM with a stand-in for it, and no installation."""
    if code.startswith("#!/bin/bash\n#SBATCH"):
        for name, line in {"srun": 'echo "$@"', "scontrol": "echo first; echo second"}.items():
            Path(name).write_text(f"#!/bin/bash\n{line}\n")
            Path(name).chmod(0o755)
        environment = {**os.environ, "PATH": f"{Path.cwd()}:{os.environ['PATH']}", **SLURM}
        done = subprocess.run(["bash", "-eu"], input=code, capture_output=True, text=True, env=environment, check=False)
        assert done.stdout.startswith("torchrun --nnodes 4"), done.stderr
        assert "first:29500 train.py" in done.stdout
        return
    for line in code.replace("\\\n", " ").splitlines():
        if not line.startswith(UNTRIED):
            command, *words = shlex.split(line)
            assert command == "nemo-hf"
            assert main(words) == 0, line


RUNNERS = {
    "bash": run_bash,
    "json": lambda code: generated(**json.loads(code)),
    "bibtex": lambda code: re.fullmatch(r"@article\{\w+,\n(  \w+ += \{.*\},?\n)+\}\n", code).group(),
}


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.stem, marks=pytest.mark.slow if page.stem == "export" else ()) for page in PAGES],
)
def test_every_block_of_a_page_runs_and_links_lead_to_files(page, stage, monkeypatch, request):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
    blocks = list(BLOCK.finditer(text))
    assert text.count("```") == 2 * len(blocks), "a block is not closed, or has no language"
    monkeypatch.setattr(commands, "run_demo", lambda *args, **kwargs: None)  # test_demo.py runs it
    monkeypatch.setattr(commands, "format_demo", str)
    if "push" in text:
        request.getfixturevalue("hub")
        without_drawing(monkeypatch)
    space = provided() if "```python" in text else {}
    for block in blocks:
        language, code = block.groups()
        if language == "python":
            lines = text[: block.start(2)].count("\n")
            exec(compile("\n" * lines + code, str(page), "exec"), space)
        else:
            RUNNERS[language](code)


def test_readme_is_short_and_has_its_two_commands_on_one_line_each():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.encode()) <= 8192
    lines = [line for line in readme.splitlines() if line.startswith("python3 -m venv")]
    assert [("nemo-hf demo --output-dir" in line, "pytest" in line) for line in lines] == [(True, False), (False, True)]
    assert (ROOT / "docs" / "modules.png").stat().st_size < 80_000
