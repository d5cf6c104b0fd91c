"""Masks: open at first, one a sample, gone without a trace, and driven by the call that runs."""

import copy
import gc
import weakref

import pytest
import torch
from conftest import FAMILIES, NAMES, fresh, randomize_relevance
from torch import nn
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from nemo_hf import NeMoConfig, nemo_loss
from nemo_hf.models.attach import attach_masks
from nemo_hf.neurons.generators import MaskGenerator
from nemo_hf.neurons.masks import build_masks, default_rank, untied_parameters
from nemo_hf.neurons.patterns import find_sites
from nemo_hf.neurons.sites import AttentionSite, FeedForwardSite, Rows, with_pruning_modes
from nemo_hf.neurons.trial_inputs import random_inputs

TEXT_FAMILIES = ["bert", "distilbert", "roberta", "albert", "gpt2", "llama"]
LABELS = torch.tensor([0, 0, 1, 1])


def awake(model, seed: int = 0, **options):
    """A parent whose masks differ from sample to sample and are closed for about half of the neurons."""
    parent = attach_masks(model, NeMoConfig(**{"generator_rank": 16, "static_evaluation": False, **options}))
    torch.manual_seed(seed)
    for mask in parent.masks.site_masks():
        for parameter in mask.generator.parameters():
            nn.init.normal_(parameter, std=0.7)
    return parent


def masks_of(parent, **inputs) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return parent(**inputs, output_neuron_masks=True).neuron_masks


def logits_of(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def generator_gradients(parent) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in parent.named_parameters() if ".generator." in name}


