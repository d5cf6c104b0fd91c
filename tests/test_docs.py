"""README says what the results say, and its code is real."""

import ast
import importlib.util
import re
from pathlib import Path

import nemo_hf

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_tables_are_those_of_the_results():
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "examples/benchmarks/readme_tables.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.rendered(README) == README
    assert len(re.findall(r"^\| (module|method) ", README, re.MULTILINE)) >= 2


def test_code_parses_and_names_exist():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        ast.parse(block)
    for name in re.findall(r"nemo_hf\.(\w+)", README):
        assert hasattr(nemo_hf, name), name


def test_the_two_commands_are_one_line_each():
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert [("nemo-hf demo --output-dir" in line, "pytest" in line) for line in lines] == [(True, False), (False, True)]
