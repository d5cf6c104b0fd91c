"""Relevance: the exact streaming pass, the running average of training, and what the trainer makes of both."""

import datasets
import pytest
import torch
from conftest import image_samples, text_samples
from torch.utils.data import Subset
from training_helpers import SAMPLES, arguments, batch_of, check_message, recorded, state, varied_parent

from nemo_hf import NeMoForImageClassification, NeMoTrainer, compute_relevance
from nemo_hf.models.labels import group_indices
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
        label = torch.as_tensor(sample["labels"])
        own = label.nonzero().flatten().tolist() if label.ndim else [int(label)]
        of = [index for index, labels in enumerate(members) if not set(own).isdisjoint(labels)]
        counts[of] += 1
        with torch.no_grad():
            masks = parent(**batch_of([sample]), output_neuron_masks=True).neuron_masks
        for key, calls in masks.items():
            is_open = torch.zeros(calls.shape[-1], dtype=torch.bool)
            for call in calls[0]:
                is_open |= call > 0
            opened[key][of] += is_open
    return {key: (count / counts[:, None] * 255).round().to(torch.uint8) for key, count in opened.items()}


def assert_relevance(parent, expected):
    relevance = parent.masks.relevance()
    assert relevance.keys() == expected.keys()
    for key, counted in expected.items():
        assert relevance[key].dtype == torch.uint8
        assert torch.equal(relevance[key], counted), key


class TestExactPass:
    @pytest.mark.parametrize(
        ("family", "label_groups", "has_several"),
        [("vit", GROUPS, False), ("vit", GROUPS, True), ("bert", None, False), ("albert", GROUPS, False)],
    )
    def test_equals_a_naive_count_in_eval_mode_whatever_the_batches(self, family, label_groups, has_several):
        samples = SAMPLES[family](22)
        parent = varied_parent(family, label_groups=label_groups)
        if has_several:
            parent.config.problem_type = "multi_label_classification"
            samples = [{**s, "labels": torch.eye(5)[[s["labels"], i % 4]].amax(0)} for i, s in enumerate(samples)]
        expected = naive_relevance(parent, samples)
        shares = torch.cat([counted.float().flatten() for counted in expected.values()]) / 255
        assert ((shares > 0.05) & (shares < 0.95)).any()
        for layer in parent.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.9
        for given, size in ((samples, 6), (samples[::-1], 7), (samples, 1)):
            parent.masks[0].relevance.zero_()
            parent.report = {"metrics": {"eval_accuracy": 0.5}}
            compute_relevance(parent.train(), batches(given, size), show_progress=False)
            assert_relevance(parent, expected)
            assert parent.training
            assert parent.config.relevance_source == "exact"
            assert parent.report is None  # it was measured with another relevance

    def test_soft_masks_keep_their_mean(self):
        parent = varied_parent("vit", hard_masks=False, label_groups=GROUPS)
        samples = image_samples(20)
        batch = batch_of(samples)
        with torch.no_grad():
            masks = parent(**batch, output_neuron_masks=True).neuron_masks
        compute_relevance(parent, batches(samples, 6), show_progress=False)
        groups = group_indices(parent)[batch["labels"]]
        for mask in parent.masks.site_masks():
            for group in range(3):
                mean = masks[mask.site.key][groups == group].amax(1).mean(0)
                torch.testing.assert_close(mask.mean_mask[group], mean)

    def test_what_is_refused_changes_nothing(self):
        parent = varied_parent("vit", label_groups=GROUPS).train()
        before = state(parent.masks)
        pixels = {"pixel_values": torch.zeros(2, 3, 16, 16)}
        known = {**pixels, "labels": torch.tensor([0, 3])}
        for given, word in (
            ([known, pixels], "'labels'"),
            ([known, {**pixels, "labels": torch.tensor([0, 5])}], "label 5"),
            ([{**pixels, "labels": torch.tensor([-100, -100])}], "without a sample of any label"),
        ):
            with pytest.raises(ValueError, match=word) as error:
                compute_relevance(parent, given, show_progress=False)
            check_message(error)
            assert all(torch.equal(tensor, before[name]) for name, tensor in parent.masks.state_dict().items())
            assert parent.training
        with pytest.raises(ValueError, match="module") as error:
            compute_relevance(varied_parent("vit").extract_module(["cat", "dog"]), [known], show_progress=False)
        check_message(error)


