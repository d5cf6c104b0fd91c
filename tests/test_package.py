"""The built wheel and the command line from the outside."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_the_templates_and_the_types(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {f"nemo_hf/{file.name}" for file in (ROOT / "src" / "nemo_hf").glob("*.py")}
    templates = {f"nemo_hf/templates/{name}.jinja" for name in ("model_card.md", "modeling_nemo_module.py")}
    assert {"nemo_hf/py.typed"} | templates | sources <= names


def test_every_command_has_help():
    from nemo_hf.cli.main import main

    for command in ("demo", "train", "extract", "export", "evaluate", "push", "inspect"):
        try:
            main([command, "--help"])
        except SystemExit as stop:
            assert stop.code == 0  # noqa: PT017 - argparse leaves by this door
        else:
            raise AssertionError(command)
