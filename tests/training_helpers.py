"""What the tests of training share: arguments, parents whose masks differ by sample, recorded runs."""

import copy
import re

import datasets
import torch
from conftest import build, generated, image_samples, randomize_relevance, text_samples
from transformers import TrainerCallback, TrainingArguments

from nemo_hf import NeMoTrainer, make_parent
from nemo_hf.config import SHAPING_OPTIONS

TASK_ALONE = {"contrastive_weight": 0, "sparsity_weight": 0, "rehearsal_probability": 0}
REHEARSED = {"rehearsal_probability": 1.0, "warmup_ratio": 0.0}
DOMAINS = ["pet", "pet", "vehicle", "vehicle", "pet"]
SAMPLES = {"vit": image_samples, "bert": text_samples, "albert": text_samples}


def arguments(directory, **options):
    options = {"per_device_train_batch_size": 20, "learning_rate": 1e-2, "max_steps": 2, "logging_steps": 1, **options}
    options = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, **options}
    return TrainingArguments(str(directory), **options)


def without_dropout(model):
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    return model


_PARENTS = {}


def varied_parent(family, seed=0, **options):
    """A parent without dropout whose masks differ by sample, some of them closed, and with a random relevance."""
    shaping = {name: value for name, value in options.items() if name in SHAPING_OPTIONS}
    key = (family, seed, repr(shaping))
    if key not in _PARENTS:
        parent = without_dropout(make_parent(build(family, seed), generated(**shaping)))
        generator = torch.Generator().manual_seed(seed)
        for mask in parent.masks.site_masks():
            for weight in (mask.generator.down.weight, mask.generator.up.weight):
                torch.nn.init.normal_(weight, std=0.5, generator=generator)
            torch.nn.init.zeros_(mask.generator.up.bias)
        randomize_relevance(parent, seed)
        _PARENTS[key] = parent
    parent = copy.deepcopy(_PARENTS[key])
    parent.set_nemo_config(generated(**options))
    return parent


def batch_of(samples):
    return {name: torch.stack([torch.as_tensor(sample[name]) for sample in samples]) for name in samples[0]}


def text_table(**columns):
    """Twenty text samples as a data set with the column `label`, and with other columns."""
    data = {name: values.tolist() for name, values in batch_of(text_samples(20)).items()}
    return datasets.Dataset.from_dict({"label": data.pop("labels"), **data, **columns})


class Stream(torch.utils.data.IterableDataset):
    """Samples without a length."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


class Spoiled(torch.utils.data.Dataset):
    """Samples of which the last but one is read with an error."""

    def __init__(self, samples, error):
        self.samples, self.error = samples, error

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        if index == len(self.samples) - 2:
            raise self.error
        return self.samples[index]


def history(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(got, expected, **tolerance):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def check_message(error, *words):
    message = str(error.value)
    assert re.fullmatch(r"Got .+; expected .+\. [A-Z].+", message), message
    for word in words:
        assert word in message


class Recorder(TrainerCallback):
    """Keeps what the parent was called with in training, and its relevance after each optimizer step."""

    def __init__(self, parent):
        self.calls, self.relevance, self.substeps, self.step = [], [], [], 0
        self.parent = parent
        parent.register_forward_pre_hook(self._on_call, with_kwargs=True)

    def _on_call(self, model, args, kwargs):
        if model.training:
            self.calls.append({**kwargs, "step": self.step})

    def _relevance(self):
        return {key: relevance.clone() for key, relevance in self.parent.masks.relevance().items()}

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step

    def on_substep_end(self, args, state, control, **kwargs):
        self.substeps.append(self._relevance())

    def on_step_end(self, args, state, control, **kwargs):
        self.relevance.append(self._relevance())


def recorded(parent, args, **kwargs):
    recorder = Recorder(parent)
    trainer = NeMoTrainer(parent, args, callbacks=[recorder], **kwargs)
    trainer.train()
    return trainer, recorder
