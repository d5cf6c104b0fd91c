"""Least-squares reconstruction equals naive regressions, one layer after another; modules come near their source."""

import copy
import gc
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import NAMES, example_script, fresh
from cutting_helpers import assert_same_weights, batches_for, cut, seen_by
from torch import nn
from torch.nn import functional as F

from nemo_hf.models import held_out_reconstruction
from nemo_hf.neurons.sites import ChannelSite
from nemo_hf.pruning import reconstruct
from nemo_hf.pruning.partial_runs import PartialRuns
from nemo_hf.pruning.reconstruct import NormalEquations, Reconstruction

RIDGE = 0.01


def ridge_change(features, wanted, ridge=RIDGE):
    """What ridge regression changes weights by, in float64: rows of zeros stand for the ridge."""
    features, wanted = features.double(), wanted.double()
    count = features.shape[1]
    ridge = ridge * max(1.0, count / len(features)) * features.square().sum(0).mean()
    rows = torch.cat([features, ridge.sqrt() * torch.eye(count).double()])
    return torch.linalg.lstsq(rows, torch.cat([wanted, wanted.new_zeros(count, wanted.shape[1])])).solution


@pytest.mark.parametrize(("rows", "is_scarce"), [(200, False), (12, False), (11, True), (3, True)])
def test_normal_equations_are_ridge_regression_however_the_rows_come(rows, is_scarce):
    torch.manual_seed(0)
    features, wanted, target = torch.randn(rows, 12).double(), torch.randn(rows, 5).double(), torch.randn(rows, 5)
    solved = []
    for size in (rows, 7, 1):
        equations = NormalEquations(12, 5, torch.device("cpu"))
        for parts in zip(features.split(size), wanted.split(size), target.split(size), strict=True):
            equations.add(*parts)
        solved.append(equations.solve(RIDGE))
    expected = ridge_change(features, wanted)
    variance = (target.double() - target.double().mean(0)).square().sum()
    for change, error in solved:
        torch.testing.assert_close(change, expected)
        assert error.before == pytest.approx((wanted.square().sum() / variance).item())
        assert error.after == pytest.approx(((features @ change - wanted).square().sum() / variance).item())
        assert error.after <= error.before
        assert error.is_scarce == is_scarce
        assert error.ridge == pytest.approx(RIDGE * max(1, 12 / rows))


class Convolutions(nn.Module):
    """Two convolutions and a head."""

    def __init__(self, width, **options):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3), nn.Conv2d(width, 4, **options)
        self.head = nn.Linear(4, 3)

    def forward(self, pixel_values, return_dict=True):
        read = self.second(self.first(pixel_values).relu())
        return SimpleNamespace(logits=self.head(read.relu().mean((2, 3))))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 1, "bias": False},
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": (2, 3), "padding": "same", "dilation": (1, 2)},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (3, 1), "dilation": 2, "padding": (2, 1), "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": (1, 2)},
    ],
    ids=str,
)
@torch.no_grad()
def test_a_convolution_is_fitted_on_its_patches(options):
    torch.manual_seed(0)
    kept, label_ids = torch.tensor([0, 2, 5]), torch.tensor([2, 0])
    source, module = Convolutions(6, **options).eval(), Convolutions(3, **options).eval()
    state = source.state_dict()
    state |= {name: state[name][kept] for name in ("first.weight", "first.bias")}
    state["second.weight"] = state["second.weight"][:, kept]
    module.head = nn.Linear(4, 2)
    module.load_state_dict(state | {name: state[name][label_ids] for name in ("head.weight", "head.bias")})
    site = ChannelSite("", "first", 3, "second", channels=6, size=6, producers=("first",), read_by=(("second", 6),))
    images = torch.randn(20, 3, 9, 9)
    read, wanted = module.first(images).relu(), source.second(source.first(images).relu())
    expected = naive_convolution(module.second, read, wanted)
    batches = [(index, {"pixel_values": part}) for index, part in enumerate(images.split(6))]
    plan = {site.key: {"channels": kept}}
    errors = Reconstruction(source, module, [site], plan, {"head": label_ids}, batches).run(RIDGE)
    assert list(errors) == ["second", "head"]
    assert errors["second"].after < errors["second"].before
    torch.testing.assert_close(module.second.weight, expected[0], rtol=1e-4, atol=1e-5)
    if module.second.bias is not None:
        torch.testing.assert_close(module.second.bias, expected[1], rtol=1e-4, atol=1e-5)


