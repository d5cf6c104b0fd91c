"""Costs after training: relevance, extraction, loading, cutting a module on load, import.

    python examples/benchmarks/relevance.py

Each is measured beside what it is compared with, alternating in one process where times are compared. Writes
results/relevance.json. Runs on one CPU thread, or on a GPU if there is one; about ten minutes on a CPU.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import compact
import torch
from safetensors import safe_open
from timing import MEBIBYTE, alternating, fresh_process, peak_memory, ratio
from training_step import images, minilm, texts, vit
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, set_seed
from transformers.utils import logging as transformers_logging

from nemo_hf import NeMoConfig, NeMoForImageClassification, compute_relevance, make_parent
from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.models.extraction import build_module, make_plan, read_tensor

KEPT = (0.5, 0.25)  # shares of the neurons that modules keep


def device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parent_of(model: PreTrainedModel, kept: float = 0.5, **options) -> NeMoPreTrainedModel:
    """A parent whose relevance is drawn, so that each group opens about the share `kept` of the neurons."""
    parent = make_parent(model, NeMoConfig(masks="generated", **options)).to(device()).eval()
    for mask in parent.masks.site_masks():
        mask.relevance.copy_((torch.rand(mask.relevance.shape) < kept).to(torch.uint8) * 255)
    parent.config.relevance_source = "exact"
    return parent


def relevance_pass(build: Callable[[], PreTrainedModel], draw: Callable, batch: int, rounds: int) -> dict:
    """Relevance over two batches beside a plain pass over them."""
    set_seed(0)
    plain, parent = build().to(device()).eval(), parent_of(build())
    batches = [{name: value.to(device()) for name, value in draw(batch).items()} for _ in range(2)]

    @torch.no_grad()
    def evaluate() -> None:
        for inputs in batches:
            plain(**{name: value for name, value in inputs.items() if name != "labels"})

    runs = {"plain": evaluate, "relevance": lambda: compute_relevance(parent, batches, show_progress=False)}
    seconds = alternating(runs, rounds)
    return ratio(seconds["relevance"], seconds["plain"])


def pass_by_groups(rounds: int) -> dict:
    """A pass of a small ViT of 1,000 labels in 1,000 groups beside one in 10."""
    runs = {}
    for groups in (10, 1000):
        set_seed(0)
        config = ViTConfig(image_size=32, patch_size=4, hidden_size=128, num_hidden_layers=6, num_attention_heads=4,
                           intermediate_size=512, num_labels=1000)  # fmt: skip
        each = 1000 // groups
        named = {f"group {g}": list(range(g * each, g * each + each)) for g in range(groups)}
        parent = parent_of(ViTForImageClassification(config), label_groups=named)
        batches = [{**images(100), "labels": torch.arange(100) + 100 * start} for start in range(10)]
        runs[groups] = lambda p=parent, b=batches: compute_relevance(p, b, show_progress=False)
    seconds = alternating(runs, rounds)
    return ratio(seconds[1000], seconds[10])


def extraction_seconds(rounds: int) -> dict:
    """Seconds to cut a module of three labels out of a ViT-S, without and with the equivalence check."""
    set_seed(0)
    parent = parent_of(vit(384, 12, 6), 0.25)
    plan = make_plan(parent, [0, 1, 2])

    def cut() -> None:
        build_module(type(parent), parent, plan, lambda name, own: read_tensor(parent.model.state_dict(), name, own))

    seconds = alternating({"cut": cut, "with the check": lambda: parent.extract_module([0, 1, 2])}, rounds)
    return {name: statistics.median(own) for name, own in seconds.items()}


def print_extraction_memory(kept: float) -> None:
    """Prints the peak MiB while a module is cut out of a ViT-L, beside the MiB of its weights and of the module's."""
    config = ViTConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
                       num_labels=10)  # fmt: skip
    models: dict[str, NeMoPreTrainedModel] = {}

    def build() -> Callable[[], object]:
        set_seed(0)
        models["weights_mib"] = parent_of(ViTForImageClassification(config), kept)
        return lambda: models.update(module_mib=models["weights_mib"].extract_module([0]))

    peak = peak_memory(build, calls=1)
    sizes = {name: sum(p.numel() * p.element_size() for p in m.parameters()) / MEBIBYTE for name, m in models.items()}
    print(json.dumps({"kept": kept, "peak_mib": peak, **sizes}))


