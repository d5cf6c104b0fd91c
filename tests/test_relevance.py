"""Relevance: the exact streaming pass, the running average of training, and what the trainer makes of both."""

import datasets
import pytest
import torch
from conftest import image_samples, text_samples
from training_helpers import (
    SAMPLES,
    arguments,
    batch_of,
    check_message,
    quick_collection,  # noqa: F401 - a fixture
    recorded,
    state,
    varied_parent,
)

from nemo_hf import NeMoForImageClassification, NeMoTrainer, compute_relevance
from nemo_hf.models.label_groups import group_indices
from nemo_hf.training.relevance import RUNNING_WINDOW, OpenCounts

GROUPS = {"a": [0, 3], "b": [1], "c": [2, 4]}


def batches(samples, size):
    return [batch_of(samples[start : start + size]) for start in range(0, len(samples), size)]


def naive_relevance(parent, samples):
    """Counts by two loops over single samples and calls: site key to round(255 f) by group."""
    members = list(parent.config.groups.values())
    opened = {mask.site.key: torch.zeros(len(members), mask.site.neurons) for mask in parent.masks.site_masks()}
    counts = torch.zeros(len(members))
    parent.eval()
    for sample in samples:
        group = next(index for index, labels in enumerate(members) if sample["labels"] in labels)
        counts[group] += 1
        with torch.no_grad():
            masks = parent(**batch_of([sample]), output_neuron_masks=True).neuron_masks
        for key, calls in masks.items():
            is_open = torch.zeros(calls.shape[-1], dtype=torch.bool)
            for call in calls[0]:
                is_open |= call > 0
            opened[key][group] += is_open
    return {key: (count / counts[:, None] * 255).round().to(torch.uint8) for key, count in opened.items()}


def assert_relevance(parent, expected):
    relevance = parent.masks.relevance()
    assert relevance.keys() == expected.keys()
    for key, counted in expected.items():
        assert relevance[key].dtype == torch.uint8
        assert torch.equal(relevance[key], counted), key


class TestExactPass:
    @pytest.mark.parametrize(("family", "label_groups"), [("vit", GROUPS), ("bert", None), ("albert", GROUPS)])
    def test_equals_a_naive_count(self, family, label_groups):
        samples = SAMPLES[family](22)
        parent = varied_parent(family, label_groups=label_groups)
        expected = naive_relevance(parent, samples)
        parent.report = {"metrics": {"eval_accuracy": 0.5}}
        compute_relevance(parent, batches(samples, 6), show_progress=False)
        assert_relevance(parent, expected)
        shares = torch.cat([counted.float().flatten() for counted in expected.values()]) / 255
        assert ((shares > 0.05) & (shares < 0.95)).any()
        assert parent.config.relevance_source == "exact"
        assert parent.report is None  # it was measured with another relevance

    def test_does_not_depend_on_batch_size_or_order(self):
        parent = varied_parent("vit")
        samples = image_samples(20)
        compute_relevance(parent, batches(samples, 20), show_progress=False)
        whole = state(parent.masks)
        for changed, size in ((samples, 3), (samples[::-1], 7), (samples, 1)):
            parent.masks[0].relevance.zero_()
            compute_relevance(parent, batches(changed, size), show_progress=False)
            assert all(torch.equal(tensor, whole[name]) for name, tensor in parent.masks.state_dict().items())

    def test_counts_only_open_masks_of_evaluation(self):
        parent = varied_parent("bert")
        for layer in parent.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.9
        samples = text_samples(20)
        expected = naive_relevance(parent, samples)
        parent.train()
        compute_relevance(parent, batches(samples, 10), show_progress=False)
        assert_relevance(parent, expected)
        assert parent.training
        assert all(parameter.grad is None for parameter in parent.parameters())

    def test_soft_masks_keep_their_mean(self):
        parent = varied_parent("vit", hard_masks=False, label_groups=GROUPS)
        samples = image_samples(20)
        batch = batch_of(samples)
        with torch.no_grad():
            masks = parent(**batch, output_neuron_masks=True).neuron_masks
        compute_relevance(parent, batches(samples, 6), show_progress=False)
        group_of_label = group_indices(parent)
        for mask in parent.masks.site_masks():
            for group in range(3):
                mean = masks[mask.site.key][group_of_label[batch["labels"]] == group].amax(1).mean(0)
                torch.testing.assert_close(mask.mean_mask[group], mean)

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            (
                batches([s for s in image_samples(20) if s["labels"] != 3], 5),
                ["without a sample", "'ship'", "5 labels"],
            ),
            ([{"pixel_values": torch.zeros(2, 3, 16, 16)}], ["'labels'", "pixel_values"]),
        ],
        ids=["label without a sample", "no labels"],
    )
    def test_what_is_refused_changes_nothing(self, given, words):
        parent = varied_parent("vit", label_groups=GROUPS).train()
        before = state(parent.masks)
        with pytest.raises(ValueError, match="Got") as error:
            compute_relevance(parent, given, show_progress=False)
        check_message(error, *words)
        assert all(torch.equal(tensor, before[name]) for name, tensor in parent.masks.state_dict().items())
        assert parent.training

    def test_a_module_is_refused(self):
        module = varied_parent("vit").extract_module(["cat", "dog"])
        with pytest.raises(ValueError, match="module") as error:
            compute_relevance(module, batches(image_samples(10), 5), show_progress=False)
        check_message(error)