def random_static(parent, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {site.key: (torch.rand(site.neurons, generator=generator) < 0.5).float() for site in parent.sites}


# Generators


def generator_share(model) -> tuple[float, float]:
    """Parameters of the generators over those of the model at the default rank, and at one rank more."""
    sites, base = find_sites(model), model.num_parameters()
    rank = default_rank(sites, base)
    with torch.device("meta"):
        counts = [
            sum(p.numel() for site in sites for p in MaskGenerator(site.in_features, r, site.neurons).parameters())
            for r in (rank, rank + 1)
        ]
    return counts[0] / base, counts[1] / base


def test_generators_of_tiny_models_take_at_most_a_tenth(plain):
    share, next_share = generator_share(plain)
    assert share <= 0.10 < next_share


@pytest.mark.parametrize(("hidden", "budget"), [(192, 0.10), (320, 0.10), (384, 0.06), (512, 0.06)])
def test_the_budget_is_tighter_from_384_up(hidden, budget):
    with torch.device("meta"):
        config = ViTConfig(hidden_size=hidden, intermediate_size=4 * hidden, num_attention_heads=hidden // 64)
        config.image_size, config.patch_size = 32, 4
        share, next_share = generator_share(ViTForImageClassification(config))
    assert share <= budget < next_share


def test_the_rank_is_never_below_1_nor_above_64():
    sites = find_sites(fresh("vit"))
    assert default_rank(sites, 10) == 1
    assert default_rank(sites, 10**12) == 64


def test_parameters_are_counted_alike_before_and_after_tying():
    config = BartConfig(vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32)  # fmt: skip
    tied = BartForSequenceClassification(config)
    with no_init_weights():
        untied = BartForSequenceClassification(config)
    assert untied.num_parameters() > tied.num_parameters()
    assert untied_parameters(untied) == untied_parameters(tied) == tied.num_parameters()


def test_the_rank_that_is_asked_for_is_taken(vit):
    masks = build_masks(find_sites(vit), NeMoConfig(generator_rank=3), vit.num_parameters(), 5)
    assert {mask.generator.down.out_features for mask in masks.site_masks()} == {3}
    assert all(torch.equal(r, torch.full_like(r, 255)) and len(r) == 5 for r in masks.relevance().values())


def test_a_mask_is_the_formula_in_0_to_1():
    torch.manual_seed(0)
    generator = MaskGenerator(5, 3, 7)
    nn.init.normal_(generator.up.bias)
    pooled = torch.randn(4, 5)
    hidden = F.relu(pooled @ generator.down.weight.T + generator.down.bias)
    expected = F.relu(torch.tanh(hidden @ generator.up.weight.T + generator.up.bias))
    mask = generator(pooled)
    torch.testing.assert_close(mask, expected)
    assert mask.min() == 0
    assert mask.max() < 1


def test_autocast_does_not_change_a_generator():
    torch.manual_seed(0)
    generator, pooled = MaskGenerator(5, 3, 7), torch.randn(4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(generator(pooled), generator(pooled.float()))
        mask = generator(pooled)
    assert mask.dtype == torch.float32
    assert torch.equal(mask, generator(pooled))


# Attaching


def test_a_new_parent_computes_what_the_plain_model_does(plain):
    reference = copy.deepcopy(plain)
    parent = attach_masks(plain)
    inputs = random_inputs(parent)
    assert all((mask > 0).all() for mask in masks_of(parent, **inputs).values())
    assert torch.equal(logits_of(parent, **inputs), logits_of(reference, **inputs))
    assert not parent.training


def test_detaching_leaves_the_plain_model(plain):
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    reference = copy.deepcopy(plain)
    parent = awake(plain)
    inputs = random_inputs(parent)
    assert not torch.equal(logits_of(parent, **inputs), logits_of(reference, **inputs))
    detached = parent.detach_masks()
    assert detached is plain
    assert list(detached.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in detached.state_dict().items())
    assert torch.equal(logits_of(detached, **inputs), logits_of(reference, **inputs))
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in detached.modules())


def test_a_model_in_training_stays_in_training(vit):
    assert attach_masks(vit.train()).training


@pytest.mark.parametrize("name", ["wav2vec2", "bart"])
def test_no_layer_is_skipped_at_random(name):
    """A layer that LayerDrop skips would have no masks in that step."""
    if name == "wav2vec2":
        model, dropped = wav2vec2(num_hidden_layers=2, layerdrop=0.9), ["layerdrop"]
    else:
        sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
        drops = {"encoder_layerdrop": 0.9, "decoder_layerdrop": 0.9}
        tokens = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
        model = BartForSequenceClassification(BartConfig(vocab_size=120, **sizes, **heads, **drops, **tokens, **NAMES))
        dropped = list(drops)
    parent = attach_masks(model).train()
    assert [getattr(parent.model.config, option) for option in dropped] == [0.0] * len(dropped)
    assert [getattr(parent.config.base_config, option) for option in dropped] == [0.0] * len(dropped)
    assert {layer.layerdrop for layer in model.modules() if hasattr(layer, "layerdrop")} <= {0.0}
    inputs, keys = random_inputs(parent), {site.key for site in parent.sites}
    for _ in range(3):
        assert set(parent(**inputs).neuron_masks) == keys


@pytest.mark.parametrize("targets", [["ffn"], ["attention"]])
def test_only_what_is_targeted_gets_masks(vit, targets):
    parent = awake(vit, targets=targets)
    assert {site.kind for site in parent.sites} == set(targets)
    assert {key.rpartition(":")[2] for key in masks_of(parent, **random_inputs(parent))} == set(targets)


def test_masks_leave_in_training_or_on_request(vit):
    parent = awake(vit)
    inputs = random_inputs(parent)
    assert parent(**inputs).neuron_masks is None
    assert parent(**inputs, output_neuron_masks=True).neuron_masks is not None
    parent.train()
    assert parent(**inputs).neuron_masks is not None
    assert parent(**inputs, output_neuron_masks=False).neuron_masks is None


def test_the_base_model_can_t_be_called_past_the_parent(plain):
    reference = copy.deepcopy(plain)
    parent = awake(plain)
    inputs = random_inputs(parent)
    with pytest.raises(RuntimeError, match=r"^Got a call of the base model .*; expected .*\. Call parent\(\.\.\.\)"):
        parent.model(**inputs)
    logits_of(parent, **inputs)
    with pytest.raises(RuntimeError, match=r"masks\.disabled"):
        parent.model(**inputs)
    with parent.masks.disabled():
        assert torch.equal(logits_of(parent.model, **inputs), logits_of(reference, **inputs))
        assert torch.equal(logits_of(parent, **inputs), logits_of(reference, **inputs))
    with pytest.raises(RuntimeError, match=r"masks\.disabled"):
        parent.model(**inputs)


def test_disabled_masks_may_be_disabled_again(vit):
    parent = awake(vit)
    inputs = random_inputs(parent)
    with parent.masks.disabled():
        expected = logits_of(parent.model, **inputs)
        with parent.masks.disabled():
            pass
        assert torch.equal(logits_of(parent.model, **inputs), expected)


def test_a_call_that_fails_leaves_no_state_open(vit):
    parent = awake(vit)
    inputs = random_inputs(parent)
    expected = logits_of(parent, **inputs)
    with pytest.raises(ValueError, match="size"):
        parent(pixel_values=torch.zeros(2, 3, 20, 20))
    with pytest.raises(RuntimeError, match=r"masks\.disabled"):
        parent.model(**inputs)
    assert torch.equal(logits_of(parent, **inputs), expected)


# One mask a sample


def test_a_sample_s_masks_don_t_depend_on_the_rest_of_its_batch(plain):
    parent = awake(plain)
    inputs = random_inputs(parent)
    together = masks_of(parent, **inputs)
    for sample in range(4):
        alone = masks_of(parent, **{name: value[sample : sample + 1] for name, value in inputs.items()})
        for key, mask in together.items():
            torch.testing.assert_close(alone[key], mask[sample : sample + 1], atol=1e-5, rtol=0)
    differs = [not torch.allclose(mask[0], mask[3], atol=1e-3) for mask in together.values()]
    assert any(differs)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_padding_changes_no_mask(family):
    parent = awake(fresh(family))
    ids = torch.randint(5, 120, (3, 6), generator=torch.Generator().manual_seed(0))
    masks = masks_of(parent, input_ids=ids, attention_mask=torch.ones_like(ids))
    padded = {"input_ids": F.pad(ids, (0, 5)), "attention_mask": F.pad(torch.ones_like(ids), (0, 5))}
    for key, mask in masks_of(parent, **padded).items():
        torch.testing.assert_close(mask, masks[key], atol=1e-5, rtol=0)


def wav2vec2(**options) -> Wav2Vec2ForSequenceClassification:
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=[16, 16],
        conv_kernel=[10, 3],
        conv_stride=[5, 2],
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        **NAMES,
        **options,
    )
    return Wav2Vec2ForSequenceClassification(config).eval()


def test_padding_changes_no_mask_of_a_recording():
    parent = awake(wav2vec2(num_hidden_layers=1))
    waves = torch.randn(2, 400)
    masks = masks_of(parent, input_values=waves, attention_mask=torch.ones(2, 400, dtype=torch.long))
    padded = {"input_values": F.pad(waves, (0, 400)), "attention_mask": (torch.arange(800) < 400).long().expand(2, -1)}
    for key, mask in masks_of(parent, **padded).items():
        torch.testing.assert_close(mask, masks[key], atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(2, 1, 5, 5), (2, 5, 5), (5,)])
