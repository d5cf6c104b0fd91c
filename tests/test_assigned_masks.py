"""Assigned masks: what each group keeps, that parents are the plain model, and how their modules are trained."""

import copy
import itertools
import math
from contextlib import ExitStack
from functools import cache, partial

import pytest
import torch
from conftest import LABELS, build, fresh, image_samples, randomize, text_samples, tiny
from torch.nn import functional as F
from training_helpers import SAMPLES, arguments, batch_of, without_dropout
from transformers import Trainer, TrainerCallback

from nemo_hf import NeMoConfig, NeMoForImageClassification, NeMoTrainer, compute_relevance, make_parent
from nemo_hf.evaluation.groups import format_groups, measure_groups
from nemo_hf.neurons.assignment import assign_neurons
from nemo_hf.neurons.sites import AttentionSite
from nemo_hf.pruning.plan import is_relevant, module_masks
from nemo_hf.training.assigned_modules import taught_loss

ASSIGNED = {"masks": "assigned", "retention_target": 0.4, "plain_ratio": 0.0}
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}


def assigned_parent(family="vit", **options):
    parent = make_parent(without_dropout(build(family)), NeMoConfig(**{**ASSIGNED, **options}))
    compute_relevance(parent, [batch_of(SAMPLES[family](20, 5))], show_progress=False)
    return parent


def relevance_of(parent):
    return {key: table.clone() for key, table in parent.masks.relevance().items()}


@cache
def source_sites(family):
    if family == "resnet":
        return make_parent(randomize(tiny("ResNetForImageClassification", **STAGES))).sites
    return make_parent(fresh(family)).sites


def drawn_scores(sites, groups):
    generator = torch.Generator().manual_seed(groups)
    return {site.key: torch.rand(groups, site.neurons, generator=generator) for site in sites}


@pytest.mark.parametrize("family", ["vit", "bert", "llama", "gpt2", "resnet"])
@pytest.mark.parametrize(("groups", "retention", "core_share"), [(5, 0.4, 0.5), (2, 0.25, 0.0), (7, 0.3, 1.0)])
def test_each_group_keeps_its_share_of_each_part(family, groups, retention, core_share):
    sites = source_sites(family)
    assigned = assign_neurons(sites, drawn_scores(sites, groups), retention, core_share)
    for site in sites:
        share = math.sqrt(retention) if site.kind == "conv" else retention
        parts = is_relevant(assigned[site.key], 0.5).split(list(site.parts.values()), -1)
        for name, table in zip(site.parts, parts, strict=True):
            heads = 1
            if isinstance(site, AttentionSite):
                heads = site.query_key_heads if name == "query_key" else site.key_value_heads
            for head in table.view(groups, heads, -1).unbind(1):
                kept = max(1, round(share * head.shape[1]))
                assert head.sum(-1).tolist() == [kept] * groups
                assert head.all(0).sum() >= min(kept, round(core_share * kept))
                private = kept - min(kept, round(core_share * kept))
                if private and groups * private <= head.shape[1] - (kept - private):
                    assert head.sum(0).unique().tolist() in ([1, groups], [0, 1, groups], [0, 1], [1])


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_a_higher_threshold_keeps_the_first_of_the_same_neurons(family):
    sites = source_sites(family)
    assigned = assign_neurons(sites, drawn_scores(sites, 3), 0.6, 0.5)
    for site in sites:
        table = assigned[site.key]
        kept = [is_relevant(table, threshold) for threshold in (0.5, 0.75, 1.0)]
        assert all((large | ~small).all() for large, small in itertools.pairwise(kept))
        assert kept[-1].any(-1).all()
        assert (kept[0] == (table > 0)).all()
        if site.kind != "attention":  # whose heads are small here
            whole, half = (each.sum(-1) for each in kept[:2])
            assert (half - whole / 2).abs().max() <= 2  # a neuron of the core and one of the group's own more


def test_the_core_is_best_on_average_and_private_neurons_are_best_for_their_group():
    sites = source_sites("vit")
    site = next(site for site in sites if site.kind == "ffn")
    scores = {key: torch.ones_like(table) for key, table in drawn_scores(sites, 3).items()}
    own = torch.full((3, site.neurons), 1.0)
    own[:, :4] = 9.0
    for group in range(3):
        own[group, 4 + 4 * group : 8 + 4 * group] = 5.0
    assigned = assign_neurons(sites, {**scores, site.key: own}, 8 / site.neurons, 0.5)[site.key]
    for group in range(3):
        expected = [*range(4), *range(4 + 4 * group, 8 + 4 * group)]
        assert assigned[group].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("family", ["vit", "bert", "llama"])
