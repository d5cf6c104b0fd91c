"""Products with masks: what autograd computes for the plain formula, with less memory."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nemo_hf.neurons.masked_products import (
    SMALL_PRODUCT,
    ReplacedForward,
    apply_mask,
    is_replaceable,
    masked_linear,
    token_sum,
)

BATCH, NEURONS, OUTPUTS = 3, 8, 5


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


HIDDEN, MASK = drawn(BATCH, 4, NEURONS), drawn(BATCH, NEURONS, seed=1)
WEIGHT, BIAS = drawn(OUTPUTS, NEURONS, seed=2), drawn(OUTPUTS, seed=3)


def gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad((output * drawn(*output.shape, seed=9)).sum(), inputs, retain_graph=True))


def assert_same(found: torch.Tensor, expected: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, inputs), gradients(expected, inputs))


@pytest.mark.parametrize(
    "shape", [(BATCH, NEURONS), (BATCH, 4, NEURONS), (BATCH, 2, 3, NEURONS), (2 * BATCH, 4, NEURONS)]
)
@pytest.mark.parametrize("bias", [BIAS, None])
def test_a_masked_layer_is_the_layer_of_the_product(shape, bias):
    hidden = drawn(*shape)
    repeated = MASK.repeat_interleave(shape[0] // BATCH, 0)  # for the windows of a sample
    product = hidden * repeated.view(len(repeated), *[1] * (len(shape) - 2), NEURONS)
    inputs = [hidden, MASK, WEIGHT, *([] if bias is None else [bias])]
    assert_same(masked_linear(hidden, repeated, WEIGHT, bias), F.linear(product, WEIGHT, bias), inputs)
    assert_same(apply_mask(hidden, MASK), product, [hidden, MASK])


def test_a_neuron_of_several_inputs_is_masked_in_all_of_them_and_channels_of_images_too():
    hidden = drawn(BATCH, 4, 2 * NEURONS)
    assert_same(apply_mask(hidden, MASK), hidden * MASK.repeat_interleave(2, -1)[:, None], [MASK])
    images = drawn(BATCH, NEURONS, 4, 4)
    assert_same(apply_mask(images, MASK, dim=1), images * MASK[:, :, None, None], [MASK])


@pytest.mark.parametrize("samples", [1, 5, 70])
def test_a_large_product_is_summed_in_pieces(samples):
    first, second = (torch.randn(samples, 16, SMALL_PRODUCT // 512) for _ in range(2))
    assert torch.equal(token_sum(first, second), (first * second).sum(1))


def test_autocast_does_as_with_the_plain_layer():
    inputs = [tensor.detach().float().requires_grad_() for tensor in (HIDDEN, MASK, WEIGHT, BIAS)]
    hidden, mask, weight, bias = inputs
    with torch.autocast("cpu", torch.bfloat16):
        found = masked_linear(hidden, mask, weight, bias)
        expected = F.linear(hidden * mask[:, None], weight, bias)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
    found, expected = (gradients(outputs.double(), inputs) for outputs in (found, expected))
    assert all(gradient.dtype == torch.float32 for gradient in found)
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.05)


def test_masked_inputs_are_not_kept_for_the_backward_pass_and_only_needed_gradients_are_computed():
    weight = WEIGHT.detach()
    assert_same(masked_linear(HIDDEN.detach(), MASK, weight, None), F.linear(HIDDEN * MASK[:, None], weight), [MASK])
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        masked_linear(HIDDEN, MASK, WEIGHT, None)
    (hidden,) = (tensor for tensor in kept if tensor.shape == HIDDEN.shape)
    assert torch.equal(hidden, HIDDEN)


def test_second_derivatives_are_right():
    assert torch.autograd.gradgradcheck(masked_linear, (HIDDEN, MASK, WEIGHT, BIAS))
    assert torch.autograd.gradgradcheck(apply_mask, (HIDDEN, MASK))


def test_a_layer_gets_its_forward_back():
    layer, inputs = nn.Linear(NEURONS, OUTPUTS), torch.ones(1, NEURONS)
    expected = layer(inputs)
    assert is_replaceable(layer)
    handle = ReplacedForward(layer, lambda hidden_states: hidden_states * 0)
    assert not is_replaceable(layer)
    assert not layer(inputs).any()
    assert not copy.deepcopy(layer)(inputs).any()
    handle.remove()
    handle.remove()
    assert torch.equal(layer(inputs), expected)
    assert not is_replaceable(nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2))
