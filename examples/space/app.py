# /// script
# dependencies = ["nemo-hf[demo]", "gradio>=6.31"]
# ///
"""An app in which visitors cut modules out of a classifier and compare them with it; a Space of the Hugging Face Hub.

    python examples/space/app.py --model path/to/classifier --data path/to/samples

Each option is also an environment variable, as the settings of a Space give them: MODEL, DATA, SPLIT and so on.
"""

import argparse
import html
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from classifier import Source

import nemo_hf

OPTIONS = {  # of the command line and, in capitals, of the environment, with their defaults
    "model": ("philschmid/DistilBERT-Banking77", "classifier of texts or images: directory or Hub repository"),
    "data": ("mteb/banking77", "samples with the model's labels: folder or Hub data set"),
    "split": ("train", "split to cut on"),
    "validation-split": ("test", "split to measure on; empty for none"),
    "label-column": ("label_text", "column of the labels"),
    "max-samples": ("500", "most samples of a module's labels to cut on"),
}
AN_HOUR = 3600  # seconds after which a visitor's module and files are dropped
REFUSED = (ValueError, TypeError, OSError, nemo_hf.EquivalenceError)
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = """
.costs table {width: 100%}
.costs :is(th, td):not(:first-child) {white-space: nowrap}
.verdict {padding: .8em 1em; border-radius: 8px; font-size: 1.1em; border-left: 6px solid}
.verdict.own {border-color: #15803d; background: color-mix(in srgb, #15803d 12%, transparent)}
.verdict.foreign {border-color: #b45309; background: color-mix(in srgb, #b45309 14%, transparent)}
"""
EMPTY = "*Pick labels and cut a module: its size, speed and accuracy will be here.*"