def test_neurons_are_assigned_by_what_they_add_for_each_group(family):
    """Against mean squares of what the layers read and of q, sample by sample, times norms of weights."""
    plain = without_dropout(build(family)).eval()
    samples = batch_of((image_samples if family == "vit" else text_samples)(15))
    groups = {"even": [0, 2, 4], "odd": [1, 3]}
    parent = make_parent(copy.deepcopy(plain), NeMoConfig(**ASSIGNED, label_groups=groups))
    parts = [{name: value[rows] for name, value in samples.items()} for rows in (slice(6), slice(6, 15))]
    compute_relevance(parent, parts, show_progress=False)
    scores = {site.key: torch.zeros(2, site.neurons, dtype=torch.float64) for site in parent.sites}
    for index, label in enumerate(samples["labels"].tolist()):
        sample = {name: value[index : index + 1] for name, value in samples.items() if name != "labels"}
        for key, score in scores_of_sample(plain, parent.sites, sample).items():
            scores[key][label % 2] += score / (samples["labels"] % 2 == label % 2).sum()
    expected = assign_neurons(parent.sites, scores, ASSIGNED["retention_target"], 0.5)
    for key, table in relevance_of(parent).items():
        assert (table == expected[key]).float().mean() > 0.98, key  # but for near ties


