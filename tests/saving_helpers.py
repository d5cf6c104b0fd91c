"""What the tests of files share: the contents of directories, and exports and cards without their slowest part."""

from pathlib import Path


def contents(directory: Path) -> dict[str, bytes]:
    """All files below a directory, by their names in it."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def without_tracing(monkeypatch) -> None:
    """Writes the labels instead of an ONNX graph; tracing takes seconds."""
    written = lambda ready, path: path.write_text(str(ready.exact.config.names))  # noqa: E731
    monkeypatch.setattr("nemo_hf.export.onnx.trace", written)
    monkeypatch.setattr("nemo_hf.export.onnx.OnnxRunner", lambda path, threads: None)
    monkeypatch.setattr("nemo_hf.export.onnx.compare_outputs", lambda *given: (0.0, 1.0))


def without_drawing(monkeypatch) -> None:
    """Writes options instead of a picture; drawing is most of the time of a push."""
    monkeypatch.setattr(
        "nemo_hf.hub.publish.draw_neurons",
        lambda model, path: path.write_text(str(model.config.to_dict().get("nemo_config"))) > 0,
    )
