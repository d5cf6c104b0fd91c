"""Threads and asyncio tasks that share a parent get what one after another would; replayed layers their own masks."""

import asyncio
import copy
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from conftest import fresh, image_samples, logits_of, parent_of, random_static
from torch import nn
from torch.utils import checkpoint as torch_checkpoint
from transformers import AutoModelForImageClassification, TrainingArguments
from transformers.utils import logging as transformers_logging

from nemo_hf import (
    NeMoTrainer,
)
from nemo_hf.neurons.trial_inputs import random_inputs

THREADS = 8
SOON = 30.0  # seconds for threads to meet


def at_once(*functions):
    """Starts functions at the same moment, each in a thread; returns their results, or raises what one raised."""
    barrier = threading.Barrier(len(functions), timeout=SOON)

    def run(function):
        barrier.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result() for future in [pool.submit(run, function) for function in functions]]


def lively(family: str, **options):
    """A parent whose masks differ from sample to sample; calls give time to other threads in the middle of it."""
    parent = parent_of(family, static_evaluation=False, **options)
    torch.manual_seed(0)
    for mask in parent.masks.site_masks():
        for parameter in mask.generator.parameters():
            nn.init.normal_(parameter, std=0.7)
        mask.register_forward_pre_hook(lambda *_: None)
    for layer in parent.model.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.register_forward_hook(yields)
    return parent


def yields(*_):
    time.sleep(0.0005)


def calls_of(parent) -> list[dict]:
    """Calls that differ in size, padding, static masks and outputs."""
    calls = []
    for index in range(THREADS):
        generator = torch.Generator().manual_seed(index)
        inputs = {name: value[: 1 + index % 4] for name, value in random_inputs(parent).items()}
        if "input_ids" in inputs:
            size = (1 + index % 4, 6 + index)
            inputs = {"input_ids": torch.randint(5, 120, size, generator=generator)}
            inputs["attention_mask"] = (torch.arange(size[1]) < torch.arange(3, 3 + size[0])[:, None]).long()
        else:
            inputs = {"pixel_values": inputs["pixel_values"] + 0.1 * index}
        if index % 3 == 1:
            inputs["static_masks"] = random_static(parent, seed=index)
        if index % 3 == 2:
            inputs["output_neuron_masks"] = True
        calls.append(inputs)
    return calls


def outputs_of(model, **inputs):
    with torch.no_grad():
        return dict(model(**inputs))


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["vit", "bert", "llama", "swin"])
def test_calls_at_the_same_time_are_those_one_after_another(family):
    parent = lively(family)
    calls = calls_of(parent)
    expected = [outputs_of(parent, **call) for call in calls]
    assert_equal(at_once(*(lambda call=call: [outputs_of(parent, **call) for _ in range(3)] for call in calls)),
                 [[outputs] * 3 for outputs in expected])  # fmt: skip

    async def answers():
        return await asyncio.gather(*(asyncio.to_thread(outputs_of, parent, **call) for call in calls))

    assert_equal(asyncio.run(answers()), expected)


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_of(parent, inputs):
    outputs = parent(**inputs, labels=torch.arange(len(next(iter(inputs.values())))) % 5)
    return outputs.loss + sum(mask.square().mean() for mask in (outputs.neuron_masks or {}).values())