def scores_of_sample(plain, sites, sample):
    """Mean squares over tokens times squared norms of the reading weights, of q times those that make k."""
    tokens = sample["attention_mask"][0].bool() if "attention_mask" in sample else slice(None)
    seen, scores = {}, {}
    with ExitStack() as stack, torch.no_grad():
        for path, layer in plain.named_modules():
            if isinstance(layer, torch.nn.Linear):
                keep = partial(lambda path, _, args, output: seen.update({path: (args[0], output)}), path)
                stack.callback(layer.register_forward_hook(keep).remove)
        plain(**sample)
    for site in sites:
        read = seen[site.output][0][0][tokens].double().square().mean(0)
        weights = plain.get_submodule(site.output).weight.double().square().sum(0)
        if site.kind == "attention":
            query = seen[site.query.layer][1][0][tokens].double().square().mean(0)
            key = plain.get_submodule(site.key_rows.layer).weight.double().square().sum(1)
            heads = site.key_value_heads
            read, weights, query = (each.view(heads, -1, site.head_dim).sum(1) for each in (read, weights, query))
            key = key.view(heads, site.head_dim)
            if site.is_rotary:
                query, key = (each.view(-1, 2, site.head_dim // 2).sum((0, 1)) for each in (query, key))
            read, weights = (torch.cat([a.flatten(), b.flatten()]) for a, b in ((query, read), (key, weights)))
        scores[site.key] = read * weights
    return scores


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_by_default_training_is_that_of_the_plain_model(family, tmp_path, caplog):
    samples, states = (image_samples if family == "vit" else text_samples)(60), []
    args = arguments(tmp_path, max_steps=5, per_device_train_batch_size=12)
    for kind in (Trainer, NeMoTrainer):  # with dropout
        trainer = kind(build(family), args, train_dataset=samples, eval_dataset=samples)
        trainer.train()
        states.append(trainer.model.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(states[1][f"model.{name}"], tensor), name
    parent = trainer.parent
    assert parent.config.relevance_source == "assigned"
    assert all((table == 0).any() for table in relevance_of(parent).values())
    module = trainer.extract_module(["cat", "dog"])
    assert module.config.extraction["distance"] <= module.config.extraction["cut_distance"]
    assert trainer.extract_module([0], retention=0.5).config.extraction["retention"] == 0.5
    assert trainer.evaluate_module(["cat", "dog"]).parameters == module.num_parameters()
    assert "No module was trained" not in caplog.text
    assert parent.extract_module([0]).config.extraction is None
    assert "No module was trained beside this parent" in caplog.text
    groups = measure_groups(parent, [batch_of(samples[:20])], show_progress=False)
    assert {key for group in groups.values() for key in group} == {"samples", "parent"}
    assert format_groups(groups).split()[:4] == ["label", "group", "samples", "parent"]


def test_training_a_parent_on_is_plain_too_and_assigns_its_neurons_anew(tmp_path):
    states, tables = [], []
    for kind in (Trainer, NeMoTrainer):
        trainer = kind(build("vit"), arguments(tmp_path), train_dataset=image_samples(40))
        for _ in range(2):
            trainer.train()
            tables += [relevance_of(trainer.parent)] if kind is NeMoTrainer else []
        states.append(trainer.model.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(states[1][f"model.{name}"], tensor), name
    assert any(not torch.equal(table, tables[1][key]) for key, table in tables[0].items())


def test_training_on_follows_a_new_size(tmp_path):
    parent = assigned_parent(plain_ratio=0.5, retention_target=0.25)
    config = NeMoConfig(**{**ASSIGNED, "plain_ratio": 0.5, "retention_target": 0.75})
    args = arguments(tmp_path, max_steps=4)
    trainer = NeMoTrainer(parent, args, train_dataset=image_samples(20), nemo_config=config)
    trainer.train()
    for site in parent.sites:
        kept = (parent.masks.relevance()[site.key] > 0).float().mean(-1)
        torch.testing.assert_close(kept, torch.full_like(kept, 0.75))


def test_labels_without_a_sample_get_a_module_once_there_are_some(tmp_path):
    samples = [sample for sample in image_samples(40) if sample["labels"] != 4]
    config = NeMoConfig(core_share=0.0, retention_target=0.24)
    trainer = NeMoTrainer(build("vit"), arguments(tmp_path), train_dataset=samples, nemo_config=config)
    trainer.train()
    units = relevance_of(trainer.parent)["vit.layers.0.mlp:ffn"] > 0
    assert units.sum(-1).tolist() == [12, 12, 12, 12, 0]
    assert units.sum(0).max() == 1  # those of no group are left to the others
    with pytest.raises(ValueError, match=r"'frog'.*call compute_relevance"):
        trainer.parent.extract_module(["frog"])
    compute_relevance(trainer.parent, [batch_of(image_samples(20))], show_progress=False)
    assert trainer.parent.config.unseen_labels is None
    trainer.parent.extract_module(["frog"])


def test_a_threshold_measures_a_cut_by_relevance_which_warns_once(tmp_path, caplog):
    samples = image_samples(20)
    trainer = NeMoTrainer(build("vit"), arguments(tmp_path), train_dataset=samples, eval_dataset=samples)
    trainer.train()
    report = trainer.evaluate_module([0, 1], threshold=0.75)
    assert report.threshold == 0.75
    assert report.controls["random"] is not None
    assert caplog.text.count("No module was trained") == 1


class StepRecorder(TrainerCallback):
    def __init__(self, seen):
        self.seen = seen

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})


def test_training_is_plain_until_neurons_are_assigned(tmp_path):
    samples, states = image_samples(60), []
    for kind, options in (
        (Trainer, {}),
        (NeMoTrainer, {"nemo_config": NeMoConfig(**{**ASSIGNED, "plain_ratio": 0.5})}),
    ):
        args = arguments(tmp_path, max_steps=6, per_device_train_batch_size=12)
        trainer = kind(without_dropout(build("vit")), args, train_dataset=samples, **options)
        states.append([])
        trainer.add_callback(StepRecorder(states[-1]))
        trainer.train()
    plain, nemo = states
    for step in range(3):  # the order of the samples is the plain trainer's, too
        for name, tensor in plain[step].items():
            assert torch.equal(nemo[step][f"model.{name}"], tensor), name
    assert any(not torch.allclose(nemo[4][f"model.{name}"], tensor) for name, tensor in plain[4].items())
    tables = [{key: value for key, value in state.items() if key.endswith("relevance")} for state in nemo]
    assert all((value == 255).all() for table in tables[:3] for value in table.values())
    assert all(torch.equal(value, tables[3][key]) for table in tables[4:] for key, value in table.items())
    assert all((value == 0).any() for value in tables[3].values())


@pytest.mark.parametrize("family", ["vit", "bert", "llama"])
def test_a_parent_answers_as_the_whole_network_and_its_modules_are_exact(family):
    plain = without_dropout(build(family))
    samples = (image_samples if family == "vit" else text_samples)(6)
    batch = {name: value for name, value in batch_of(samples).items() if name != "labels"}
    with torch.no_grad():
        expected = plain(**batch).logits
        parent = make_parent(copy.deepcopy(plain), NeMoConfig(**ASSIGNED)).eval()
        compute_relevance(parent, [batch_of(samples)], show_progress=False)
        assert torch.equal(parent(**batch).logits, expected)
        assert torch.equal(parent.train()(**batch).logits, expected)
        module = parent.eval().extract_module([3, 1])
        static = module_masks(parent.masks, torch.tensor([1, 3]), 0.5)
        masked = parent(**batch, static_masks=static).logits[:, [3, 1]]
        torch.testing.assert_close(module(**batch).logits, masked, rtol=1e-4, atol=1e-5)
    assert module.config.equivalence["status"] == "verified"


def test_files_keep_the_assignment(tmp_path):
    parent = assigned_parent()
    parent.save_pretrained(tmp_path)
    loaded = NeMoForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.relevance_source == "assigned"
    for key, table in relevance_of(parent).items():
        assert torch.equal(loaded.masks.relevance()[key], table)
    module = NeMoForImageClassification.from_pretrained(tmp_path, labels=[1, 0])
    assert torch.equal(
        module(**batch_of(image_samples(4)[:2])).logits,
        parent.eval().extract_module([1, 0])(**batch_of(image_samples(4)[:2])).logits,
    )


@pytest.mark.parametrize("specificity", [0.0, 0.3])
def test_the_loss_of_a_module_is_that_of_a_loop_over_samples(specificity):
    generator = torch.Generator().manual_seed(0)
    logits, taught_by = (torch.randn(9, 5, generator=generator) for _ in range(2))
    labels, in_module = torch.tensor([0, 1, 2, 3, 4, 0, -100, 1, 2]), torch.tensor([True, False, True, True, False])
    own, others = [], []
    for answers, target, label in zip(logits, taught_by, labels.tolist(), strict=True):
        if label >= 0 and in_module[label]:
            own.append(F.cross_entropy(answers[in_module], target[in_module].softmax(-1)).item())
        elif label >= 0:
            others.append(F.cross_entropy(answers, torch.full((5,), 0.2)).item())
    found = taught_loss(logits, taught_by, labels, in_module, specificity)
    assert found.item() == pytest.approx(sum(own) / len(own) + specificity * sum(others) / len(others), rel=1e-5)
    several = taught_loss(logits, taught_by, torch.ones(9, 5, dtype=torch.bool), in_module, specificity)
    expected = F.binary_cross_entropy_with_logits(logits[:, in_module], taught_by[:, in_module].sigmoid())
    assert several.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_a_step_is_the_task_and_a_taught_module_on_half_of_the_samples(family, tmp_path):
    samples = (image_samples if family == "vit" else text_samples)(10)
    parent = assigned_parent(family, specificity_weight=0.3)
    before = copy.deepcopy(parent).train()
    args = arguments(tmp_path, per_device_train_batch_size=10, max_steps=1)
    trainer = NeMoTrainer(parent, args, train_dataset=samples, nemo_config=parent.nemo_config)
    drawn = []
    draw = trainer._rehearsed_groups
    trainer._rehearsed_groups = lambda: drawn.append(draw()) or drawn[-1]
    trainer.train()
    logged = trainer.state.log_history[0]
    with torch.no_grad():
        loaded = next(iter(trainer.get_train_dataloader()))  # the same seed draws the same order
        labels = loaded.pop("labels")
        whole = before(**loaded).logits
        in_module = torch.isin(torch.arange(len(LABELS)), drawn[0])
        order = sorted(range(10), key=lambda index: not in_module[labels[index]])[:5]
        half = {name: value[order] for name, value in loaded.items()}
        losses = []
        for size in (1, 0.5, 0.25):
            module = before(**half, static_masks=module_masks(before.masks, drawn[0], 1 - 0.5 * size)).logits
            losses.append(taught_loss(module, whole[order], labels[order], in_module, 0.3).item())
    taught = min(losses, key=lambda loss: abs(loss - logged["nemo/loss_module"]))
    assert logged["nemo/loss_task"] == pytest.approx(F.cross_entropy(whole, labels).item(), rel=1e-4)
    assert logged["nemo/loss_module"] == pytest.approx(taught, rel=1e-4)
    assert logged["loss"] == pytest.approx(F.cross_entropy(whole, labels).item() + taught, rel=1e-4)


def test_training_leaves_the_assignment_and_reports_coupling(tmp_path):
    parent = assigned_parent(core_share=0.5)
    before = relevance_of(parent)
    trainer = NeMoTrainer(
        parent, arguments(tmp_path, max_steps=4), train_dataset=image_samples(20), eval_dataset=image_samples(20, 1)
    )
    trainer.train()
    for key, table in relevance_of(trainer.parent).items():
        assert torch.equal(table, before[key])
    assert trainer.parent.config.relevance_source == "assigned"
    found = trainer.evaluate_modularity()
    kept = torch.cat([table > 0 for table in before.values()], -1)
    pairs = [(kept[a] & kept[b]).sum() / (kept[a] | kept[b]).sum() for a in range(5) for b in range(5) if a != b]
    assert found["cohesion"] == 1
    assert min(pairs) <= found["coupling"] <= max(pairs)
    report = trainer.evaluate_module([0, 1])
    assert report.controls["random"] is not None


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path):
    def trained(resume=None):
        args = arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=1)
        model, config = without_dropout(build("vit")), NeMoConfig(**{**ASSIGNED, "plain_ratio": 0.5})
        trainer = NeMoTrainer(model, args, train_dataset=image_samples(40), nemo_config=config)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.parent.config.relevance_source == "assigned"
        return trainer.parent.state_dict()

    whole = trained()
    for step in (2, 3, 4):  # before, at and after the assignment
        resumed = trained(str(tmp_path / f"checkpoint-{step}"))
        for name, tensor in whole.items():
            assert torch.equal(tensor, resumed[name]), (step, name)


