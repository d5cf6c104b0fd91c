# /// script
# dependencies = ["nemo-hf[demo]"]
# ///
"""Renders the cards in model_cards/ from facts.json, and collects the facts of models that were trained and measured.

    python examples/model_cards.py  # renders all cards anew
    python examples/model_cards.py --add demo/parent --repo_id me/digits --license apache-2.0
    python examples/model_cards.py --add demo/modules/0-1 --repo_id me/digits-0-1 --parent me/digits \
        --parent_directory demo/parent

With --add it reads a saved parent or module and its report, draws its neurons, and keeps what its card says. With
--parent_directory too it times the module beside its parent, as a plain model and as ONNX.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from nemo_hf.cli.commands import AUTO_CLASSES
from nemo_hf.export.plain_model import compare_latency
from nemo_hf.hub.model_card import CardFacts, render_model_card
from nemo_hf.hub.publish import CARD_NAME, PICTURE_NAME, CardOptions, card_facts, draw_neurons
from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.models.configuration import NeMoModelConfig, task_of
from nemo_hf.models.files import write_json, write_text

CARDS = Path(__file__).parents[1] / "model_cards"


def rendered() -> dict[str, str]:
    """The cards by folder, from the facts."""
    facts = json.loads((CARDS / "facts.json").read_text(encoding="utf-8"))
    return {folder: render_model_card(CardFacts(**said)) for folder, said in facts.items()}


def load(source: Path) -> NeMoPreTrainedModel:
    """A saved parent or module."""
    config = NeMoModelConfig.from_pretrained(source)
    return AUTO_CLASSES[task_of(config.plain_class)].from_pretrained(source)


def add(source: Path, repo_id: str, options: CardOptions, parent: Path | None) -> None:
    """Collects the facts of a saved model and draws its neurons."""
    model = load(source)
    if parent is not None and model.report:
        model.report = {**model.report, "formats": compare_latency(model, load(parent))}
    folder = CARDS / repo_id.split("/")[-1]
    folder.mkdir(parents=True, exist_ok=True)
    has_picture = draw_neurons(model, folder / PICTURE_NAME)
    path = CARDS / "facts.json"
    facts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    facts[folder.name] = asdict(card_facts(model, repo_id, options, PICTURE_NAME if has_picture else None))
    write_json(path, facts)


def main() -> None:
    """Adds a model if one is given, and renders all cards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--add", type=Path, help="Directory of a saved parent or module.")
    parser.add_argument("--repo_id", help="Repository that its card is for.")
    parser.add_argument("--parent", help="Repository of a module's parent.")
    parser.add_argument("--parent_directory", type=Path, help="Directory of a module's parent, to time both.")
    parser.add_argument("--license")
    parser.add_argument("--datasets", nargs="*", default=[])
    given = parser.parse_args()
    if given.add:
        if not given.repo_id:
            parser.error("got --add without --repo_id; expected the repository that the card is for")
        options = CardOptions(given.parent, given.license, given.datasets)
        add(given.add, given.repo_id, options, given.parent_directory)
    for folder, card in rendered().items():
        write_text(CARDS / folder / CARD_NAME, card)


if __name__ == "__main__":
    main()
