"""Files import only from lower levels, and stay short."""

import ast
from pathlib import Path

import pytest

import nemo_hf

SOURCE = Path(nemo_hf.__file__).parent
LEVELS = (
    (
        "config",
        "commands",
        "neurons",
        "resizing",
        "generators",
        "inputs",
        "losses",
        "model_card",
        "provenance",
        "schema",
    ),
    ("products",),
    ("site_masks",),
    (
        "layouts",
        "masking",
        "slicing",
        "planning",
        "data",
        "configuration",
        "metrics",
        "rejection",
        "export_mixin",
        "sources",
    ),
    ("sites", "weights", "rehearsal", "distributed", "calls", "convolutions"),
    ("described", "files", "restoring"),
    ("loading",),
    ("file_mixin",),
    ("modeling", "proposing"),
    ("tasks", "law", "relevance", "costs", "calibration", "pictures"),
    ("extraction", "standalone", "tracing", "composed"),
    ("evaluation", "probing", "exporting", "composition"),
    ("publishing",),
    ("repositories",),
    ("hub_trainer",),
    ("device_trainer",),
    ("trainer",),
    ("demo",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
LEVEL["__init__"] = LEVEL["__main__"] = len(LEVELS)
# Methods of a model that lead to rooms above it.
ALLOWED = {
    *(("modeling", room) for room in ("extraction", "standalone")),
    *(("export_mixin", room) for room in ("extraction", "publishing", "exporting", "tracing")),
}
ROOMS = sorted(path.stem for path in SOURCE.rglob("*.py"))


def imported_rooms(node: ast.AST) -> list[str]:
    """Rooms that an import statement names; every statement form there is."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        package = "nemo_hf" if node.level else ""
        source = ".".join(part for part in (package, node.module) if part)
        names = [source] if source != "nemo_hf" else [f"nemo_hf.{alias.name}" for alias in node.names]
    else:
        return []
    return [name.split(".")[1] for name in names if name.startswith("nemo_hf.")]


def tree(room: str) -> ast.Module:
    return ast.parse((SOURCE / f"{room}.py").read_text(encoding="utf-8"))


def test_every_statement_form_is_read():
    code = (
        "from .a import x\nfrom . import b\nimport nemo_hf.c\nfrom nemo_hf.d import y\nfrom nemo_hf import e\nimport os"
    )
    assert [room for node in ast.walk(ast.parse(code)) for room in imported_rooms(node)] == ["a", "b", "c", "d", "e"]


def test_there_are_no_folders_of_rooms():
    assert [path for path in SOURCE.rglob("*.py") if path.parent != SOURCE] == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_lower_levels(room):
    imported = [name for node in ast.walk(tree(room)) for name in imported_rooms(node)]
    too_high = {name for name in imported if LEVEL[name] >= LEVEL[room]}
    assert {(room, name) for name in too_high} <= ALLOWED


@pytest.mark.parametrize(("room", "imported"), sorted(ALLOWED))
def test_the_exception_is_imported_inside_a_function(room, imported):
    at_import = [name for node in tree(room).body for name in imported_rooms(node)]
    assert imported not in at_import
    assert imported in [name for node in ast.walk(tree(room)) for name in imported_rooms(node)]


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_is_over_400_lines(room):
    assert len((SOURCE / f"{room}.py").read_text(encoding="utf-8").splitlines()) <= 400
