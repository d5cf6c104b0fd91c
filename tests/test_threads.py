"""Threads and asyncio tasks that share a parent get what one after another would; replayed layers their own masks."""

import asyncio
import copy
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from conftest import fresh, image_samples, logits_of, parent_of, random_static
from torch import nn
from torch.utils import checkpoint as torch_checkpoint
from transformers import AutoModelForImageClassification, PreTrainedModel, TrainingArguments
from transformers.utils import logging as transformers_logging

from nemo_hf import NeMoTrainer, calibrate_rejection, compose, evaluate_module
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


def masked(family: str):
    """A parent without dropout whose masks differ from sample to sample."""
    parent = parent_of(family, static_evaluation=False)
    torch.manual_seed(0)
    for mask in parent.masks.site_masks():
        for parameter in mask.generator.parameters():
            nn.init.normal_(parameter, std=0.7)
    for layer in parent.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return parent


def lively(family: str):
    """The same; calls give time to other threads in the middle."""
    parent = masked(family)
    for layer in parent.model.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.register_forward_hook(yields)
    return parent


def yields(*_):
    time.sleep(0.0002)


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
    assert_equal(at_once(*(lambda call=call: [outputs_of(parent, **call) for _ in range(2)] for call in calls)),
                 [[outputs] * 2 for outputs in expected])  # fmt: skip

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


# torch 2.13's compiler does that itself with an autograd function.
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
def test_a_compiled_parent_knows_the_calls_of_each_thread():
    parent = masked("vit")
    compiled = torch.compile(parent, backend="eager", fullgraph=True)
    inputs = random_inputs(parent)["pixel_values"]
    calls = [{"pixel_values": inputs + 0.1 * index} for index in range(4)]
    plain = copy.deepcopy(parent).detach_masks()
    expected = [logits_of(plain if index % 2 else parent, **call) for index, call in enumerate(calls)]

    def answer(index):
        with parent.masks.disabled() if index % 2 else nullcontext():
            return [logits_of(compiled, **calls[index]) for _ in range(3)]

    for found in ([answer(index) for index in range(4)], at_once(*(partial(answer, index) for index in range(4)))):
        torch.testing.assert_close(found, [[logits] * 3 for logits in expected])


# Activation checkpointing


def by_parent(parent):
    parent.activation_checkpointing_enable()


def by_deprecated_name(parent):
    with pytest.warns(FutureWarning):
        parent.gradient_checkpointing_enable({"use_reentrant": False})


@contextmanager
def replaying():
    assert torch._C._current_graph_task_id() != -1
    yield


def with_contexts(parent):
    """Contexts of one's own are entered too."""
    parent.activation_checkpointing_enable({"use_reentrant": False, "context_fn": lambda: (nullcontext(), replaying())})


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
    parent, expected = masked(family).train(), []
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
    parent = masked("vit").train()
    for layer in parent.model.modules():
        if type(layer).__name__ == "ViTLayer":
            layer.forward = partial(torch_checkpoint.checkpoint, layer.forward, use_reentrant=True)
    loss = loss_of(parent, {"pixel_values": random_inputs(parent)["pixel_values"]})
    with pytest.raises(RuntimeError, match=r"^Got a backward pass that runs a layer again .*use_reentrant=False\.$"):
        loss.backward()


def test_a_copy_of_a_checkpointed_parent_replays_with_its_own_calls():
    parent = masked("vit").train()
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


def settings(model):
    """What belongs to the whole process or model, and must be left as it was."""
    return (
        torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cuda.flash_sdp_enabled(),
        torch.get_num_threads(), torch.get_default_dtype(), torch.linspace, nn.init.normal_,
        PreTrainedModel.tie_weights, PreTrainedModel.init_weights, transformers_logging.is_progress_bar_enabled(),
        [layer.training for layer in model.modules()],
    )  # fmt: skip


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
    before = settings(parent)
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
    assert settings(parent) == before


def test_measuring_leaves_the_calls_of_other_threads_and_gets_the_same(tmp_path):
    parent = lively("vit")
    module, other = parent.extract_module(["cat", "dog"]), parent.extract_module(["car", "frog"])
    samples = image_samples(20)
    labels = torch.tensor([sample["labels"] for sample in samples])
    batches = [{"pixel_values": torch.stack([sample["pixel_values"] for sample in samples]), "labels": labels}]
    fit = calibrate_rejection(copy.deepcopy(module), batches, show_progress=False)
    calibrated = copy.deepcopy(module)
    calibrated.config.rejection = dict(fit)
    measure = partial(evaluate_module, show_progress=False)
    report = measure(parent, ["cat", "dog"], batches).to_dict()
    joint = compose([module, other])
    call = {"pixel_values": batches[0]["pixel_values"][:3]}
    models = parent, module, calibrated, joint
    expected = [outputs_of(model, **call) for model in models]
    parent.train()
    before = settings(parent)
    with torch.no_grad():
        jobs = [
            lambda: [outputs_of(model, **call) for model in models for _ in range(8)],
            lambda: [measure(parent, ["cat", "dog"], batches).to_dict() for _ in range(2)],
            partial(calibrate_rejection, copy.deepcopy(module), batches, show_progress=False),
            lambda: [outputs_of(copy.deepcopy(model), **call) for model in models],
            partial(calibrated.save_plain, tmp_path / "plain"),
            partial(pickle.dumps, calibrated),
        ]
        answers, reports, found, copies, _, _ = at_once(*jobs)
    for got in (answers[::8], answers[7::8], copies):
        got[0].pop("neuron_masks")  # of a parent in training mode
        assert_equal(got, expected)
    for again in reports:
        timed = [name for name in report if "latency" in name]
        assert {**again, **dict.fromkeys(timed)} == {**report, **dict.fromkeys(timed)}
    assert found == fit
    assert settings(parent) == before