def naive_convolution(layer, read, wanted):
    """Weights and bias of a convolution, each patch cut out in a loop."""
    down, right = layer.dilation
    read = F.pad(read, padding_of(layer), mode=layer.padding_mode.replace("zeros", "constant"))
    rows = []
    for image in read:
        for top in range(wanted.shape[2]):
            for left in range(wanted.shape[3]):
                y, x = top * layer.stride[0], left * layer.stride[1]
                high, wide = layer.kernel_size
                rows.append(image[:, y : y + down * high : down, x : x + right * wide : right].flatten())
    features, weights = torch.stack(rows), layer.weight.flatten(1).mT
    said = features @ weights
    if layer.bias is not None:
        features = torch.cat([features, torch.ones(len(features), 1)], 1)
        said = said + layer.bias
    change = ridge_change(features, wanted.permute(0, 2, 3, 1).flatten(0, 2) - said)
    change, bias = (change[:-1], change[-1]) if layer.bias is not None else (change, torch.zeros(1))
    weight = (weights + change).mT.reshape(layer.weight.shape).float()
    return weight, layer.bias if layer.bias is None else (layer.bias + bias).float()


def padding_of(layer):
    """Of left, right, top and bottom; with "same" what is over comes last."""
    if layer.padding != "same":
        return [layer.padding[1]] * 2 + [layer.padding[0]] * 2
    high, wide = (step * (size - 1) for step, size in zip(layer.dilation, layer.kernel_size, strict=True))
    return [wide // 2, wide - wide // 2, high // 2, high - high // 2]


ENCODERS = {"bert": "bert.encoder.layer", "vit": "vit.layers"}


def fit(source, raw, module, batches, path, stream=None):
    """Fits one layer of a module to the stream that it joins in the source, or to its own results in the source."""
    of_source, of_module = seen_by(source, batches), seen_by(module, batches)
    if stream is None:  # the rows of weights are those of the source, heads in other bases
        target, reached = raw.get_submodule(path)(of_source[0][path]).detach(), of_module[1][path]
    else:
        target, reached = stream(*of_source), stream(*of_module)
    features = of_module[0][path]
    change = ridge_change(torch.cat([features, torch.ones(len(features), 1)], 1), target - reached, RIDGE)
    layer = module.get_submodule(path)
    layer.weight.data += change[:-1].mT.float()
    layer.bias.data += change[-1].float()


def read_by(path):
    return lambda read, made: read[path]


def naive_reconstruction(family, source, raw, batches):
    """Fits the layers of a module from the first one that reads neurons on, and says how many."""
    module = copy.deepcopy(raw)
    paths, streams = [], {}
    for index in range(2):
        block = f"{ENCODERS[family]}.{index}"
        if family == "bert":  # norms read the stream
            projections = [f"{block}.attention.self.{name}" for name in ("query", "key", "value")]
            output, middle, last = f"{block}.attention.output", f"{block}.intermediate.dense", f"{block}.output"
            streams |= {f"{path}.dense": read_by(f"{path}.LayerNorm") for path in (output, last)}
            paths += [*projections, f"{output}.dense", middle, f"{last}.dense"]
        else:
            projections = [f"{block}.attention.{name}_proj" for name in "qkv"]
            output, middle, last = (f"{block}.{name}" for name in ("attention.o_proj", "mlp.fc1", "mlp.fc2"))
            streams[output] = read_by(f"{block}.layernorm_after")
            streams[last] = lambda read, made, block=block: made[block]
            paths += [*projections, output, middle, last]
    paths += ["bert.pooler.dense", "classifier"] if family == "bert" else ["classifier"]
    for path in paths[3:]:
        fit(source, raw.model, module.model, batches, path, streams.get(path))
    return module, len(paths[3:])


@pytest.mark.parametrize("family", ENCODERS)
def test_reconstruction_is_one_regression_after_another(family):
    source, batches = fresh(family), batches_for(family)
    raw, module = cut(source, batches, reconstruct=False), cut(source, batches)
    naive, count = naive_reconstruction(family, source, raw, batches)
    assert_same_weights(module, naive, rtol=1e-4, atol=1e-4)
    layers = module.config.extraction["layers"]
    assert len(layers) == count
    assert all(after <= before for before, after in layers.values())


@pytest.mark.parametrize("family", ["bert", "gpt2", "swin"])
def test_a_module_is_the_same_whether_blocks_are_remembered_or_not(family, monkeypatch):
    source, batches = fresh(family), batches_for(family)
    modules = []
    for runs in (PartialRuns, partial(PartialRuns, most_bytes=0), partial(PartialRuns, most_bytes=20_000),
                 lambda model, blocks: PartialRuns(model, [])):  # fmt: skip
        monkeypatch.setattr(reconstruct, "PartialRuns", runs)
        modules.append(cut(source, batches))
    for module in modules[1:]:
        assert_same_weights(module, modules[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "vit", "llama"])
def test_neither_size_nor_order_of_batches_matter(family):
    source = fresh(family)
    modules = [
        cut(source, batches_for(family, 32, size=size)[::step], retention=0.4, batch_size=size)
        for size, step in ((16, 1), (16, -1), (1, 1), (7, 1))
    ]
    for module in modules[1:]:
        inputs = batches_for(family, 32, seed=1)
        for batch in inputs:
            torch.testing.assert_close(module(**batch).logits, modules[0](**batch).logits, rtol=1e-4, atol=1e-4)


def test_memory_does_not_grow_with_the_number_of_samples(monkeypatch):
    source, found = fresh("bert"), []
    monkeypatch.setattr(reconstruct, "PartialRuns", partial(PartialRuns, most_bytes=10_000))

    class Watched(Reconstruction):
        def run(self, *args, **options):
            own = {value.untyped_storage().data_ptr() for _, inputs in self.batches for value in inputs.values()}
            calls = []

            def count(*_):
                calls.append(0)
                if len(calls) == 2 * len(self.batches):  # trials aside, the last batch of the first layers
                    stores = [each.untyped_storage() for each in gc.get_objects() if type(each) is torch.Tensor]
                    sizes = {each.data_ptr(): each.nbytes() for each in stores}
                    found.append(sum(size for place, size in sizes.items() if place not in own))

            with self.module.bert.encoder.layer[1].output.dense.register_forward_hook(count):
                return super().run(*args, **options)

    monkeypatch.setattr(held_out_reconstruction, "Reconstruction", Watched)
    for count in (256, 1024):
        batches = batches_for("bert", count)
        read = sum(value.nbytes for batch in batches for value in batch.values())
        cut(source, batches)
        found[-1] -= (3 + 1 / 8) * read + 2 * count * 2 * 4  # given, read, sorted, held out; twice the source's answers
    assert found[1] <= found[0] + 10_000


NETWORKS = {  # model types of the benchmark's tiny models and their classes
    "mobilenet_v2": "MobileNetV2ForImageClassification",
    "t5": "T5ForSequenceClassification",
    "wav2vec2": "Wav2Vec2ForSequenceClassification",
    "falcon": "FalconForSequenceClassification",  # adds to the results of layers in place
    "phimoe": "PhimoeForSequenceClassification",  # a linear layer that returns a tuple
}
paper = example_script("paper", "models")
families, tiny_models = example_script("benchmarks", "families"), example_script("benchmarks", "tiny_models")


def assert_nearer(model):
    found = families.reconstruct(model, families.KINDS)
    assert found["refused"] is None
    assert found["reconstructed"] < found["raw"]


def test_a_reconstructed_module_is_nearer_to_its_source_on_fresh_inputs(family):
    assert_nearer(fresh(family))


@pytest.mark.parametrize("name", NETWORKS)
def test_so_is_one_of_other_architectures(name):
    assert_nearer(tiny_models.tiny_model(name, NETWORKS[name]))


@pytest.mark.parametrize("name", paper.ARCHITECTURES)
def test_so_is_one_of_plain_convolutional_networks(name):
    config = paper.PaperCNNConfig(architecture=name, width=4, **NAMES)
    torch.manual_seed(0)
    assert_nearer(paper.PaperCNNForImageClassification(config).eval())  # random weights of any size would close all


# No stream of the source is shared, those of some blocks, all.
@pytest.mark.parametrize(("family", "most"), [("vit", 0), ("vit", 30_000), ("bert", 2**29)])
def test_modules_that_share_what_the_source_says_are_those_cut_one_by_one(family, most, monkeypatch):
    monkeypatch.setattr("nemo_hf.pruning.reconstruct.SHARED_BYTES", most)
    runs = []
    collect = Reconstruction._collect_targets
    monkeypatch.setattr(Reconstruction, "_collect_targets", lambda *args: (runs.append(1), collect(*args)))
    batches = batches_for(family, 80)
    together = cut(fresh(family), batches, [0.6, 0.3])
    shared = len(runs)
    for module, retention in zip(together, [0.6, 0.3], strict=True):
        assert_same_weights(module, cut(fresh(family), batches, retention))
    alone = len(runs) - shared
    assert (shared < alone) == (most > 0)