class TestRunningAverage:
    def test_rises_by_single_samples_and_the_same_step_rounds_alike(self):
        # A sample weighs 1/64: near 1 it moves the share by less than half of the 1/255 that is stored.
        results = []
        for noise in (1, 2):
            parent = varied_parent("vit")
            torch.manual_seed(noise)
            for mask in parent.masks.site_masks():
                mask.relevance.fill_(204)
            masks = {mask.site.key: torch.ones(5, 1, mask.site.neurons) for mask in parent.masks.site_masks()}
            for step in range(80):
                counts = OpenCounts(parent.masks, group_indices(parent))
                counts.add(masks, torch.arange(5))
                counts.blend(step)
            results.append(torch.cat(list(parent.masks.relevance().values()), -1))
        expected = 1 + (204 / 255 - 1) * (1 - 1 / RUNNING_WINDOW) ** 80
        assert abs(results[0].float().mean() / 255 - expected) < 0.02
        assert torch.equal(*results)

    def test_moves_once_a_step_towards_the_counts_of_the_groups_present(self, tmp_path):
        samples = [sample for sample in image_samples(20) if sample["labels"] in (1, 3)]
        parent, before = (varied_parent("vit", rehearsal_probability=0.0) for _ in range(2))
        batch = batch_of(samples)
        with torch.no_grad():
            masks = before.train()(**batch).neuron_masks
        args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4)
        data = {"train_dataset": Subset(samples, range(8)), "relevance_dataset": image_samples(20)}
        _, recorder = recorded(parent, args, **data)
        assert len(recorder.substeps) == 3
        for key, start in before.masks.relevance().items():
            assert all(torch.equal(relevance[key], start) for relevance in recorder.substeps)
            moved = recorder.relevance[0][key]
            assert torch.equal(moved[[0, 2, 4]], start[[0, 2, 4]])
            for group in (1, 3):
                opened = (masks[key][batch["labels"] == group] > 0).any(1).float().mean(0)
                weight = 1 - (1 - 1 / RUNNING_WINDOW) ** 4
                expected = start[group] / 255 + weight * (opened - start[group] / 255)
                assert (moved[group] - expected * 255).abs().max() < 1
                assert not torch.equal(moved[group], start[group])


class TestInTheTrainer:
    def test_is_exact_after_training_or_on_request(self, tmp_path):
        samples = text_samples(20)
        columns = {name: [sample[name].tolist() for sample in samples] for name in ("input_ids", "attention_mask")}
        labels = [sample["labels"] for sample in samples]
        data = datasets.Dataset.from_dict({**columns, "text": ["words"] * 20, "label": labels})
        args = arguments(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=8)
        trainer = NeMoTrainer(varied_parent("bert"), args, train_dataset=data)
        for run in (trainer.update_relevance, trainer.train):
            run()
            assert trainer.parent.config.relevance_source == "exact"
            assert_relevance(trainer.parent, naive_relevance(trainer.parent, samples))

    def test_is_running_in_a_checkpoint_and_counted_on_data_of_its_own(self, tmp_path):
        clean = image_samples(20, seed=1)
        args = arguments(
            tmp_path, save_strategy="steps", save_steps=1, max_steps=1, dataloader_num_workers=1,
            dataloader_persistent_workers=True, eval_strategy="steps", eval_steps=1,
        )  # fmt: skip
        data = {"train_dataset": image_samples(20), "relevance_dataset": clean, "eval_dataset": image_samples(10)}
        trainer = NeMoTrainer(varied_parent("vit"), args, **data)
        trainer.train()
        checkpoint = NeMoForImageClassification.from_pretrained(tmp_path / "checkpoint-1")
        assert checkpoint.config.relevance_source == "running"
        assert_relevance(trainer.parent, naive_relevance(trainer.parent, clean))
        other = naive_relevance(trainer.parent, image_samples(20))
        assert any(not torch.equal(other[key], counted) for key, counted in trainer.parent.masks.relevance().items())