def test_the_whole_network_keeps_its_own_norm_statistics(tmp_path):
    def model():
        return randomize(tiny("ResNetForImageClassification", **STAGES))

    samples = image_samples(20)
    args = arguments(tmp_path, max_steps=1, learning_rate=0.0)
    plain = Trainer(model(), args, train_dataset=samples)
    plain.train()
    nemo = NeMoTrainer(model(), args, train_dataset=samples, nemo_config=NeMoConfig(**ASSIGNED))
    nemo.train()
    expected = dict(plain.model.named_buffers())
    own = {name.removeprefix("model."): value for name, value in nemo.parent.named_buffers()}
    assert any("running_mean" in name for name in expected)
    for name, value in expected.items():
        torch.testing.assert_close(own[name], value)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"retention_target": None}, "without retention_target"),
        ({"objective": "moda"}, "objective='moda' for assigned masks"),
        ({"hard_masks": False}, "hard_masks=False"),
        ({"core_share": 1.5}, "core_share=1.5"),
        ({"plain_ratio": -0.1}, "plain_ratio=-0.1"),
        ({"contrastive_weight": 0.3, "warmup_ratio": 0.2}, r"NeMoConfig\(masks='generated', contrastive_weight=0.3"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        NeMoConfig(**{**ASSIGNED, **options})


def test_a_loss_of_ones_own_trains_the_whole_network(tmp_path):
    called = []

    def own(outputs, labels, num_items_in_batch=None):
        called.append(len(labels))
        return F.cross_entropy(outputs.logits, labels)

    samples, args = image_samples(20), arguments(tmp_path, max_steps=2)
    parents = []
    for options in ({}, {"compute_loss_func": own}):
        trainer = NeMoTrainer(assigned_parent(specificity_weight=0.2), args, train_dataset=samples, **options)
        trainer.train()
        parents.append(trainer.parent.state_dict())
    assert called == [20, 20]
    for name, tensor in parents[0].items():
        torch.testing.assert_close(tensor, parents[1][name], msg=name)


def test_a_cut_by_relevance_keeps_assigned_channels_alone(tmp_path):
    model = randomize(tiny("ResNetForImageClassification", **STAGES))
    trainer = NeMoTrainer(
        model, arguments(tmp_path), train_dataset=image_samples(60), nemo_config=NeMoConfig(**ASSIGNED)
    )
    trainer.train()
    module = trainer.extract_module([0], retention=0.4, scores="relevance", reconstruct=False, show_progress=False)
    kept = {entry["key"]: sum(entry["kept"]) for entry in module.config.sites}
    masks = module_masks(trainer.parent.masks, torch.tensor([0]), 0.5)
    assert all(count <= masks[key].sum() for key, count in kept.items())
    mended = trainer.extract_module([0], retention=0.4, scores="relevance", show_progress=False)
    assert mended.config.extraction["distance"] < mended.config.extraction["cut_distance"]
