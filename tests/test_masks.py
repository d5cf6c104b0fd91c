"""Neuron masks: one per sample, removed without a trace, with gradients, and bound to the call that runs."""

import copy
import gc
import weakref

import pytest
import torch
from conftest import SIZES, fresh, generated, hooks_of, logits_of, random_static, randomize_relevance, tiny
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification
from transformers.initialization import no_init_weights

from nemo_hf import nemo_loss
from nemo_hf.models.attach import attach_masks
from nemo_hf.neurons.mask_hooks import MaskGenerator
from nemo_hf.neurons.masks import build_masks, default_rank, untied_parameters
from nemo_hf.neurons.patterns import find_sites
from nemo_hf.neurons.sites import FeedForwardSite, Rows
from nemo_hf.neurons.trial_inputs import random_inputs

LABELS = torch.tensor([0, 0, 1, 1])


def parent_of(model, **options):
    """A parent whose masks differ from sample to sample and are closed for about half of the neurons."""
    parent = attach_masks(model, generated(**{"generator_rank": 16, "static_evaluation": False, **options}))
    torch.manual_seed(0)
    for mask in parent.masks.site_masks():
        for parameter in mask.generator.parameters():
            nn.init.normal_(parameter, std=0.7)
    return parent


def masks_of(parent, **inputs) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return parent(**inputs, output_neuron_masks=True).neuron_masks


def generator_gradients(parent) -> list[torch.Tensor | None]:
    return [p.grad for name, p in parent.named_parameters() if ".generator." in name]


def random_tokens(samples: int, length: int) -> torch.Tensor:
    return torch.randint(5, 120, (samples, length), generator=torch.Generator().manual_seed(0))


