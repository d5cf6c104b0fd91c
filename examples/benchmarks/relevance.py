"""What comes after training costs: relevance, extraction, loading, cutting on load, import.

    python examples/benchmarks/relevance.py

Each is measured beside what it is compared with, in turns in one process where it is a matter of time. Writes
relevance.json beside this script. Runs on one CPU thread, or on a GPU if there is one; about ten minutes on a CPU.
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

import torch
from safetensors import safe_open
from timing import MEBIBYTE, alternating, fresh_process, made_with, peak_memory, ratio
from training_step import images, minilm, texts, vit
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, set_seed
from transformers.utils import logging as transformers_logging

from nemo_hf import NeMoConfig, NeMoForImageClassification, compute_relevance, make_parent
from nemo_hf.models.base import NeMoPreTrainedModel
from nemo_hf.models.extraction import build_module, make_plan, read_tensor
from nemo_hf.models.files import write_json

HERE = Path(__file__).parent
KEPT = (0.5, 0.25)
"""Shares of the neurons that modules keep; relevance is drawn at random."""
BATCHES = 2


def device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parent_of(model: PreTrainedModel, kept: float = 0.5, **options) -> NeMoPreTrainedModel:
    """A parent with drawn relevance, of whose neurons every group opens about the share `kept`."""
    parent = make_parent(model, NeMoConfig(**options)).to(device()).eval()
    for mask in parent.masks.site_masks():
        mask.relevance.copy_((torch.rand(mask.relevance.shape) < kept).to(torch.uint8) * 255)
    parent.config.relevance_source = "exact"
    return parent


def one_pass(build: Callable[[], PreTrainedModel], draw: Callable, batch: int, rounds: int) -> dict:
    """Relevance over some batches beside a plain pass over them."""
    set_seed(0)
    plain, parent = build().to(device()).eval(), parent_of(build())
    batches = [{name: value.to(device()) for name, value in draw(batch).items()} for _ in range(BATCHES)]

    @torch.no_grad()
    def evaluate() -> None:
        for inputs in batches:
            plain(**{name: value for name, value in inputs.items() if name != "labels"})

    seconds = alternating(
        {"plain": evaluate, "relevance": lambda: compute_relevance(parent, batches, show_progress=False)}, rounds
    )
    return ratio(seconds["relevance"], seconds["plain"])


def memory_by_samples() -> dict[str, float]:
    """Peak MiB of a pass over few and many samples, in a process each."""
    return {str(64 * count): float(fresh_process(__file__, "--batches", str(count))) for count in (2, 64)}


def print_memory(count: int) -> None:
    """Prints what `memory_by_samples` reads."""

    def build() -> Callable[[], object]:
        set_seed(0)
        parent = parent_of(vit(128, 6, 4))
        return lambda: compute_relevance(parent, (images(64) for _ in range(count)), show_progress=False)

    print(peak_memory(build, calls=1))


def by_groups(rounds: int) -> dict:
    """A pass of a small ViT of 1,000 labels in 1,000 groups over one in 10."""
    runs = {}
    for groups in (10, 1000):
        set_seed(0)
        config = ViTConfig(image_size=32, patch_size=4, hidden_size=128, num_hidden_layers=6, num_attention_heads=4,
                           intermediate_size=512, num_labels=1000)  # fmt: skip
        each = 1000 // groups
        named = {f"group {g}": list(range(g * each, g * each + each)) for g in range(groups)}
        parent = parent_of(ViTForImageClassification(config), label_groups=named)
        batches = [{**images(100), "labels": torch.arange(100) + 100 * start} for start in range(10)]
        runs[str(groups)] = lambda p=parent, b=batches: compute_relevance(p, b, show_progress=False)
    seconds = alternating(runs, rounds)
    return ratio(seconds["1000"], seconds["10"])


def extraction_seconds(rounds: int) -> dict:
    """Seconds to cut a module of three labels out of a ViT-S, without and with the equivalence check."""
    set_seed(0)
    parent = parent_of(vit(384, 12, 6), 0.25)
    plan = make_plan(parent, [0, 1, 2])

    def cut() -> None:
        build_module(type(parent), parent, plan, lambda name, own: read_tensor(parent.model.state_dict(), name, own))

    seconds = alternating({"cut": cut, "with the check": lambda: parent.extract_module([0, 1, 2])}, rounds)
    return {name: round(statistics.median(own), 3) for name, own in seconds.items()}


def extraction_memory(kept: float) -> dict[str, float]:
    """Peak memory of a ViT-L while a module is cut out of it, over that of its weights; in a process of its own."""
    return json.loads(fresh_process(__file__, "--peak", str(kept)))


def print_extraction_memory(kept: float) -> None:
    """Prints what `extraction_memory` reads."""
    config = ViTConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
                       num_labels=10)  # fmt: skip
    found = {}

    def build() -> Callable[[], object]:
        set_seed(0)
        parent = parent_of(ViTForImageClassification(config), kept)
        found["weights_mib"] = round(sum(p.numel() * p.element_size() for p in parent.parameters()) / MEBIBYTE, 1)
        return lambda: found.update(module=parent.extract_module([0]))

    found["peak_mib"] = peak_memory(build, calls=1)
    module = found.pop("module")
    found["module_mib"] = round(sum(p.numel() * p.element_size() for p in module.parameters()) / MEBIBYTE, 1)
    print(json.dumps(found))


class CountedFile:
    """A weight file that counts the bytes read from it."""

    read = 0

    def __init__(self, path: str | Path, **options) -> None:
        self._file = safe_open(path, **options)

    def __enter__(self) -> "CountedFile":
        self._file.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._file.__exit__(*raised)

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    @classmethod
    def counted(cls, tensor: torch.Tensor) -> torch.Tensor:
        """Counts a tensor."""
        cls.read += tensor.numel() * tensor.element_size()
        return tensor

    def get_tensor(self, name: str) -> torch.Tensor:
        """Reads a tensor."""
        return self.counted(self._file.get_tensor(name))

    def get_slice(self, name: str) -> "CountedSlice":
        """Opens a tensor to read parts of it."""
        return CountedSlice(self._file.get_slice(name))


class CountedSlice:
    """A tensor of a `CountedFile`."""

    def __init__(self, lazy) -> None:
        self._lazy = lazy

    def __getattr__(self, name: str):
        return getattr(self._lazy, name)

    def __getitem__(self, index) -> torch.Tensor:
        return CountedFile.counted(self._lazy[index])


def cutting_on_load(kept: float) -> dict:
    """Bytes that cutting a module on load reads of a ViT-S, and bytes of the module's own file; seconds of both."""
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        parent = parent_of(vit(384, 12, 6), kept)
        parent.save_pretrained(f"{folder}/parent")
        parent.extract_module([0]).save_pretrained(f"{folder}/module")
        CountedFile.read = 0
        with patch("nemo_hf.models.files.safe_open", CountedFile):
            start = time.perf_counter()
            NeMoForImageClassification.from_pretrained(f"{folder}/parent", labels=[0])
            cutting = time.perf_counter() - start
        start = time.perf_counter()
        NeMoForImageClassification.from_pretrained(f"{folder}/module")
        loading = time.perf_counter() - start
        own = Path(folder, "module", "model.safetensors").stat().st_size
        whole = Path(folder, "parent", "model.safetensors").stat().st_size
    return {"kept": kept, "parent_bytes": whole, "module_bytes": own, "read_bytes": CountedFile.read,
            "ratio": round(CountedFile.read / own, 4), "seconds_cutting": round(cutting, 3),
            "seconds_loading_module": round(loading, 3)}  # fmt: skip


