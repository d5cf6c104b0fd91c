"""Scores of neurons equal naive loops over samples; budgets keep within the weights that they are given."""

import copy
import functools

import pytest
import torch
from conftest import build, fresh, generated, parent_of, randomize, tiny
from cutting_helpers import assert_same_weights, batches_for, cut, seen_by
from torch.nn import functional as F

from nemo_hf import extract_module, make_parent
from nemo_hf.neurons.sites import AttentionSite
from nemo_hf.pruning.budget import kept_share, layer_operations, layer_weights, plan_budget
from nemo_hf.pruning.layer_edits import layer_weight
from nemo_hf.pruning.scores import activity_scores, fisher_scores, magnitude_scores, relevance_scores
from nemo_hf.pruning.statistics import measure_sites

STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}
WIDE = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 512}
SOURCES = ["bert", "vit", "gpt2", "llama", "albert", "swin", "resnet"]


@functools.cache
def resnet():
    parent = make_parent(randomize(tiny("ResNetForImageClassification", **STAGES)), generated())
    return parent.detach_masks(), parent.sites


def source_of(name):
    """A plain model and its sites."""
    return copy.deepcopy(resnet()) if name == "resnet" else (fresh(name), parent_of(name).sites)


def samples_for(name, count=12):
    return batches_for("vit" if name == "resnet" else name, count, size=5)


def measured(model, sites, batches):
    return activity_scores(model, sites, measure_sites(model, sites, batches))


def spread_out(values, owners, neurons):
    """Sums of values over what belongs to each neuron; `owners` are numbers of neurons."""
    total = torch.zeros(neurons, dtype=torch.float64)
    for value, owner in zip(values.tolist(), owners.long().tolist(), strict=True):
        total[owner] += value
    return total