def test_an_attention_mask_that_is_not_one_entry_a_token_is_refused(bert, shape):
    parent = awake(bert)
    ids = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"^Got an attention mask of shape .*; expected \(batch, tokens\), since"):
        parent(input_ids=ids, attention_mask=torch.ones(shape))


def fitted(attention_mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """What a site takes for the attention mask of its tokens."""
    masks = build_masks(find_sites(fresh("vit"), ["ffn"]), NeMoConfig(), 10**5, 2)
    return next(masks.site_masks())._fitted(attention_mask, tokens)


@pytest.mark.parametrize("given", [1, 4, 7, 12])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 12, 20])
def test_an_attention_mask_is_fitted_to_the_tokens_of_a_layer(given, tokens):
    attention_mask = (torch.rand(3, given, generator=torch.Generator().manual_seed(given)) < 0.5).long()
    expected = torch.zeros(3, tokens, dtype=torch.long)
    for token in range(tokens):
        if given >= tokens:  # a shortened sequence: the token that each one starts with
            expected[:, token] = attention_mask[:, token * given // tokens]
        elif token < given:  # a sequence that got more tokens at its end, which are none of the sample's
            expected[:, token] = attention_mask[:, token]
    assert torch.equal(fitted(attention_mask, tokens), expected)


def test_only_admitted_tokens_are_pooled():
    (site, *_), parent = find_sites(fresh("bert"), ["ffn"]), awake(fresh("bert"))
    mask = next(m for m in parent.masks.site_masks() if m.site.key == site.key)
    hidden = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    given = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    with parent.masks.call(2, given, None, None):
        pooled = mask._pooled(hidden)
    expected = torch.stack([(hidden[0, 0] + hidden[0, 1]) / 2, (hidden[1, 1] + hidden[1, 2] + hidden[1, 3]) / 3])
    torch.testing.assert_close(pooled, expected)
    with parent.masks.call(2, torch.zeros(2, 6), None, None):
        assert torch.equal(mask._pooled(hidden), torch.zeros(2, 32))  # no token is admitted: no 0 / 0
    with parent.masks.call(2, None, None, None):  # windows of a sample lie one after another
        torch.testing.assert_close(mask._pooled(hidden.view(6, 2, 32)), hidden.mean(1))


class WithPositions(nn.Module):
    """Feed-forward parts after another on samples, which are also called on what all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.down(self.up(each).relu()) for each in (positions, hidden, positions))


@pytest.mark.parametrize("pruning_mode", ["dense", "scatter-gated"])
def test_what_belongs_to_no_sample_is_not_masked(pruning_mode):
    # Layers that project hidden states and relative positions alike: rows of the latter are no samples.
    torch.manual_seed(0)
    model = WithPositions()
    site = FeedForwardSite("block", "up", 4, "down", producers=(Rows("up", 0, 6),), pruning_mode=pruning_mode)
    masks = build_masks([site], NeMoConfig(generator_rank=2), 10**5, 2)
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


def test_a_layer_that_runs_before_its_input_is_pooled_is_refused():
    model = WithPositions()
    site = FeedForwardSite("block", "down", 6, "up", producers=(Rows("down", 0, 4),))  # the wrong way round
    masks = build_masks([site], NeMoConfig(generator_rank=2), 10**5, 2)
    masks.attach(model)
    with (
        masks.call(4, None, None, None),
        pytest.raises(RuntimeError, match=r"^Got a call of a layer of the site 'block:ffn' before its input 'down'"),
    ):
        model(torch.randn(4, 3, 4), torch.randn(7, 4))


def test_the_masks_of_a_call_are_gone_when_it_returns(plain):
    parent = awake(plain)
    logits_of(parent, **random_inputs(parent))
    assert parent.masks.state.current == {}


def test_a_feed_forward_part_in_chunks_has_the_same_masks():
    whole = fresh("bert")
    config = BertConfig(**{**whole.config.to_dict(), "chunk_size_feed_forward": 3})
    chunked = BertForSequenceClassification(config).eval()
    chunked.load_state_dict(whole.state_dict())
    ids = torch.randint(5, 120, (3, 12), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(12) < torch.tensor([[12], [7], [4]])).long()}
    expected, got = (awake(model)(**inputs, output_neuron_masks=True) for model in (whole, chunked))
    torch.testing.assert_close(got.logits, expected.logits)
    for key, mask in expected.neuron_masks.items():
        torch.testing.assert_close(got.neuron_masks[key], mask)


def test_a_layer_that_is_called_twice_has_two_masks():
    parent = awake(fresh("albert"))
    masks = masks_of(parent, **random_inputs(parent))
    assert {key: tuple(mask.shape) for key, mask in masks.items()} == {
        site.key: (4, 2, site.neurons) for site in parent.sites
    }
    assert all(not torch.equal(mask[:, 0], mask[:, 1]) for mask in masks.values())


def test_masks_have_one_shape(plain):
    parent = awake(plain)
    masks = masks_of(parent, **random_inputs(parent))
    assert set(masks) == {site.key for site in parent.sites}
    for site in parent.sites:
        mask = masks[site.key]
        assert (mask.shape[0], mask.shape[2], mask.dtype) == (4, site.neurons, torch.float32)


def test_embeddings_are_inputs_too(bert):
    parent = awake(bert)
    ids = torch.randint(5, 120, (3, 6), generator=torch.Generator().manual_seed(0))
    embedded = bert.get_input_embeddings()(ids).detach()
    expected = logits_of(parent, input_ids=ids)
    torch.testing.assert_close(logits_of(parent, inputs_embeds=embedded), expected)
    torch.testing.assert_close(logits_of(parent, output_attentions=False, inputs_embeds=embedded), expected)


# What masks do


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "albert"])
@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
def test_the_forward_sees_hard_or_soft_masks(family, hard):
    parent = awake(fresh(family), hard_masks=hard)
    inputs = random_inputs(parent)
    masks = {key: mask[:, 0] for key, mask in masks_of(parent, **inputs).items()}
    values = {
        "hard": {key: (mask > 0).float() for key, mask in masks.items()},
        "soft": masks,
    }
    logits = logits_of(parent, **inputs)
    same, other = ("hard", "soft") if hard else ("soft", "hard")
    assert torch.equal(logits_of(parent, **inputs, static_masks=values[same]), logits)
    assert not torch.allclose(logits_of(parent, **inputs, static_masks=values[other]), logits, atol=1e-3)


def zero(layer, dim: str, closed: torch.Tensor) -> None:
    """Clears outputs (with their biases) or inputs of either kind of linear layer."""
    weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    if dim == "inputs":
        weight[:, closed] = 0.0
        return
    weight[closed] = 0.0
    if layer.bias is not None:
        layer.bias[closed] = 0.0


def test_a_closed_neuron_is_one_that_the_model_doesn_t_have(plain):
    reference = copy.deepcopy(plain)
    parent = attach_masks(plain)
    inputs, static = random_inputs(parent), random_static(parent)
    with torch.no_grad():
        for site in parent.sites:
            if isinstance(site, AttentionSite):
                closed = (site.part_mask("query", static[site.key]) == 0).nonzero().squeeze(-1)
                zero(reference.get_submodule(site.query.layer), "outputs", site.query.indices(closed))
            closed = (site.read_mask(static[site.key]) == 0).nonzero().squeeze(-1)
            zero(reference.get_submodule(site.output), "inputs", closed)
    got = logits_of(parent, **inputs, static_masks=static)
    torch.testing.assert_close(got, logits_of(reference, **inputs), atol=1e-5, rtol=0)
    assert not torch.allclose(got, logits_of(parent, **inputs), atol=1e-3)


@pytest.mark.parametrize("family", ["vit", "gpt2", "llama", "swin"])
def test_a_gated_parent_masks_all_that_is_produced(family):
    """Values and keys of a closed neuron are 0 where they are made, and logits those of the other pruning modes."""
    model = fresh(family)
    parent = attach_masks(model)
    inputs, static = random_inputs(parent), random_static(parent)
    expected = logits_of(parent, **inputs, static_masks=static)
    parent.set_sites(with_pruning_modes(parent.sites, {site.key: "scatter-gated" for site in parent.sites}))
    seen = {}

    def see(name):
        model.get_submodule(name).register_forward_hook(lambda layer, inputs, output: seen.update({name: output}))

    for name in {rows.layer for site in parent.sites for rows, _ in site.produced()}:
        see(name)
    torch.testing.assert_close(logits_of(parent, **inputs, static_masks=static), expected, atol=1e-5, rtol=0)
    for site in parent.sites:
        for rows, part in site.produced():
            own = seen[rows.layer].index_select(-1, rows.indices(torch.arange(rows.size))).flatten(0, -2)
            is_open = site.part_mask(part, static[site.key]) > 0
            assert not own[:, ~is_open].any()
            assert own[:, is_open].any(0).all()


def test_another_back_end_leaves_no_hook_of_the_old_one(plain):
    parent = attach_masks(plain)

    def hooks():
        return sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in plain.modules())

    before, sites = hooks(), parent.sites
    parent.set_sites(with_pruning_modes(sites, {site.key: "scatter-gated" for site in sites}))
    assert hooks() > before
    parent.set_sites(sites)
    assert hooks() == before
    assert [entry["pruning_mode"] for entry in parent.config.sites] == ["dense"] * len(sites)
    parent.detach_masks()
    assert hooks() == 0


def test_a_fused_projection_is_masked_in_its_queries_alone():
    model = fresh("gpt2")
    parent = attach_masks(model)
    site = parent.sites[0]
    layer, seen = model.get_submodule(site.query.layer), []
    layer.register_forward_hook(lambda layer, inputs, output: seen.append((inputs[0], output)))
    static = {**parent.masks.open_masks(), site.key: random_static(parent)[site.key]}
    logits_of(parent, **random_inputs(parent), static_masks=static)
    hidden, masked = seen[0]
    full = hidden @ layer.weight + layer.bias
    opened = torch.cat([static[site.key][:32], torch.ones(64)])
    torch.testing.assert_close(masked, full * opened, atol=1e-5, rtol=0)


def test_static_masks_only_reach_the_samples_named(plain):
    parent = awake(plain)
    inputs, static = random_inputs(parent), random_static(parent)
    named = torch.tensor([True, False, False, True])
    mixed = logits_of(parent, **inputs, static_masks=static, static_samples=named)
    own, everywhere = logits_of(parent, **inputs), logits_of(parent, **inputs, static_masks=static)
    torch.testing.assert_close(mixed[~named], own[~named])
    torch.testing.assert_close(mixed[named], everywhere[named])
    assert not torch.allclose(own[named], everywhere[named], atol=1e-3)


def test_static_masks_may_differ_by_sample(vit):
    parent = awake(vit)
    inputs = random_inputs(parent)
    first, second = random_static(parent, 0), random_static(parent, 1)
    stacked = {key: torch.stack([first[key], second[key], first[key], second[key]]) for key in first}
    got = logits_of(parent, **inputs, static_masks=stacked)
    torch.testing.assert_close(got[::2], logits_of(parent, **inputs, static_masks=first)[::2])
    torch.testing.assert_close(got[1::2], logits_of(parent, **inputs, static_masks=second)[1::2])


def test_generated_masks_come_out_under_static_ones(vit):
    parent = awake(vit)
    inputs = random_inputs(parent)
    first = parent.sites[0].key
    expected = masks_of(parent, **inputs)[first]
    assert torch.equal(masks_of(parent, **inputs, static_masks=random_static(parent))[first], expected)


# Gradients


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
def test_the_task_alone_reaches_every_generator(plain, hard):
    parent = awake(plain, hard_masks=hard)
    parent(**random_inputs(parent), labels=LABELS).loss.backward()
    gradients = generator_gradients(parent)
    assert len(gradients) == 4 * len(parent.sites)
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []


def test_the_mask_terms_alone_reach_every_generator(plain):
    parent = awake(plain)
    outputs = parent(**random_inputs(parent), output_neuron_masks=True)
    nemo_loss(outputs.logits.detach(), LABELS, outputs.neuron_masks, LABELS, 1.0, 1.0).backward()
    gradients = generator_gradients(parent)
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []


@pytest.mark.parametrize("detached", [True, False])
def test_mask_terms_move_what_the_generators_watch_unless_detached(vit, detached):
    parent = awake(vit, detach_pooled=detached)
    outputs = parent(**random_inputs(parent), output_neuron_masks=True)
    nemo_loss(outputs.logits.detach(), LABELS, outputs.neuron_masks, LABELS, 1.0, 0.0).backward()
    moved = [name for name, p in parent.model.vit.layers[0].named_parameters() if p.grad is not None and p.grad.any()]
    assert bool(moved) != detached


def test_generators_have_a_gradient_under_static_masks(vit):
    # Parameters without one would stop distributed training.
    parent = awake(vit)
    parent(**random_inputs(parent), labels=LABELS, static_masks=random_static(parent)).loss.backward()
    assert all(gradient is not None and not gradient.any() for gradient in generator_gradients(parent).values())


def test_a_hard_mask_has_the_gradient_of_the_soft_one():
    parent = awake(fresh("vit"))
    inputs = random_inputs(parent)
    parent(**inputs, labels=LABELS).loss.backward()
    hard = generator_gradients(parent)["masks.3.generator.up.bias"].clone()
    # By hand at the last site: closed units have no gradient, open ones that of the value that reads them.
    masks = masks_of(parent, **inputs)[parent.sites[3].key][:, 0]
    assert torch.equal(hard != 0, (masks > 0).any(0))


def gradients_of(parent, inputs) -> dict[str, torch.Tensor]:
    parent.zero_grad()
    torch.manual_seed(0)  # the same dropout
    outputs = parent(**inputs, output_neuron_masks=True)
    nemo_loss(outputs.logits, LABELS, outputs.neuron_masks, LABELS, 1.0, 1.0).backward()
    return {name: p.grad.clone() for name, p in parent.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["vit", "bert", "gpt2", "llama", "swin"])
def test_activation_checkpointing_changes_no_gradient(family):
    parent = awake(fresh(family)).train()
    inputs = random_inputs(parent)
    expected = gradients_of(parent, inputs)
    parent.activation_checkpointing_enable()
    got = gradients_of(parent, inputs)
    assert list(got) == list(expected)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_reentrant_checkpointing_is_exact_or_refused(vit):
    # Its first pass runs without gradients, so masks collected there have none.
    parent = awake(vit).train()
    inputs = random_inputs(parent)
    expected = gradients_of(parent, inputs)
    try:
        parent.activation_checkpointing_enable({"use_reentrant": True})
        got = gradients_of(parent, inputs)
    except ValueError as error:
        assert "use_reentrant" in str(error)  # noqa: PT017
        return
    for name in generator_gradients(parent):
        torch.testing.assert_close(got[name], expected[name], msg=name)


# Copies, memory and dtypes


def test_a_copy_drives_its_own_generators(plain):
    parent = awake(plain)
    inputs = random_inputs(parent)
    parent(**inputs, labels=LABELS, output_neuron_masks=True).loss.backward()
    copied = copy.deepcopy(parent)
    before = logits_of(parent, **inputs)
    assert torch.equal(logits_of(copied, **inputs), before)
    for mask in copied.masks.site_masks():
        nn.init.constant_(mask.generator.up.bias, -50.0)
    assert all(not mask.any() for mask in masks_of(copied, **inputs).values())
    assert torch.equal(logits_of(parent, **inputs), before)
    parent.zero_grad()
    copied(**inputs, labels=LABELS).loss.backward()
    assert all(parameter.grad is None for parameter in parent.parameters())


def test_a_copy_can_be_detached_alone(vit):
    parent = awake(vit)
    inputs = random_inputs(parent)
    expected = logits_of(parent, **inputs)
    detached = copy.deepcopy(parent).detach_masks()
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in detached.modules())
    assert torch.equal(logits_of(parent, **inputs), expected)


def test_a_copy_made_between_forward_and_backward_has_no_graph(vit):
    parent = awake(vit).train()
    inputs = random_inputs(parent)
    loss = parent(**inputs, labels=LABELS).loss
    copied = copy.deepcopy(parent)
    loss.backward()
    assert all(parameter.grad is None for parameter in copied.parameters())


class Witness:
    """Lives as long as the graph that it is attached to."""


class Watched(torch.autograd.Function):
    """Passes a tensor on and attaches a witness to its graph."""

    @staticmethod
    def forward(ctx, tensor, witness):
        ctx.witness = witness
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@pytest.mark.parametrize(("family", "checkpointed"), [("vit", 0), ("vit", 1), ("bert", 1), ("albert", 0), ("llama", 1)])
def test_nothing_keeps_a_graph_alive(family, checkpointed):
    parent = awake(fresh(family)).train()
    if checkpointed:
        parent.activation_checkpointing_enable()
    alive = []

    def watch(layer, inputs, output):
        witness = Witness()
        alive.append(weakref.ref(witness))
        return Watched.apply(output, witness)

    for mask in parent.masks.site_masks():
        mask.generator.register_forward_hook(watch)
    outputs = parent(**random_inputs(parent), labels=LABELS)
    first_pass = len(alive)
    alive.extend(weakref.ref(tensor) for tensor in [outputs.logits, *outputs.neuron_masks.values()])
    assert all(reference() is not None for reference in alive)
    outputs.loss.backward()
    assert (len(alive) > first_pass + 1 + len(parent.sites)) == checkpointed
    del outputs
    gc.collect()
    assert [reference() for reference in alive if reference() is not None] == []


def test_autocast_keeps_masks_in_float32_and_logits_finite(plain):
    parent = awake(plain)
    inputs = random_inputs(parent)
    exact = parent(**inputs, output_neuron_masks=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = parent(**inputs, output_neuron_masks=True)
    assert mixed.logits.isfinite().all()
    flipped = 0.0
    for key, mask in mixed.neuron_masks.items():
        assert mask.dtype == torch.float32
        flipped += ((mask > 0) != (exact.neuron_masks[key] > 0)).float().mean().item()
    assert flipped / len(parent.sites) < 0.1
    mixed.logits.float().sum().backward()
    assert all(gradient.isfinite().all() for gradient in generator_gradients(parent).values())


def test_a_bfloat16_model_is_masked_in_float32(plain):
    parent = awake(plain.to(torch.bfloat16))
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in random_inputs(parent).items()}
    outputs = parent(**inputs, labels=LABELS, output_neuron_masks=True)
    assert outputs.logits.dtype == torch.bfloat16
    assert {mask.dtype for mask in outputs.neuron_masks.values()} == {torch.float32}
    outputs.loss.backward()
    assert all(gradient.isfinite().all() for gradient in generator_gradients(parent).values())


def test_a_cast_keeps_the_relevance(vit):
    parent = attach_masks(vit)
    parent.to(torch.float16).to(torch.bfloat16)
    assert {relevance.dtype for relevance in parent.masks.relevance().values()} == {torch.uint8}
    outputs = parent(pixel_values=torch.zeros(2, 3, 16, 16, dtype=torch.bfloat16), output_neuron_masks=True)
    assert {mask.dtype for mask in outputs.neuron_masks.values()} == {torch.float32}


# What a parent answers in eval mode


def remembering(model, **options):
    """A parent whose masks differ by sample, with a random relevance, and the union of what its groups keep."""
    parent = awake(model, static_evaluation=True, **options).eval()
    randomize_relevance(parent)
    level = round(parent.nemo_config.relevance_threshold * 255)
    return parent, {key: (table.amax(0) >= level).float() for key, table in parent.masks.relevance().items()}


@pytest.mark.parametrize("family", ["vit", "bert", "llama", "albert"])
def test_a_parent_answers_as_the_module_of_all_its_labels(family):
    parent, union = remembering(fresh(family), relevance_threshold=0.9)
    inputs = random_inputs(parent)
    answered = logits_of(parent, **inputs)
    assert torch.equal(answered, logits_of(parent, **inputs, static_masks=union))
    module = parent.extract_module(list(range(parent.config.num_labels)))
    torch.testing.assert_close(logits_of(module, **inputs), answered, atol=1e-5, rtol=0)
    assert not torch.allclose(answered, logits_of(parent, **inputs, static_masks=parent.masks.open_masks()), atol=1e-4)


def test_masks_of_samples_answer_in_training_on_request_and_where_chosen():
    parent, _ = remembering(fresh("vit"), relevance_threshold=0.9)
    chosen = copy.deepcopy(parent)
    chosen.nemo_config.static_evaluation = False
    inputs = random_inputs(parent)
    by_sample = logits_of(chosen, **inputs)
    assert not torch.allclose(logits_of(parent, **inputs), by_sample, atol=1e-4)
    assert torch.equal(logits_of(parent, **inputs, output_neuron_masks=True), by_sample)
    assert torch.equal(logits_of(parent.train(), **inputs), by_sample)  # this model has no dropout


def test_soft_masks_answer_by_sample():
    parent, union = remembering(fresh("vit"), relevance_threshold=0.9, hard_masks=False)
    inputs = random_inputs(parent)
    assert torch.equal(logits_of(parent, **inputs), logits_of(parent, **inputs, output_neuron_masks=True))
    assert not torch.allclose(logits_of(parent, **inputs), logits_of(parent, **inputs, static_masks=union), atol=1e-4)


def test_a_parent_that_was_never_trained_answers_as_the_plain_model():
    plain = fresh("vit").eval()
    inputs = random_inputs(plain)
    expected = logits_of(plain, **inputs)
    assert torch.equal(logits_of(awake(plain, static_evaluation=True).eval(), **inputs), expected)