def import_seconds(rounds: int) -> dict[str, float]:
    """Seconds that importing nemo_hf adds to what a training script imports anyway."""
    base = "import transformers; from transformers import Trainer, AutoModelForImageClassification, AutoTokenizer"

    def run(code: str) -> float:
        clock = f"import time; start = time.perf_counter()\n{code}\nprint(time.perf_counter() - start)"
        found = subprocess.run([sys.executable, "-c", clock], check=True, capture_output=True, text=True)  # noqa: S603
        return float(found.stdout.splitlines()[-1])

    alone, both = zip(*[(run(base), run(f"{base}; import nemo_hf")) for _ in range(rounds + 1)][1:], strict=True)
    return {"transformers": round(statistics.median(alone), 3), "with nemo_hf": round(statistics.median(both), 3),
            "added": round(statistics.median(b - a for a, b in zip(alone, both, strict=True)), 3)}  # fmt: skip


def main() -> None:
    """Measures everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=HERE / "relevance.json")
    parser.add_argument("--parts", nargs="+", help="Measure these again, by their names in the result.")
    parser.add_argument("--peak", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    if options.peak:
        print_extraction_memory(options.peak)
        return
    if options.batches:
        print_memory(options.batches)
        return
    found: dict[str, object] = {}
    parts: dict[str, Callable[[], object]] = {
        "import seconds": lambda: import_seconds(options.rounds),
        "cut on load, ViT-S": lambda: [cutting_on_load(kept) for kept in KEPT],
        "seconds of extraction, ViT-S": lambda: extraction_seconds(options.rounds),
        "memory of extraction, ViT-L": lambda: [{"kept": kept, **extraction_memory(kept)} for kept in KEPT],
        "peak MiB by samples": memory_by_samples,
        "pass, ViT-S/4": lambda: one_pass(lambda: vit(384, 12, 6), images, 64, options.rounds),
        "pass, MiniLM": lambda: one_pass(minilm, texts, 32, options.rounds),
        "pass, 1,000 groups over 10": lambda: by_groups(options.rounds),
    }
    for name in options.parts or parts:
        found[name] = parts[name]()
        print(name, json.dumps(found[name]), flush=True)
    before = json.loads(options.output.read_text()) if options.parts and options.output.exists() else {}
    made = {**made_with("relevance", ["--rounds", str(options.rounds)]), "rounds": options.rounds}
    write_json(options.output, {**before, **made, **found})


if __name__ == "__main__":
    main()