class TestRunningAverage:
    def counts(self, parent):
        return OpenCounts(parent.masks, group_indices(parent))

    def random_masks(self, parent, samples, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return {
            mask.site.key: torch.rand(samples, 1, mask.site.neurons, generator=generator).sub(0.5).relu()
            for mask in parent.masks.site_masks()
        }

    def test_samples_at_once_weigh_as_much_as_one_after_another(self):
        parent = varied_parent("vit")
        key = parent.sites[0].key
        start = parent.masks.relevance()[key][2].float() / 255
        masks = {name: values[:1].expand(16, -1, -1) for name, values in self.random_masks(parent, 1).items()}
        counts = self.counts(parent)
        counts.add(masks, torch.full((16,), 2))
        counts.blend(0)
        expected = start
        for _ in range(16):
            expected = expected + ((masks[key][0, 0] > 0).float() - expected) / RUNNING_WINDOW
        assert (parent.masks.relevance()[key][2] - expected * 255).abs().max() < 1

    def test_other_groups_stay_and_the_same_step_rounds_alike(self):
        results = []
        for noise in (1, 2):
            torch.manual_seed(noise)
            parent = varied_parent("vit")
            before = state(parent.masks)
            counts = self.counts(parent)
            counts.add(self.random_masks(parent, 4), torch.tensor([1, 1, 4, 1]))
            counts.blend(3)
            for index, mask in enumerate(parent.masks.site_masks()):
                changed = (mask.relevance != before[f"{index}.relevance"]).any(-1)
                assert changed.tolist() == [False, True, False, False, True]
            results.append(torch.cat([mask.relevance for mask in parent.masks.site_masks()], -1))
        assert torch.equal(*results)

    def test_counts_of_batches_add_up(self):
        parent = varied_parent("vit", label_groups=GROUPS)
        masks, labels = self.random_masks(parent, 12), torch.arange(12) % 5
        whole, parts = self.counts(parent), self.counts(parent)
        whole.add(masks, labels)
        for start in range(0, 12, 5):
            parts.add({key: mask[start : start + 5] for key, mask in masks.items()}, labels[start : start + 5])
        for got, expected in zip(parts.tensors(), whole.tensors(), strict=True):
            torch.testing.assert_close(got, expected)
        assert whole.samples.tolist() == [5, 3, 4]
        parts.reset()
        assert not any(tensor.any() for tensor in parts.tensors())

    def test_comes_to_rest_on_the_share(self):
        parent = varied_parent("vit")
        masks, counts = self.random_masks(parent, 20), self.counts(parent)
        for step in range(60):
            counts.reset()
            counts.add(masks, torch.full((20,), 0))
            counts.blend(step)
        for key, relevance in parent.masks.relevance().items():
            share = (masks[key][:, 0] > 0).float().mean(0)
            assert (relevance[0] / 255 - share).abs().max() < 0.02

    def test_rises_by_single_samples(self, tmp_path):
        # A sample weighs 1/64: near 1 it moves the share by less than half of the 1/255 that is stored.
        parent = varied_parent("vit", rehearsal_probability=0, targets=["ffn"])
        for mask in parent.masks.site_masks():
            mask.relevance.fill_(204)
            torch.nn.init.constant_(mask.generator.up.bias, 50.0)
        args = arguments(
            tmp_path, max_steps=80, learning_rate=0.0, per_device_train_batch_size=5, logging_steps=80,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        _, recorder = recorded(parent, args, train_dataset=image_samples(5))
        expected = 1 + (204 / 255 - 1) * (1 - 1 / RUNNING_WINDOW) ** 80
        for relevance in recorder.relevance[-1].values():
            assert abs(relevance.float().mean() / 255 - expected) < 0.02


class TestInTheTrainer:
    @pytest.mark.parametrize("kind", ["list", "datasets.Dataset"])
    def test_is_exact_after_training_or_on_request(self, kind, tmp_path):
        samples = data = text_samples(20)
        if kind == "datasets.Dataset":
            columns = {name: [sample[name].tolist() for sample in samples] for name in ("input_ids", "attention_mask")}
            data = {**columns, "text": ["words"] * 20, "label": [sample["labels"] for sample in samples]}
            data = datasets.Dataset.from_dict(data)
        args = arguments(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=8)
        trainer = NeMoTrainer(varied_parent("bert"), args, train_dataset=data)
        trainer.update_relevance()
        assert_relevance(trainer.parent, naive_relevance(trainer.parent, samples))
        trainer.train()
        assert trainer.parent.config.relevance_source == "exact"
        assert_relevance(trainer.parent, naive_relevance(trainer.parent, samples))

    def test_is_running_in_a_checkpoint(self, tmp_path):
        args = arguments(tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
        trainer = NeMoTrainer(varied_parent("vit"), args, train_dataset=image_samples(20))
        trainer.train()
        checkpoint = NeMoForImageClassification.from_pretrained(tmp_path / "checkpoint-1")
        assert checkpoint.config.relevance_source == "running"
        assert trainer.parent.config.relevance_source == "exact"
        trainer.save_model(tmp_path / "parent")
        saved = NeMoForImageClassification.from_pretrained(tmp_path / "parent")
        assert saved.config.relevance_source == "exact"
        assert_relevance(saved, trainer.parent.masks.relevance())

    def test_is_counted_on_data_of_its_own(self, tmp_path):
        clean = image_samples(20, seed=1)
        trainer = NeMoTrainer(
            varied_parent("vit"), arguments(tmp_path), train_dataset=image_samples(20), relevance_dataset=clean
        )
        trainer.train()
        expected = naive_relevance(trainer.parent, clean)
        assert_relevance(trainer.parent, expected)
        other = naive_relevance(trainer.parent, image_samples(20))
        assert any(not torch.equal(other[key], expected[key]) for key in expected)

    def test_is_not_counted_on_evaluation_data_that_workers_keep(self, tmp_path):
        samples = image_samples(20)
        args = arguments(
            tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True, max_steps=1,
            eval_strategy="steps", eval_steps=1,
        )  # fmt: skip
        trainer = NeMoTrainer(varied_parent("vit"), args, train_dataset=samples, eval_dataset=image_samples(10, seed=1))
        trainer.train()
        assert_relevance(trainer.parent, naive_relevance(trainer.parent, samples))