def build(source: Source) -> gr.Blocks:
    """Builds the app for a source."""
    is_text, name = source.kind == "text", Path(source.name).name
    data = Path(source.data).name if Path(source.data).is_dir() else source.data
    with gr.Blocks(title="Cut a module", delete_cache=(AN_HOUR // 6, AN_HOUR)) as app:
        module, drawn = gr.State(None, time_to_live=AN_HOUR), gr.State(0)
        gr.Markdown(
            f"# Cut a small model out of a classifier\n`{name}` tells {len(source.labels)} labels apart and has "
            f"{source.bytes / 1e6:.2f} MB. Pick the labels that you need: you get a stand-alone model for these, in "
            "seconds, without training. It can reject inputs that have none of them."
        )
        with gr.Row():
            with gr.Column():
                labels = gr.Dropdown(source.labels, multiselect=True, label="Labels", info="Type to search.")
                retention = gr.Slider(
                    0.05, 1, 0.2, step=0.05, label="Share to keep", info="Of attention and feed-forward weights."
                )
                tokens = gr.Checkbox(
                    visible=is_text, label="Fewer tokens", info="Rare tokens share embeddings of similar ones: smaller."
                )
                with gr.Accordion("Samples of your own", open=False, visible=is_text):
                    texts = gr.Textbox(
                        lines=5, label="Texts", info=f"One in a line; without any, those of {data} are used."
                    )
                button = gr.Button("Cut", variant="primary")
            with gr.Column():
                table = gr.Markdown(EMPTY, min_height=200, elem_classes="costs")
                download = gr.DownloadButton("Download the module", visible=False)
        with gr.Accordion("The same on your computer", open=False, visible=False) as yours:
            command_line = gr.Code(language="shell", label="Command line", wrap_lines=True)
            code = gr.Code(language="python", label="Python", wrap_lines=True)
        with gr.Column(visible=False) as comparison:
            gr.Markdown("## Compare")
            with gr.Row():
                with gr.Column():
                    sample = gr.Textbox(label="Text", max_length=500) if is_text else gr.Image(type="pil", height=220)
                    with gr.Row():
                        own = gr.Button("A sample of these labels", size="sm")
                        foreign = gr.Button("A sample of other labels", size="sm")
                    classify = gr.Button("Classify", variant="primary")
                with gr.Column():
                    verdict = gr.HTML(min_height=60)
            with gr.Row(equal_height=True):
                answers = [gr.Label(num_top_classes=4, label=name) for name in TITLES.values()]

        def cut(
            labels: list[str],
            retention: float,
            shares_tokens: bool,
            texts: str,
            progress: Any = gr.Progress(track_tqdm=True),  # noqa: B008  (Gradio looks for it there)
        ) -> Iterator[list[Any]]:
            options = (labels, retention, shares_tokens)
            with tempfile.TemporaryDirectory() as folder, told():
                found = source.cut(*options, texts)
                found.save_pretrained(Path(folder, "module"))
                archive = shutil.make_archive(f"{folder}/module", "zip", folder, "module")
                shown = [gr.update(value=archive, visible=True), gr.update(visible=True), gr.update(visible=True)]
                is_theirs = bool((texts or "").strip())  # texts that no command can name
                same = [gr.update(value=source.command(*options), visible=not is_theirs), source.code(*options)]
                cleared = [gr.update(value=None, label=name) for name in TITLES.values()]
                yield [found, as_table(source.table(found)), *shown, *same, "", *cleared]

        def compare(found: Any, given: Any) -> list[Any]:
            if not given:
                raise gr.Error(
                    f"Got no {source.kind}; expected one. Enter it, or take a sample.", print_exception=False
                )
            with told():
                results = source.compare(found, given)
            labelled = [
                gr.update(value=chances, label=f"{TITLES[name]}: {milliseconds:.2f} ms")
                for name, (chances, milliseconds) in results.items()
            ]
            return [as_verdict(found, results["module"][0]), *labelled]

        def draw(found: Any, count: int, is_own: bool) -> tuple[Any, int]:
            names = list(found.config.names.values()) if found is not None else []
            return source.sample_of(names, is_own, count), count + 1

        button.click(
            cut,
            [labels, retention, tokens, texts],
            [module, table, download, yours, comparison, command_line, code, verdict, *answers],
            concurrency_limit=1,
            show_progress_on=table,
        )
        classify.click(compare, [module, sample], [verdict, *answers], concurrency_limit=4)
        for each, is_own in ((own, True), (foreign, False)):
            each.click(partial(draw, is_own=is_own), [module, drawn], [sample, drawn])
    return app


TITLES = {"all": "Source", "restricted": "Source, these labels only", "module": "Module"}


def as_table(rows: list[tuple[str, str, str]]) -> str:
    """Rows as a table of Markdown."""
    return "\n".join(["| | Source | Module |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)])


def as_verdict(module: Any, chances: dict[str, float]) -> str:
    """What the module says, as HTML."""
    best = max(chances, key=chances.__getitem__)
    if best == module.config.rejected_label:
        names = html.escape(", ".join(module.config.names.values()))
        return f'<div class="verdict foreign">The module rejects this input: <b>none of</b> {names}.</div>'
    note = "" if module.config.rejected_label else " It can't reject inputs: that needs samples of other labels."
    return f'<div class="verdict own">The module answers <b>{html.escape(best)}</b>.{note}</div>'


def refusal(message: str) -> gr.Error:
    """An error that is the visitor's to mend, and none for the log."""
    return gr.Error(message, print_exception=False)


@contextmanager
def told() -> Iterator[None]:
    """Shows the library's errors and warnings to the visitor."""
    handler, thread = logging.Handler(logging.WARNING), threading.get_ident()
    handler.addFilter(lambda record: record.thread == thread)  # others belong to other visitors
    handler.emit = lambda record: gr.Warning(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("nemo_hf")
    logger.addHandler(handler)
    try:
        yield
    except REFUSED as error:
        raise refusal(str(error)) from error
    finally:
        logger.removeHandler(handler)


def load(options: dict[str, Any]) -> Source:
    """The source that the options name; one that can't be had ends the app with a message."""
    try:
        return Source(**options | {"max_samples": int(options["max_samples"])})
    except (*REFUSED, ImportError) as error:
        reason = str(error).rstrip(".\n")
        sys.exit(
            f"Can't load the classifier {options['model']!r} with samples of {options['data']!r}:\n{reason}.\nName "
            "others by --model and --data, or by the variables MODEL and DATA; downloads need a connection to the Hub."
        )


def main() -> None:
    """Loads the source and serves the app until it is stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, text) in OPTIONS.items():
        value = os.environ.get(name.replace("-", "_").upper(), default)
        parser.add_argument(f"--{name}", default=value, help=f"{text} (default: {default})")
    parser.add_argument("--port", type=int, help="port to serve on (default: 7860, or the next free one)")
    options = vars(parser.parse_args())
    port = options.pop("port")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that temporary files go
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        app = build(load(options))
        app.queue().launch(server_port=port, theme=THEME, css=CSS, footer_links=[])


if __name__ == "__main__":
    main()
