"""The built wheel holds all folders, the templates and the types."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_all_folders_the_templates_and_the_types(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    source = ROOT / "src"
    files = {file.relative_to(source).as_posix() for ending in ("py", "jinja") for file in source.rglob(f"*.{ending}")}
    assert {"nemo_hf/py.typed", *files} <= names
    assert "nemo_hf/hub/templates/model_card.md.jinja" in files