class CountedFile:
    """A weight file, or a tensor in it, that counts the bytes read from it."""

    read = 0

    def __init__(self, opened) -> None:
        self.opened = opened

    def __enter__(self) -> "CountedFile":
        return CountedFile(self.opened.__enter__())

    def __exit__(self, *raised: object) -> None:
        self.opened.__exit__(*raised)

    def __getattr__(self, name: str):
        return getattr(self.opened, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        """Reads a whole tensor."""
        return self.get_slice(name)[:]

    def get_slice(self, name: str) -> "CountedFile":
        """Opens a tensor to read parts of it."""
        return CountedFile(self.opened.get_slice(name))

    def __getitem__(self, index) -> torch.Tensor:
        tensor = self.opened[index]
        CountedFile.read += tensor.numel() * tensor.element_size()
        return tensor


def cut_on_load(kept: float) -> dict:
    """Bytes that cutting a module on load reads of a ViT-S, beside those of the module's own file; seconds of both."""
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        parent = parent_of(vit(384, 12, 6), kept)
        parent.save_pretrained(f"{folder}/parent")
        parent.extract_module([0]).save_pretrained(f"{folder}/module")
        CountedFile.read = 0
        with patch(
            "nemo_hf.models.weight_files.safe_open", lambda *args, **options: CountedFile(safe_open(*args, **options))
        ):
            start = time.perf_counter()
            NeMoForImageClassification.from_pretrained(f"{folder}/parent", labels=[0])
            cutting = time.perf_counter() - start
        start = time.perf_counter()
        NeMoForImageClassification.from_pretrained(f"{folder}/module")
        loading = time.perf_counter() - start
        own = Path(folder, "module", "model.safetensors").stat().st_size
    return {"kept": kept, "module_bytes": own, "read_bytes": CountedFile.read, "ratio": CountedFile.read / own,
            "seconds_cutting": cutting, "seconds_loading": loading}  # fmt: skip


def import_seconds(rounds: int) -> dict[str, float]:
    """Seconds that importing nemo_hf adds to what a training script imports anyway."""
    base = "import transformers; from transformers import Trainer, AutoModelForImageClassification, AutoTokenizer"

    def run(code: str) -> float:
        clock = f"import time; start = time.perf_counter()\n{code}\nprint(time.perf_counter() - start)"
        found = subprocess.run([sys.executable, "-c", clock], check=True, capture_output=True, text=True)  # noqa: S603
        return float(found.stdout.splitlines()[-1])

    pairs = [(run(base), run(f"{base}; import nemo_hf")) for _ in range(rounds + 1)][1:]
    return {"transformers": statistics.median(a for a, _ in pairs), "added": statistics.median(b - a for a, b in pairs)}


def main() -> None:
    """Measures all parts, or those that are asked for."""
    parts: dict[str, Callable[[int], object]] = {
        "import": import_seconds,
        "cut on load, ViT-S": lambda rounds: [cut_on_load(kept) for kept in KEPT],
        "extraction, ViT-S": extraction_seconds,
        "extraction memory, ViT-L": lambda rounds: [
            json.loads(fresh_process(__file__, "--extract", str(kept))) for kept in KEPT
        ],
        "relevance, ViT-S/4": lambda rounds: relevance_pass(lambda: vit(384, 12, 6), images, 64, rounds),
        "relevance, MiniLM": lambda rounds: relevance_pass(minilm, texts, 32, rounds),
        "relevance, 1,000 groups over 10": pass_by_groups,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--parts", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--extract", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    if given.extract:
        print_extraction_memory(given.extract)
        return
    output = compact.RESULTS / "relevance.json"
    about = {"command": "python examples/benchmarks/relevance.py", "rounds": given.rounds}
    for name in given.parts:
        found = parts[name](given.rounds)
        print(name, json.dumps(found), flush=True)
        stored = compact.load(output)
        machines, rows = compact.stamped(stored, found if isinstance(found, list) else [found])
        own = {name: rows if isinstance(found, list) else rows[0]}
        compact.write(output, {**about, **stored, "made_with": machines, **own})


if __name__ == "__main__":
    main()
