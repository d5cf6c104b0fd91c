# /// script
# dependencies = ["nemo-hf[demo,onnx]"]
# ///
"""Trains on scikit-learn's digits and renders the cards in model_cards/: one of a parent, one of a module.

python examples/model_cards.py           # all of it: 3 to 5 minutes on an idle machine, as latencies are measured
python examples/model_cards.py --render  # renders facts.json anew, after a change of the card's template
"""

import argparse
import json
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification

from nemo_hf import evaluate_module
from nemo_hf.cli.demo import load_digits_split, run_demo
from nemo_hf.export.plain_model import compare_latency
from nemo_hf.hub.model_card import CardFacts, render_model_card
from nemo_hf.hub.publish import CARD_NAME, PICTURE_NAME, CardOptions, card_facts, draw_neurons
from nemo_hf.models.atomic_writes import write_json, write_text

CARDS = Path(__file__).parents[1] / "model_cards"
PARENT, MODULE = "digits", "digits-3-8-9"


def rendered() -> dict[str, str]:
    """The cards by folder, from the facts."""
    facts = json.loads((CARDS / "facts.json").read_text(encoding="utf-8"))
    return {folder: render_model_card(CardFacts(**said)) for folder, said in facts.items()}


def collect(demo: Path) -> None:
    """Writes facts and pictures of the parent and the module in the demo's output directory."""
    parent = AutoModelForImageClassification.from_pretrained(demo / "parent")
    seed = json.loads((demo / "report.json").read_text())["seed"]
    _, test, _ = load_digits_split(AutoImageProcessor.from_pretrained(demo / "plain"), seed)
    module = parent.extract_module([3, 8, 9])
    evaluate_module(parent, [3, 8, 9], DataLoader(test, 512), module)
    module.report = {**module.report, "formats": compare_latency(module, parent)}
    defaults = {field.name: field.default for field in fields(CardFacts)}
    facts = {}
    for folder, model, above in ((PARENT, parent, None), (MODULE, module, f"nemo-hf/{PARENT}")):
        (CARDS / folder).mkdir(parents=True, exist_ok=True)
        draw_neurons(model, CARDS / folder / PICTURE_NAME)
        options = CardOptions(parent=above, license="apache-2.0")
        said = asdict(card_facts(model, f"nemo-hf/{folder}", options, PICTURE_NAME))
        facts[folder] = {name: value for name, value in said.items() if value not in (defaults[name], [], {})}
    write_json(CARDS / "facts.json", facts)


def main() -> None:
    """Trains and collects the facts, unless given those of an earlier demo, and renders the cards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, help="Output directory of an earlier nemo-hf demo.")
    parser.add_argument("--render", action="store_true", help="Only render the facts that are there.")
    given = parser.parse_args()
    if given.demo:
        collect(given.demo)
    elif not given.render:
        with tempfile.TemporaryDirectory() as directory:
            run_demo(directory)
            collect(Path(directory))
    for folder, card in rendered().items():
        write_text(CARDS / folder / CARD_NAME, card)


if __name__ == "__main__":
    main()