def bart(**options):
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    tokens = {"vocab_size": 120, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    return tiny("BartForSequenceClassification", **sizes, **heads, **tokens, **options)


@pytest.mark.parametrize(("hidden", "budget"), [(192, 0.10), (320, 0.10), (384, 0.06), (512, 0.06)])
def test_the_default_rank_is_the_largest_within_the_budget(hidden, budget):
    config = ViTConfig(hidden_size=hidden, intermediate_size=4 * hidden, num_attention_heads=hidden // 64)
    config.image_size, config.patch_size = 32, 4
    with torch.device("meta"):
        model = ViTForImageClassification(config)
        sites, base = find_sites(model), model.num_parameters()
        for rank, fits in ((default_rank(sites, base), True), (default_rank(sites, base) + 1, False)):
            masks = build_masks(sites, generated(generator_rank=rank), base, 5)
            assert (sum(p.numel() for p in masks.parameters()) <= budget * base) == fits
    assert {mask.generator.down.out_features for mask in masks.site_masks()} == {rank}
    assert (default_rank(sites, 10), default_rank(sites, 10**12)) == (1, 64)


def test_parameters_are_counted_alike_before_and_after_tying():
    tied = bart()
    with no_init_weights():
        untied = type(tied)(tied.config)
    assert untied.num_parameters() > tied.num_parameters()
    assert untied_parameters(untied) == untied_parameters(tied) == tied.num_parameters()


def test_a_mask_is_the_formula_in_0_to_1_under_autocast_too():
    torch.manual_seed(0)
    generator, pooled = MaskGenerator(5, 3, 7), torch.randn(4, 5)
    nn.init.normal_(generator.up.bias)
    hidden = F.relu(pooled @ generator.down.weight.T + generator.down.bias)
    mask = generator(pooled)
    torch.testing.assert_close(mask, F.relu(torch.tanh(hidden @ generator.up.weight.T + generator.up.bias)))
    assert mask.min() == 0
    assert mask.max() < 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(generator(pooled), mask)  # float32 as well: dtypes count


def test_attached_masks_change_nothing_until_they_close_and_detached_ones_leave_the_plain_model(family):
    plain, reference = fresh(family), fresh(family)
    parent = attach_masks(fresh(family), generated())
    assert not parent.training
    assert all(torch.equal(r, torch.full_like(r, 255)) and len(r) == 5 for r in parent.masks.relevance().values())
    inputs = random_inputs(parent)
    expected = logits_of(reference, **inputs)
    assert all((mask > 0).all() for mask in masks_of(parent, **inputs).values())
    assert torch.equal(logits_of(parent, **inputs, output_neuron_masks=True), expected)
    parent = parent_of(plain, static_evaluation=True)
    assert not torch.equal(logits_of(parent, **inputs, output_neuron_masks=True), expected)
    assert torch.equal(logits_of(parent, **inputs), expected)  # static masks of a parent that was never trained
    assert parent.detach_masks() is plain
    torch.testing.assert_close(plain.state_dict(), reference.state_dict(), rtol=0, atol=0)
    assert torch.equal(logits_of(plain, **inputs), expected)
    assert hooks_of(plain) == 0


def test_no_layer_is_skipped_at_random():
    """A layer that LayerDrop skips would have no masks in that step."""
    options = dict.fromkeys(("encoder_layerdrop", "decoder_layerdrop"), 0.9)
    model = bart(**options)
    parent = attach_masks(model, generated()).train()
    for config in (parent.model.config, parent.config.base_config):
        assert [getattr(config, option) for option in options] == [0.0, 0.0]
    assert {layer.layerdrop for layer in model.modules() if hasattr(layer, "layerdrop")} == {0.0}
    inputs = random_inputs(parent)
    for _ in range(3):
        assert set(parent(**inputs).neuron_masks) == {site.key for site in parent.sites}


def test_the_base_model_runs_only_inside_its_parent_or_with_masks_disabled(vit):
    reference, parent = copy.deepcopy(vit), parent_of(vit)
    inputs = random_inputs(parent)
    own, plain = logits_of(parent, **inputs), logits_of(reference, **inputs)

    def assert_refused():
        with pytest.raises(RuntimeError, match=r"^Got a call of the base model .*\. Call parent\(.*masks\.disabled"):
            parent.model(**inputs)

    assert_refused()
    with parent.masks.disabled():
        with parent.masks.disabled():
            assert torch.equal(logits_of(parent, **inputs), plain)
        assert torch.equal(logits_of(parent.model, **inputs), plain)
    assert_refused()
    with pytest.raises(ValueError, match="size"):  # a call that fails leaves no state open
        parent(pixel_values=torch.zeros(2, 3, 20, 20))
    assert_refused()
    assert torch.equal(logits_of(parent, **inputs), own)


# One mask per sample


def test_each_sample_has_masks_of_its_own_for_each_call_of_a_layer(family):
    parent = parent_of(fresh(family))
    inputs = random_inputs(parent)
    together = masks_of(parent, **inputs)
    calls = 2 if family == "albert" else 1
    shapes = {site.key: ((4, calls, site.neurons), torch.float32) for site in parent.sites}
    assert {key: (tuple(mask.shape), mask.dtype) for key, mask in together.items()} == shapes
    assert all(calls == 1 or not torch.equal(mask[:, 0], mask[:, 1]) for mask in together.values())
    assert any(not torch.allclose(mask[0], mask[3], atol=1e-3) for mask in together.values())
    for sample in range(4):  # whatever the rest of the batch is
        alone = masks_of(parent, **{name: value[sample : sample + 1] for name, value in inputs.items()})
        for key, mask in together.items():
            torch.testing.assert_close(alone[key], mask[sample : sample + 1], atol=1e-5, rtol=0)


def wav2vec2():
    sizes = {**SIZES, "num_hidden_layers": 1, "conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2]}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    norms = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
    return tiny("Wav2Vec2ForSequenceClassification", **sizes, **positions, **norms)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "recording"])
def test_padding_changes_no_mask(name):
    parent = parent_of(wav2vec2() if name == "recording" else fresh(name))
    values, padding = (torch.randn(2, 400), 400) if name == "recording" else (random_tokens(3, 6), 5)
    given = {parent.main_input_name: values, "attention_mask": torch.ones(values.shape, dtype=torch.long)}
    padded = {key: F.pad(value, (0, padding)) for key, value in given.items()}
    torch.testing.assert_close(masks_of(parent, **padded), masks_of(parent, **given), atol=1e-4, rtol=0)


def test_only_admitted_tokens_are_pooled(bert):
    parent = parent_of(bert)
    for shape in ((2, 1, 5, 5), (5,)):
        with pytest.raises(ValueError, match=r"^Got an attention mask of shape .*; expected \(batch, tokens\), since"):
            parent(input_ids=torch.ones(2, 5, dtype=torch.long), attention_mask=torch.ones(shape))
    masks = parent.masks
    mask = next(mask for mask in masks.site_masks() if mask.site.kind == "ffn")
    hidden = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    with masks.call(2, torch.tensor([[1, 0, 0, 0], [0, 1, 1, 1]]), None, None):
        expected = torch.stack([hidden[0, 0], (hidden[1, 1] + hidden[1, 2] + hidden[1, 3]) / 3])
        torch.testing.assert_close(mask._pool(masks.calls.get(), hidden), expected)
    with masks.call(2, torch.zeros(2, 6), None, None):
        assert torch.equal(mask._pool(masks.calls.get(), hidden), torch.zeros(2, 32))  # no token is admitted: no 0 / 0
    with masks.call(2, torch.tensor([[1, 0] * 6, [0, 1] * 6]), None, None):  # the layer sees every other token
        pooled = torch.stack([hidden[0].mean(0), torch.zeros(32)])
        torch.testing.assert_close(mask._pool(masks.calls.get(), hidden), pooled)
    with masks.call(2, None, None, None):  # windows of a sample follow each other
        torch.testing.assert_close(mask._pool(masks.calls.get(), hidden.view(6, 2, 32)), hidden.mean(1))


class WithPositions(nn.Module):
    """A feed-forward part that is called on samples, and on relative positions that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.down(self.up(each).relu()) for each in (positions, hidden, positions))


@pytest.mark.parametrize("pruning_mode", ["dense", "scatter-gated"])
def test_what_belongs_to_no_sample_is_not_masked_and_the_order_of_layers_is_checked(pruning_mode):
    model = WithPositions()
    site = FeedForwardSite("block", "up", 4, "down", producers=(Rows("up", 0, 6),), pruning_mode=pruning_mode)
    masks = build_masks([site], generated(generator_rank=2), 10**5, 2)
    hidden, positions = torch.randn(4, 3, 4), torch.randn(7, 4)
    expected = model(hidden, positions)
    static = (torch.rand(4, 6) < 0.5).float()
    opened = torch.stack([model.up(sample) * mask for sample, mask in zip(hidden, static, strict=True)]).relu()
    masks.attach(model)
    with torch.no_grad(), masks.call(4, None, {site.key: static}, None) as collected:
        before, masked, after = model(hidden, positions)
    assert torch.equal(before, expected[0])
    assert torch.equal(after, expected[2])
    assert len(collected[site.key]) == 1
    torch.testing.assert_close(masked, opened @ model.down.weight.T + model.down.bias)
    model = WithPositions()
    site = FeedForwardSite("block", "down", 6, "up", producers=(Rows("down", 0, 4),))  # the wrong way round
    masks = build_masks([site], generated(generator_rank=2), 10**5, 2)
    masks.attach(model)
    with masks.call(4, None, None, None), pytest.raises(RuntimeError, match=r"^Got a call .* before its input 'down'"):
        model(hidden, positions)


def test_a_feed_forward_part_in_chunks_has_the_same_masks():
    whole = fresh("bert")
    chunked = BertForSequenceClassification(BertConfig(**{**whole.config.to_dict(), "chunk_size_feed_forward": 3}))
    chunked.load_state_dict(whole.state_dict())
    attention_mask = (torch.arange(12) < torch.tensor([[12], [7], [4]])).long()
    inputs = {"input_ids": random_tokens(3, 12), "attention_mask": attention_mask, "output_neuron_masks": True}
    expected, got = (parent_of(model.eval())(**inputs) for model in (whole, chunked))
    torch.testing.assert_close(got.logits, expected.logits)
    torch.testing.assert_close(got.neuron_masks, expected.neuron_masks)


# What masks do


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "swin"])
@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
def test_the_forward_sees_hard_or_soft_masks(family, hard):
    parent = parent_of(fresh(family), hard_masks=hard)
    inputs = random_inputs(parent)
    soft = {key: mask[:, 0] for key, mask in masks_of(parent, **inputs).items()}
    binary = {key: (mask > 0).float() for key, mask in soft.items()}
    same, other = (binary, soft) if hard else (soft, binary)
    logits = logits_of(parent, **inputs)
    assert torch.equal(logits_of(parent, **inputs, static_masks=same), logits)
    assert not torch.allclose(logits_of(parent, **inputs, static_masks=other), logits, atol=1e-3)


@pytest.mark.parametrize("family", ["vit", "albert", "swin"])
def test_static_masks_reach_the_samples_named_and_may_differ_by_sample(family):
    parent = parent_of(fresh(family))
    inputs, first, second = random_inputs(parent), random_static(parent), random_static(parent, seed=1)
    own, one, other = (logits_of(parent, **inputs, static_masks=static) for static in (None, first, second))
    named = torch.tensor([True, False, False, True])
    mixed = logits_of(parent, **inputs, static_masks=first, static_samples=named)
    torch.testing.assert_close(mixed[~named], own[~named])
    torch.testing.assert_close(mixed[named], one[named])
    assert not torch.allclose(own[named], one[named], atol=1e-3)
    stacked = {key: torch.stack([first[key], second[key], first[key], second[key]]) for key in first}
    got = logits_of(parent, **inputs, static_masks=stacked)
    torch.testing.assert_close(got[::2], one[::2])
    torch.testing.assert_close(got[1::2], other[1::2])


# Gradients


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
def test_the_task_alone_and_the_mask_terms_alone_reach_every_generator(family, hard):
    parent = parent_of(fresh(family), hard_masks=hard)
    outputs = parent(**random_inputs(parent), labels=LABELS, output_neuron_masks=True)
    mask_terms = nemo_loss(outputs.logits.detach(), LABELS, outputs.neuron_masks, LABELS, 1.0, 1.0)
    for loss in (outputs.loss, mask_terms):
        parent.zero_grad()
        loss.backward(retain_graph=True)
        gradients = generator_gradients(parent)
        assert len(gradients) == 4 * len(parent.sites)
        assert all(gradient is not None and gradient.any() for gradient in gradients)


def test_mask_terms_move_what_the_generators_watch_unless_detached():
    for detached in (True, False):
        parent = parent_of(fresh("vit"), detach_pooled=detached)
        outputs = parent(**random_inputs(parent), output_neuron_masks=True)
        nemo_loss(outputs.logits.detach(), LABELS, outputs.neuron_masks, LABELS, 1.0, 0.0).backward()
        first = parent.model.vit.layers[0]
        assert any(p.grad is not None and p.grad.any() for p in first.parameters()) != detached


def test_gradients_of_generators_under_static_and_under_hard_masks(vit):
    parent = parent_of(vit)
    inputs, masks = random_inputs(parent), masks_of(parent, **random_inputs(parent))
    outputs = parent(**inputs, labels=LABELS, static_masks=random_static(parent), output_neuron_masks=True)
    first, last = parent.sites[0].key, parent.sites[3].key
    assert torch.equal(outputs.neuron_masks[first], masks[first])
    outputs.loss.backward()  # parameters without a gradient would stop distributed training
    assert all(gradient is not None and not gradient.any() for gradient in generator_gradients(parent))
    parent(**inputs, labels=LABELS).loss.backward()
    # At the last site, closed units have no gradient, and open ones that of the value that reads them.
    gradient = parent.get_parameter("masks.3.generator.up.bias").grad
    assert torch.equal(gradient != 0, (masks[last][:, 0] > 0).any(0))


def test_reentrant_activation_checkpointing_is_refused(bert):
    # Its first pass runs without gradients, so that masks would get none.
    with pytest.raises(ValueError, match="Pass use_reentrant=False"):
        parent_of(bert).activation_checkpointing_enable({"use_reentrant": True})


# Copies, memory and dtypes


@pytest.mark.parametrize("family", ["gpt2", "swin"])
def test_a_copy_uses_its_own_generators_and_can_be_detached_alone(family):
    parent = parent_of(fresh(family))
    inputs = random_inputs(parent)
    loss = parent(**inputs, labels=LABELS, output_neuron_masks=True).loss
    copied = copy.deepcopy(parent)  # between forward and backward: the copy has no graph
    loss.backward()
    assert all(parameter.grad is None for parameter in copied.parameters())
    before = logits_of(parent, **inputs)
    assert torch.equal(logits_of(copied, **inputs), before)
    for mask in copied.masks.site_masks():
        nn.init.constant_(mask.generator.up.bias, -50.0)
    assert all(not mask.any() for mask in masks_of(copied, **inputs).values())
    with copied.masks.disabled():
        assert torch.equal(logits_of(parent, **inputs), before)
    parent.zero_grad()
    copied(**inputs, labels=LABELS).loss.backward()
    assert all(parameter.grad is None for parameter in parent.parameters())
    assert hooks_of(copied.detach_masks()) == 0
    assert torch.equal(logits_of(parent, **inputs), before)


@pytest.mark.parametrize(("family", "checkpointed"), [("vit", 0), ("bert", 1), ("albert", 0), ("llama", 1)])
def test_nothing_keeps_a_graph_alive(family, checkpointed):
    parent = parent_of(fresh(family)).train()
    if checkpointed:
        parent.activation_checkpointing_enable()
    alive = []

    def mark(generator, inputs, output):
        output.grad_fn.metadata["mark"] = marker = nn.Module()  # lives as long as the graph
        alive.append(weakref.ref(marker))

    for mask in parent.masks.site_masks():
        mask.generator.register_forward_hook(mark)
    outputs = parent(**random_inputs(parent), labels=LABELS)
    first_pass = len(alive)
    assert first_pass >= len(parent.sites)
    assert all(reference() is not None for reference in alive)
    outputs.loss.backward()
    assert (len(alive) > first_pass) == checkpointed
    del outputs
    gc.collect()
    assert [reference() for reference in alive if reference() is not None] == []


@pytest.mark.parametrize("family", ["albert", "llama", "swin"])
def test_masks_are_float32_in_a_model_of_bfloat16(family):
    parent = parent_of(fresh(family)).to(torch.bfloat16)
    inputs = {name: v.bfloat16() if v.is_floating_point() else v for name, v in random_inputs(parent).items()}
    outputs = parent(**inputs, labels=LABELS, output_neuron_masks=True)
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.logits.isfinite().all()
    assert {mask.dtype for mask in outputs.neuron_masks.values()} == {torch.float32}
    assert {relevance.dtype for relevance in parent.masks.relevance().values()} == {torch.uint8}
    outputs.loss.backward()
    assert all(gradient.isfinite().all() for gradient in generator_gradients(parent))


# Parents in eval mode


@pytest.mark.parametrize(("family", "hard"), [("vit", True), ("vit", False), ("llama", True)])
def test_in_eval_mode_hard_masks_are_those_of_the_module_of_all_labels(family, hard):
    parent = parent_of(fresh(family), static_evaluation=True, relevance_threshold=0.9, hard_masks=hard).eval()
    randomize_relevance(parent)
    union = {key: (table.amax(0) >= round(0.9 * 255)).float() for key, table in parent.masks.relevance().items()}
    inputs = random_inputs(parent)
    by_sample, static = (
        logits_of(parent, **inputs, **given) for given in ({"output_neuron_masks": True}, {"static_masks": union})
    )
    assert not torch.allclose(static, by_sample, atol=1e-4)
    assert torch.equal(logits_of(parent, **inputs), static if hard else by_sample)
    if hard:
        module = parent.extract_module(list(range(parent.config.num_labels)))
        torch.testing.assert_close(logits_of(module, **inputs), static, atol=1e-5, rtol=0)
    # Otherwise they are those of the samples. These models have no dropout.
    assert torch.equal(logits_of(parent.train(), **inputs), by_sample)
    parent.eval().nemo_config.static_evaluation = False
    assert torch.equal(logits_of(parent, **inputs), by_sample)
