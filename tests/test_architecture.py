"""Folders import only from folders below them."""

import ast
from pathlib import Path

import pytest

import nemo_hf

SOURCE = Path(nemo_hf.__file__).parent
ORDER = (
    "config", "neurons", "pruning", "models", "evaluation", "export", "hub", "auto_classes", "training", "cli",
    "__init__",
)  # fmt: skip
"""Top-level files and folders, lower ones first."""


def imported_parts(path: Path) -> set[str]:
    """Folders and top-level files of the package that a file imports, wherever in the file it does."""
    package = ("nemo_hf", *path.relative_to(SOURCE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("nemo_hf.")}
    return found & set(ORDER)


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_folder_imports_from_lower_folders_only(path):
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    higher = {part for part in imported_parts(path) if ORDER.index(part) > ORDER.index(own)}
    assert not higher, f"{own} must not import {sorted(higher)}"


def test_the_contract_sees_every_kind_of_import():
    assert imported_parts(SOURCE / "training" / "trainer.py") >= {"config", "models", "evaluation", "hub"}
    assert imported_parts(SOURCE / "__init__.py") >= {"config", "auto_classes", "training"}


def test_no_two_files_import_each_other():
    files = {path: str(path.relative_to(SOURCE).with_suffix("")).replace("/", ".") for path in SOURCE.rglob("*.py")}
    imports = {}
    for path, name in files.items():
        package = path.relative_to(SOURCE).parts[:-1]
        imports[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                parts = package[: len(package) - node.level + 1] if node.level else ()
                module = ".".join([*parts, *(node.module or "").removeprefix("nemo_hf").strip(".").split(".")])
                imports[name] |= {module, *(f"{module}.{alias.name}".strip(".") for alias in node.names)}
    left = {name: found & set(files.values()) - {name} for name, found in imports.items() if name != "__init__"}
    while ready := [name for name, found in left.items() if not found & set(left)]:
        for name in ready:
            del left[name]
    assert not left, f"a cycle among {sorted(left)}"