@torch.no_grad()
@pytest.mark.parametrize("name", SOURCES)
def test_activity_is_what_neurons_add_to_the_layers_that_read_them(name):
    model, sites = source_of(name)
    batches = samples_for(name)
    read, made = seen_by(model, batches)
    for site, (key, found) in zip(sites, measured(model, sites, batches).items(), strict=True):
        assert site.key == key
        numbers, values = torch.arange(site.neurons).double(), torch.zeros(site.neurons).double()
        for path in site.readers:
            weight, rows = layer_weight(model.get_submodule(path)), read[path].double()
            inputs = range(weight.shape[1])
            added = torch.stack([rows[:, i].square().mean() * weight[:, i].square().sum() for i in inputs])
            values += spread_out(added, site.input_scale(path, numbers), site.neurons)
        if isinstance(site, AttentionSite):
            count = site.parts["query_key"]
            of_query, of_key = (
                made[rows.layer].double()[:, rows.indices(torch.arange(rows.size))]
                for rows in (site.query, site.key_rows)
            )
            squares = spread_out(of_query.square().mean(0), site.part_mask("query", numbers), count)
            spreads = spread_out(of_key.var(0, correction=0), site.part_mask("key", numbers), count)
            values[:count] = squares * spreads
        torch.testing.assert_close(torch.cat([*found.values()]), values, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("labels", [[3, 1], [2]], ids=str)
@pytest.mark.parametrize("name", SOURCES)
def test_fisher_is_the_mean_squared_gradient_of_masks_by_sample(name, labels):
    model, sites = source_of(name)
    batches = samples_for(name, 6)
    expected = {site.key: torch.zeros(site.neurons).double() for site in sites}
    for batch in batches:
        for row in range(len(next(iter(batch.values())))):
            masks = {site.key: torch.ones(site.neurons, requires_grad=True) for site in sites}
            logits = masked_logits(model, sites, masks, {name: value[row : row + 1] for name, value in batch.items()})
            logits = logits[:, labels] if len(labels) > 1 else logits
            loss = F.cross_entropy(logits, logits.detach().argmax(-1))
            for key, gradient in zip(masks, torch.autograd.grad(loss, [*masks.values()]), strict=True):
                expected[key] += gradient.double().square()
    found = fisher_scores(model, sites, batches, labels)
    for key, scores in found.items():
        assert expected[key].max() > 0
        torch.testing.assert_close(torch.cat([*scores.values()]), expected[key], rtol=1e-3, atol=1e-7)


def masked_logits(model, sites, masks, inputs):
    """Logits under masks that multiply q, and all other neurons where they are read."""
    handles = []
    for site in sites:
        mask = masks[site.key]
        for path in site.readers:
            scale = site.input_scale(path, mask)
            is_image = isinstance(model.get_submodule(path), torch.nn.Conv2d)
            scale = scale[:, None, None] if is_image else scale
            hook = lambda layer, args, scale=scale: (args[0] * scale, *args[1:])  # noqa: E731
            handles.append(model.get_submodule(path).register_forward_pre_hook(hook))
        if isinstance(site, AttentionSite):
            first = site.query.indices(torch.arange(site.query.size))
            whole = torch.ones(site.query.layer_outputs).index_copy(0, first, site.part_mask("query", mask))
            hook = lambda layer, args, output, scale=whole: output * scale  # noqa: E731
            handles.append(model.get_submodule(site.query.layer).register_forward_hook(hook))
    try:
        return model(**inputs).logits
    finally:
        for handle in handles:
            handle.remove()


def test_magnitude_is_the_norm_of_what_makes_a_neuron_times_that_of_what_reads_it():
    model, sites = source_of("bert")
    scores = magnitude_scores(model, sites)
    layer = model.bert.encoder.layer[1]
    norms = {
        name: [row.norm().item() ** 2 for row in weight]
        for name, weight in {
            "query": layer.attention.self.query.weight, "key": layer.attention.self.key.weight,
            "value": layer.attention.self.value.weight, "read": layer.attention.output.dense.weight.T,
            "up": layer.intermediate.dense.weight, "down": layer.output.dense.weight.T,
        }.items()
    }  # fmt: skip
    products = {
        ("attention", "query_key"): ("query", "key"), ("attention", "value"): ("value", "read"),
        ("ffn", "intermediate"): ("up", "down"),
    }  # fmt: skip
    for (kind, part), (made, read) in products.items():
        (own,) = (scores[site.key][part] for site in sites if site.kind == kind and ".1" in site.key)
        expected = [first * second for first, second in zip(norms[made], norms[read], strict=True)]
        assert own.tolist() == pytest.approx(expected, rel=1e-5)


def test_relevance_orders_neurons_and_activity_breaks_ties():
    model, sites = source_of("vit")
    activity = measured(model, sites, samples_for("vit"))
    relevance = {site.key: torch.arange(site.neurons, dtype=torch.uint8) // 4 for site in sites}
    scores = relevance_scores(sites, relevance, activity)
    for site in sites:
        places = relevance[site.key].long()
        own, ties = (torch.cat([*found[site.key].values()]) for found in (scores, activity))
        offset = 0
        for size in site.parts.values():
            part = range(offset, offset + size)
            expected = sorted(part, key=lambda place: (places[place].item(), ties[place].item()))
            assert sorted(part, key=lambda place: own[place].item()) == expected
            offset += size


def real_weights(model, module, sites):
    """Weights of the layers that sites name: those of a module over those of its source."""
    paths = {path for site in sites for path in (*site.readers, *(rows.layer for rows, _ in site.produced()))}
    counts = [sum(whole.get_submodule(path).weight.numel() for path in paths) for whole in (module.model, model)]
    return counts[0] / counts[1]


@pytest.mark.parametrize("name", SOURCES)
def test_a_module_keeps_that_share_of_the_weights_and_never_nothing(name):
    model, sites = source_of(name)
    shares = [0.001, 0.1, 0.25, 0.5, 0.75, 1.0]
    modules = cut(model, samples_for(name), shares, labels=range(5), reconstruct=False)
    found = [real_weights(model, module, sites) for module in modules]
    smallest = found[0]
    for share, module, own in zip(shares, modules, found, strict=True):
        assert own == pytest.approx(module.config.extraction["weights"])
        assert own <= max(share, smallest) + 1e-9
        assert own > share - 0.15
        assert module.config.extraction["retention"] == share
        assert all(entry["kept"][-1] > 0 for entry in module.config.sites)
    assert found == sorted(found)
    assert found[-1] == 1


@pytest.mark.parametrize("name", SOURCES)
def test_operations_are_products_with_weights_of_all_positions(name):
    model, sites = source_of(name)
    batch = samples_for(name)[0]
    _, made = seen_by(model, [{k: v for k, v in batch.items() if k != "attention_mask"}])
    for path, found in layer_operations(model, sites, batch).items():
        rows = made[path]
        assert found == len(rows) * rows.shape[1] * layer_weight(model.get_submodule(path))[0].numel()


@pytest.mark.parametrize("cost", ["weights", "operations"])
def test_of_channels_with_equal_scores_the_cheaper_stay(cost):
    model, sites = source_of("resnet")
    scores = {
        site.key: {part: torch.logspace(0, -3, size).double() for part, size in site.parts.items()} for site in sites
    }
    costs = (
        layer_weights(model, sites) if cost == "weights" else layer_operations(model, sites, samples_for("resnet")[0])
    )
    plan = plan_budget(model, sites, scores, costs, 0.3)
    found = []
    for site in sites:
        paths = {*site.readers, *(rows.layer for rows, _ in site.produced())}
        kept = sum(len(kept) for kept in plan[site.key].values()) / site.neurons
        found.append((sum(costs[path] for path in paths) / site.neurons, kept))
    found.sort()
    shares = [kept for _, kept in found]
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[-1] < shares[0]


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_unit_of_a_layer_does_not_matter(scale):
    model, sites = source_of("resnet")
    scores = measured(model, sites, samples_for("resnet"))
    other = {**scores, sites[0].key: {part: scale * score for part, score in scores[sites[0].key].items()}}
    plans = [plan_budget(model, sites, each, layer_weights(model, sites), 0.4) for each in (scores, other)]
    torch.testing.assert_close(plans[0], plans[1], rtol=0, atol=0)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("cost", ["weights", "operations"])
@pytest.mark.parametrize("name", ["bert", "llama", "swin", "resnet"])
def test_budgets_hold_for_any_scores(name, seed, cost):
    model, sites = source_of(name)
    generator = torch.Generator().manual_seed(seed)
    scores = {
        site.key: {part: torch.rand(size, generator=generator).double() ** 6 for part, size in site.parts.items()}
        for site in sites
    }
    inputs = samples_for(name)[0]
    costs = layer_weights(model, sites) if cost == "weights" else layer_operations(model, sites, inputs)
    smallest = kept_share(model, sites, costs, plan_budget(model, sites, scores, costs, 1e-9))
    for retention in (0.05, 0.3, 0.77):
        plan = plan_budget(model, sites, scores, costs, retention)
        assert retention - 0.15 <= kept_share(model, sites, costs, plan) <= max(retention, smallest)
        for site in sites:
            for part, kept in plan[site.key].items():
                assert kept.tolist() == sorted(set(kept.tolist())) != []
                assert 0 <= kept.min() <= kept.max() < site.parts[part]


@pytest.mark.parametrize("retention", [0.1, 0.3, 0.6])
def test_cuts_to_widths_of_fast_products_are_exact_and_within_the_budget(retention):
    model = randomize(tiny("BertForSequenceClassification", num_hidden_layers=1, **WIDE))
    module = cut(model, batches_for("bert"), retention, reconstruct=False)
    assert module.config.equivalence["status"] == "verified"
    assert 0.9 * retention < module.config.extraction["weights"] <= retention
    for site in module.config.sites:
        width = site["widths"].get("intermediate", 0)
        assert all(width % grain == 0 for grain in (2, 4, 8, 16) if width >= 16 * grain)
        assert site["widths"].get("head_dim", 4) in (1, 2, *range(4, 33, 4))


def test_several_retentions_give_the_modules_that_single_calls_give():
    model = fresh("bert")
    batches = batches_for("bert")
    several = cut(model, batches, [0.5, 0.2])
    assert isinstance(several, list)
    for module, share in zip(several, (0.5, 0.2), strict=True):
        assert_same_weights(module, cut(model, batches, share))


@pytest.mark.parametrize("scores", ["activity", "fisher", "magnitude"])
def test_every_score_gives_exact_cuts(scores):
    model = build("bert", seed=2)
    module = cut(model, batches_for("bert"), scores=scores, reconstruct=False)
    assert module.config.equivalence["status"] == "verified"
    assert module.config.extraction["scores"] == scores


def test_targets_say_what_is_cut():
    model, batches = fresh("bert"), batches_for("bert")
    module = extract_module(model, [0, 1], batches, 0.3, nemo_config=generated(targets=["ffn"]), show_progress=False)
    assert module.model.bert.encoder.layer[0].attention.self.query.weight.shape == (32, 32)
    assert module.model.bert.encoder.layer[0].intermediate.dense.out_features < 16


@pytest.mark.parametrize("retention", [0.1, 0.2, 0.3, 0.5, 0.7])
def test_what_is_too_little_for_wider_heads_goes_to_feed_forward_parts(retention):
    module = cut(fresh("vit"), batches_for("vit", 16), retention, reconstruct=False)
    per_layer = 4 * 32 * 32 + 2 * 32 * 48
    two_neurons = 2 * 2 * 32 / per_layer  # in each layer; a further dimension of each head is four times as much
    assert 0 <= retention - module.config.extraction["weights"] < two_neurons