def summed(parent, calls):
    """The gradients of the calls' losses, one after another."""
    parent.zero_grad()
    for call in calls:
        loss_of(parent, call).backward()
    return gradients_of(parent)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_gradients_of_threads_are_those_one_after_another(is_checkpointed):
    parent = lively("bert").train()
    for layer in parent.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    calls = calls_of(parent)[: THREADS // 2]
    expected = summed(parent, calls)
    if is_checkpointed:
        parent.activation_checkpointing_enable()
    parent.zero_grad()
    at_once(*(lambda call=call: loss_of(parent, call).backward() for call in calls))
    torch.testing.assert_close(gradients_of(parent), expected)


# Masks that are off


def test_masks_are_off_only_where_they_were_switched_off():
    parent = lively("vit")
    inputs, met = random_inputs(parent), threading.Barrier(2, timeout=SOON)
    masked, other = logits_of(parent, **inputs), threading.local()
    plain = logits_of(copy.deepcopy(parent).detach_masks(), **inputs)
    assert not torch.allclose(plain, masked)

    def off():
        with parent.masks.disabled():
            met.wait()
            found = [logits_of(parent, **inputs), logits_of(parent.model, **inputs)]
            met.wait()
        return [*found, logits_of(parent, **inputs)]

    def on():
        met.wait()
        other.found = logits_of(parent, **inputs)
        copied = logits_of(copy.deepcopy(parent), **inputs)
        met.wait()
        return [other.found, copied]

    assert_equal(at_once(off, on), [[plain, plain, masked], [masked, masked]])


def test_masks_are_off_in_an_asyncio_task_and_in_what_it_awaits():
    parent = lively("vit")
    inputs = random_inputs(parent)
    masked, plain = logits_of(parent, **inputs), logits_of(copy.deepcopy(parent).detach_masks(), **inputs)

    async def off(first, second):
        with parent.masks.disabled():
            first.set()
            await second.wait()
            return [logits_of(parent, **inputs), await asyncio.to_thread(logits_of, parent, **inputs)]

    async def on(first, second):
        await first.wait()
        found = [logits_of(parent, **inputs), await asyncio.to_thread(logits_of, parent, **inputs)]
        second.set()
        return [*found]

    async def both():
        events = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(off(*events), on(*events))

    assert_equal(asyncio.run(both()), [[plain, plain], [masked, masked]])
    assert_equal(logits_of(parent, **inputs), masked)


# Activation checkpointing


def by_parent(parent):
    parent.activation_checkpointing_enable()


def by_deprecated_name(parent):
    with pytest.warns(FutureWarning):
        parent.gradient_checkpointing_enable({"use_reentrant": False})


def with_contexts(parent):
    """Contexts of one's own are entered too."""
    context = partial(torch_checkpoint.noop_context_fn)
    parent.activation_checkpointing_enable({"use_reentrant": False, "context_fn": context})


def by_plain_model(parent):
    parent.model.activation_checkpointing_enable()


def by_user(parent):
    """Somebody's own checkpointing of a layer."""
    for layer in parent.model.modules():
        if type(layer).__name__ in ("ViTLayer", "BertLayer", "LlamaDecoderLayer"):
            layer.forward = partial(torch_checkpoint.checkpoint, layer.forward, use_reentrant=False)


def by_user_inside(parent):
    """One checkpointed part in another."""
    by_user(parent)
    parent.activation_checkpointing_enable()


WAYS = [by_parent, by_deprecated_name, with_contexts, by_plain_model, by_user, by_user_inside]


def two_losses(parent):
    first, second, third = calls_of(parent)[1:4]
    losses = [loss_of(parent, call) for call in (first, second)]
    with torch.no_grad():
        parent(**third)  # another call, whose state is none of theirs
    with parent.masks.disabled():
        losses.append(loss_of(parent, third))
    return losses


@pytest.mark.parametrize("family", ["vit", "bert", "llama"])
@pytest.mark.parametrize("way", WAYS)
def test_layers_are_replayed_with_the_masks_of_their_own_call(family, way):
    parent = parent_of(family, static_evaluation=False).train()
    for layer in parent.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    torch.manual_seed(0)
    for mask in parent.masks.site_masks():
        nn.init.normal_(mask.generator.up.weight, std=0.7)
    expected = []
    for loss in two_losses(parent):
        parent.zero_grad()
        loss.backward()
        expected.append(gradients_of(parent))
    assert any(not torch.equal(expected[0][name], gradient) for name, gradient in expected[1].items())
    way(parent)
    calls = []
    next(parent.masks.site_masks()).generator.register_forward_pre_hook(lambda *_: calls.append(0))
    for order in ((0, 1, 2), (2, 1, 0)):
        losses = two_losses(parent)
        before = len(calls)
        for place in order:
            parent.zero_grad()
            at_once(losses[place].backward)  # in another thread, as on GPUs
            torch.testing.assert_close(gradients_of(parent), expected[place])
        assert len(calls) == before + 2  # the layer was replayed, but not with masks where they were off


def test_a_replay_that_nothing_ties_to_its_call_is_refused():
    parent = parent_of("vit", static_evaluation=False).train()
    for layer in parent.model.modules():
        if type(layer).__name__ == "ViTLayer":
            layer.forward = partial(torch_checkpoint.checkpoint, layer.forward, use_reentrant=True)
    loss = loss_of(parent, {"pixel_values": random_inputs(parent)["pixel_values"]})
    with pytest.raises(RuntimeError, match=r"^Got a backward pass that runs a layer again .*use_reentrant=False\.$"):
        loss.backward()


def test_a_copy_of_a_checkpointed_parent_replays_with_its_own_calls():
    parent = parent_of("vit", static_evaluation=False).train()
    parent.activation_checkpointing_enable()
    call = {"pixel_values": random_inputs(parent)["pixel_values"]}
    expected = summed(parent, [call])
    for copied in (copy.deepcopy(parent), pickle.loads(pickle.dumps(parent))):
        assert_equal(summed(copied, [call]), expected)
    plain = parent.detach_masks()
    plain(**call).logits.sum().backward()


def test_a_trainer_checkpoints_the_layers_of_a_parent(tmp_path):
    losses = []
    for is_checkpointed in (False, True):
        options = {"max_steps": 2, "per_device_train_batch_size": 8, "report_to": "none", "save_strategy": "no"}
        options |= {"use_cpu": True, "disable_tqdm": True, "seed": 0, "activation_checkpointing": is_checkpointed}
        trainer = NeMoTrainer(fresh("vit"), TrainingArguments(tmp_path, **options), train_dataset=image_samples(16))
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# Cutting, loading and measuring at the same time


def same(first, second):
    assert_equal(first.state_dict(), second.state_dict())
    assert first.config.equivalence["status"] == second.config.equivalence["status"] == "verified"


@pytest.mark.parametrize("is_training", [False, True])
def test_a_server_cuts_modules_while_it_classifies(is_training, tmp_path):
    parent = lively("vit")
    parent.save_pretrained(tmp_path)
    pairs = [["cat", "dog"], ["car", "ship"], ["frog", "cat"], ["dog", "car"]]
    modules = [parent.extract_module(labels) for labels in pairs]
    calls = calls_of(parent)[:2]
    expected = [outputs_of(parent, **call) for call in calls]
    parent.train(is_training)
    parent.model.vit.layernorm.eval()  # somebody froze it
    flags = [layer.training for layer in parent.modules()]
    settings = (
        torch.get_float32_matmul_precision(), transformers_logging.is_progress_bar_enabled(), torch.get_num_threads(),
        torch.nn.init.normal_, type(parent).init_weights, type(parent).tie_weights, torch.linspace,
    )  # fmt: skip
    load = partial(AutoModelForImageClassification.from_pretrained, tmp_path)
    cut = [partial(parent.extract_module, labels) for labels in pairs]
    on_load = [partial(load, labels=labels) for labels in pairs[:2]]
    classify = [lambda call=call: [logits_of(parent, **call) for _ in range(8)] for call in calls]
    found = at_once(*cut, *on_load, load, *classify)
    for module, other in zip(found[:4], modules, strict=True):
        same(module, other)
    for module, other in zip(found[4:6], modules, strict=False):
        assert_equal(module.state_dict(), other.state_dict())
    assert_equal(found[6].state_dict(), parent.state_dict())
    assert_equal(found[7:], [[outputs["logits"]] * 8 for outputs in expected])  # these models have no dropout
    assert [layer.training for layer in parent.modules()] == flags
    assert settings == (
        torch.get_float32_matmul_precision(), transformers_logging.is_progress_bar_enabled(), torch.get_num_threads(),
        torch.nn.init.normal_, type(parent).init_weights, type(parent).tie_weights, torch.linspace,
    )  # fmt: skip
