"""Products with masks: what autograd makes of the plain formula, with less memory."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nemo_hf.neurons.masked_products import SMALL_PRODUCT, ForwardHandle, can_be_masked, masked_linear, times, token_sum

BATCH, NEURONS, OUTPUTS = 3, 8, 5


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


def gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad((output * drawn(*output.shape, seed=9)).sum(), inputs))


@pytest.mark.parametrize(
    "shape", [(BATCH, NEURONS), (BATCH, 4, NEURONS), (BATCH, 2, 3, NEURONS), (2 * BATCH, 4, NEURONS)]
)
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_masked_layer_is_the_layer_of_the_product(shape, has_bias):
    hidden, mask, weight = drawn(*shape), drawn(BATCH, NEURONS, seed=1), drawn(OUTPUTS, NEURONS, seed=2)
    bias = drawn(OUTPUTS, seed=3) if has_bias else None
    windows = shape[0] // BATCH
    spread = mask.repeat_interleave(windows, 0)
    view = spread.view(len(spread), *[1] * (len(shape) - 2), NEURONS)
    inputs = [hidden, mask, weight, *([bias] if has_bias else [])]
    expected = F.linear(hidden * view, weight, bias)
    found = masked_linear(hidden, spread, weight, bias)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, inputs), gradients(expected, inputs))
    torch.testing.assert_close(times(hidden, mask), hidden * view)
    inputs = [hidden, mask]
    torch.testing.assert_close(gradients(times(hidden, mask), inputs), gradients(hidden * view, inputs))


@pytest.mark.parametrize("samples", [1, 5, 70])
def test_a_large_product_is_summed_in_pieces(samples):
    first, second = (torch.randn(samples, 16, SMALL_PRODUCT // 512) for _ in range(2))
    assert torch.equal(token_sum(first, second), (first * second).sum(1))


def test_a_neuron_of_several_inputs_is_masked_in_all_of_them():
    hidden, mask = drawn(BATCH, 4, 2 * NEURONS), drawn(BATCH, NEURONS, seed=1)
    expected = hidden * mask.repeat_interleave(2, -1)[:, None]
    torch.testing.assert_close(times(hidden, mask), expected)
    torch.testing.assert_close(gradients(times(hidden, mask), [mask]), gradients(expected, [mask]))


def test_channels_of_images_are_masked():
    images, mask = drawn(BATCH, NEURONS, 4, 4), drawn(BATCH, NEURONS, seed=1)
    torch.testing.assert_close(times(images, mask, dim=1), images * mask[:, :, None, None])


def test_only_the_gradients_that_are_asked_for_are_computed():
    hidden, mask, weight = drawn(BATCH, 4, NEURONS), drawn(BATCH, NEURONS, seed=1), drawn(OUTPUTS, NEURONS, seed=2)
    frozen = weight.detach()
    found = masked_linear(hidden.detach(), mask, frozen, None)
    expected = F.linear(hidden.detach() * mask[:, None], frozen)
    torch.testing.assert_close(gradients(found, [mask]), gradients(expected, [mask]))
    assert not masked_linear(hidden.detach(), mask.detach(), frozen, None).requires_grad


def test_autocast_does_as_with_the_plain_layer():
    hidden, mask, weight, bias = (
        drawn(*shape, seed=seed).detach().float().requires_grad_()
        for seed, shape in enumerate([(BATCH, 4, NEURONS), (BATCH, NEURONS), (OUTPUTS, NEURONS), (OUTPUTS,)])
    )
    inputs = [hidden, mask, weight, bias]
    with torch.autocast("cpu", torch.bfloat16):
        found = masked_linear(hidden, mask, weight, bias)
        expected = F.linear(hidden * mask[:, None], weight, bias)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
    found, expected = ([g.float() for g in gradients(o.double(), inputs)] for o in (found, expected))
    assert all(gradient.dtype == torch.float32 for gradient in found)
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.05)


def test_masked_inputs_are_not_kept_for_the_backward_pass():
    kept: list[torch.Tensor] = []
    hidden, mask, weight = drawn(BATCH, 4, NEURONS), drawn(BATCH, NEURONS, seed=1), drawn(OUTPUTS, NEURONS, seed=2)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        masked_linear(hidden, mask, weight, None)
    assert sum(tensor.shape == hidden.shape for tensor in kept) == 1
    assert any(torch.equal(tensor, hidden) for tensor in kept if tensor.shape == hidden.shape)


def test_second_derivatives_are_right():
    hidden, mask, weight = drawn(BATCH, 4, NEURONS), drawn(BATCH, NEURONS, seed=1), drawn(OUTPUTS, NEURONS, seed=2)
    assert torch.autograd.gradgradcheck(masked_linear, (hidden, mask, weight, drawn(OUTPUTS, seed=3)))
    assert torch.autograd.gradgradcheck(times, (hidden, mask))


def test_a_layer_gets_its_forward_back():
    layer = nn.Linear(NEURONS, OUTPUTS)
    inputs = torch.ones(1, NEURONS)
    expected = layer(inputs)
    assert can_be_masked(layer)
    handle = ForwardHandle(layer, lambda hidden_states: hidden_states * 0)
    assert not can_be_masked(layer)
    assert not layer(inputs).any()
    assert not copy.deepcopy(layer)(inputs).any()
    handle.remove()
    handle.remove()
    assert torch.equal(layer(inputs), expected)
    assert not can_be_masked(nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2))
