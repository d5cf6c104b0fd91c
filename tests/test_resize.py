"""Layers of cut models: scattered and rotary ones, and which widths are refused."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import fresh
from test_layer_cuts import SITES, attention, first_site, side_by_side, with_mode
from torch import nn
from transformers.pytorch_utils import Conv1D

from nemo_hf.neurons.sites import FeedForwardSite, Rows
from nemo_hf.pruning.layer_cuts import site_cut
from nemo_hf.pruning.resize import RotaryAngles, ScatterLinear, check_widths, resize


class Rotated(nn.Module):
    """Stands for an attention layer, which gets the angles of its positions anywhere in the call."""

    def forward(self, hidden, attention_mask=None, position_embeddings=None, scale=1):
        return hidden, attention_mask, position_embeddings, scale


def test_a_rotary_layer_reads_its_angles_by_keyword_and_by_position():
    layer, angles = Rotated(), RotaryAngles(4, 8)
    angles.angle_indices.copy_(torch.tensor([1, 0, 5, 4]))
    layer.register_forward_pre_hook(angles.narrow, with_kwargs=True)
    hidden, attention_mask, given = torch.randn(2, 3, 32), torch.ones(2, 3), tuple(torch.randn(2, 2, 3, 8))
    picked = tuple(full[..., [1, 0, 5, 4]] for full in given)
    for got in (
        layer(hidden, attention_mask, given, 7),
        layer(hidden, attention_mask, position_embeddings=given, scale=7),
        layer(scale=7, position_embeddings=given, attention_mask=attention_mask, hidden=hidden),
    ):
        torch.testing.assert_close(got, (hidden, attention_mask, picked, 7))


def test_the_hook_of_a_copied_rotary_layer_uses_the_copy():
    model = fresh("llama")
    site = first_site(model, "attention")
    resize(model, site, {"key_value_heads": 2, "head_dim": 4})
    indices = {model: [0, 1, 4, 5], copy.deepcopy(model): [2, 3, 6, 7]}
    for each, kept in indices.items():
        each.get_submodule(site.name).nemo_rotary.angle_indices.copy_(torch.tensor(kept))
    for each, kept in indices.items():
        layer = each.get_submodule(site.name)
        (hook,) = layer._forward_pre_hooks.values()
        _, kwargs = hook(layer, (), {"position_embeddings": (torch.arange(8), torch.arange(8))})
        assert kwargs["position_embeddings"][0].tolist() == kept


@pytest.mark.parametrize(
    ("kind", "has_bias"), [(nn.Linear, True), (nn.Linear, False), (Conv1D, True)], ids=["linear", "no bias", "Conv1D"]
)
@pytest.mark.parametrize(("outputs", "inputs"), [([0, 2, 5], [1, 3]), ([], [])], ids=["some", "none"])
def test_a_scattered_layer_is_the_full_one_under_a_mask(kind, has_bias, outputs, inputs):
    torch.manual_seed(0)
    layer = Conv1D(6, 5) if kind is Conv1D else nn.Linear(5, 6, bias=has_bias)
    weight, hidden = layer.weight.T if kind is Conv1D else layer.weight, torch.randn(2, 3, 5)
    outputs, inputs = (torch.tensor(index, dtype=torch.long) for index in (outputs, inputs))

    writes = ScatterLinear(5, len(outputs), full_outputs=6, full_inputs=None, has_bias=has_bias)
    bias = {"bias": layer.bias[outputs]} if has_bias else {}
    writes.load_state_dict({"weight": weight[outputs], "output_indices": outputs, **bias})
    torch.testing.assert_close(writes(hidden), layer(hidden) * torch.zeros(6).index_fill(0, outputs, 1.0))

    reads = ScatterLinear(len(inputs), 6, full_outputs=None, full_inputs=5, has_bias=has_bias)
    bias = {"bias": layer.bias} if has_bias else {}
    reads.load_state_dict({"weight": weight[:, inputs], "input_indices": inputs, **bias})
    torch.testing.assert_close(reads(hidden), layer(hidden * torch.zeros(5).index_fill(0, inputs, 1.0)))


FEED_FORWARD = FeedForwardSite("block", "up", 4, "down", producers=(Rows("up", 0, 6),))
NEVER_EMPTY = replace(FEED_FORWARD, least_width=1)
DENSE = attention(Rows("q", 0, 8), Rows("k", 0, 8), Rows("v", 0, 8), heads=2, key_value_heads=2, head_dim=4)
WIDTHS = {  # the full ones
    FEED_FORWARD: {"intermediate": 6},
    with_mode(FEED_FORWARD, "scatter"): {"intermediate": 6},
    NEVER_EMPTY: {"intermediate": 6},
    with_mode(NEVER_EMPTY, "scatter"): {"intermediate": 6},
    DENSE: {"key_value_heads": 2, "head_dim": 4},
    with_mode(DENSE, "scatter"): {"query": 8, "key": 8, "value": 8, "output": 8},
    SITES[side_by_side]: {"query": 24, "key": 8, "value": 8, "output": 24},
}


@pytest.mark.parametrize("site", list(WIDTHS), ids=lambda site: f"{site.kind}-{site.pruning_mode}-{site.least_width}")
def test_widths_are_those_of_the_site_up_to_its_full_ones(site):
    full, least = WIDTHS[site], int(site is DENSE or site is NEVER_EMPTY)
    for accepted in (full, dict.fromkeys(full, least)):
        check_widths(site, accepted)
    refused = [{}, {"intermediate": 3, "head_dim": 2}, {"width": 1}, None]
    for name, most in full.items():
        refused += [{**full, name: width} for width in (-1, least - 1, most + 1, 10**12, 2.0, "2", True, None)]
    for widths in refused:
        with pytest.raises(ValueError, match=rf"^Got the widths .* for '.*'; expected integers from {least} to {{.*}}"):
            check_widths(site, widths)


def test_a_layer_that_can_not_be_empty_is_padded():
    assert site_cut(NEVER_EMPTY, {"intermediate": torch.tensor([], dtype=torch.long)}).widths == {"intermediate": 1}
