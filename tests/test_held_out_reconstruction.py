"""A module is fitted on some samples and judged on others; what makes these worse is not kept."""

import pytest
import torch
from conftest import fresh, generated
from cutting_helpers import assert_same_weights, batches_for, cut, distance

from nemo_hf.models import held_out_reconstruction
from nemo_hf.pruning.reconstruct import Reconstruction


def rows_of(batches):
    return {tuple(row) for batch in batches for row in batch["input_ids"].flatten(1).tolist()}


class EnoughError(Exception):
    """The first fit is all that a test looks at."""


def watched_runs(monkeypatch, change=lambda fit, ridge: None):
    """Notes the samples and the ridge of each fit, and changes the module after it."""
    runs = []

    class Watched(Reconstruction):
        def run(self, ridge, **options):
            runs.append((rows_of(inputs for _, inputs in self.batches), ridge))
            errors = super().run(ridge, **options)
            change(self, ridge)
            return errors

    monkeypatch.setattr(held_out_reconstruction, "Reconstruction", Watched)
    return runs


@pytest.mark.parametrize(("count", "size", "every"), [(240, 16, 8), (240, 7, 8), (60, 16, 4), (60, 1, 4)])
def test_the_distance_is_that_of_samples_which_were_not_fitted(monkeypatch, count, size, every):
    runs, source, batches = watched_runs(monkeypatch), fresh("bert"), batches_for("bert", count)
    module = cut(source, batches, batch_size=size)
    raw = cut(source, batches, reconstruct=False)
    fitted, all_rows = runs[0][0], rows_of(batches)
    held = [
        {name: value[place : place + 1] for name, value in batch.items()}
        for batch in batches
        for place in range(len(batch["input_ids"]))
        if tuple(batch["input_ids"][place].tolist()) not in fitted
    ]
    assert len(held) == len(all_rows) - len(fitted) == pytest.approx(count / every, abs=1)
    found = module.config.extraction
    assert found["cut_distance"] == pytest.approx(distance(raw, source, held), rel=1e-4)
    assert found["distance"] < found["cut_distance"]
    if count >= held_out_reconstruction.FEW_SAMPLES:
        assert len(runs) == 1
        assert found["distance"] == pytest.approx(distance(module, source, held), rel=1e-4)
    else:
        assert [rows for rows, _ in runs[1:]] == [all_rows]


@pytest.mark.parametrize(("period", "options"), [(2, {}), (8, {}), (3, {"max_loss": 100}), (6, {"max_loss": 100})])
def test_of_labels_that_come_in_turn_each_is_fitted_and_each_is_held_out(monkeypatch, period, options):
    def end(fit, ridge):
        raise EnoughError

    runs, batches = watched_runs(monkeypatch, end), batches_for("bert", 480)
    for place, batch in enumerate(batches):
        batch["input_ids"][:, 0] = 100 + torch.arange(16 * place, 16 * place + 16) % period
        batch["labels"] = torch.full((16,), 3)
    with pytest.raises(EnoughError):
        cut(fresh("bert"), batches, None if options else 0.4, **options)
    fitted = torch.tensor([row[0] - 100 for row in runs[0][0]]).bincount(minlength=period)
    held_out = 480 // period - fitted
    assert fitted.max() < 1.2 * fitted.min()
    assert held_out.max() < 2 * held_out.min()


def test_a_stronger_ridge_is_tried_before_it_is_refused(monkeypatch):
    def harm(fit, ridge):
        if ridge < 1:
            for parameter in fit.module.parameters():
                parameter.data += 1

    runs, source, batches = watched_runs(monkeypatch, harm), fresh("bert"), batches_for("bert", 240)
    module = cut(source, batches)
    assert [ridge for _, ridge in runs] == [0.01, 0.1, 1.0]
    assert module.config.extraction["ridge"] == 1.0
    assert "refused" not in module.config.extraction
    assert module.config.extraction["distance"] < module.config.extraction["cut_distance"]


def test_what_fits_the_samples_alone_is_refused(monkeypatch, caplog):
    source, batches = fresh("bert"), batches_for("bert", 240)

    def by_heart(fit, ridge):
        known = rows_of(inputs for _, inputs in fit.batches)

        def recall(model, args, kwargs, output):
            is_new = [tuple(row) not in known for row in kwargs["input_ids"].tolist()]
            output.logits[torch.tensor(is_new)] += 10
            return output

        fit.module.register_forward_hook(recall, with_kwargs=True)

    watched_runs(monkeypatch, by_heart)
    module = cut(source, batches)
    found = module.config.extraction
    assert "would differ" in found["refused"]
    assert found["distance"] == found["cut_distance"]
    assert "not reconstructed" in caplog.text
    monkeypatch.undo()
    assert_same_weights(module, cut(source, batches, reconstruct=False))


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_samples_than_can_be_held_out_judge_themselves(monkeypatch, count):
    runs, source, batches = watched_runs(monkeypatch), fresh("bert"), batches_for("bert", count)
    module = cut(source, batches)
    assert runs[0][0] == rows_of(batches)
    assert module.config.extraction["samples"] == count
    assert module.config.extraction["distance"] == pytest.approx(distance(module, source, batches), rel=1e-4)


def test_a_module_that_keeps_every_neuron_needs_no_reconstruction(monkeypatch):
    runs, source, batches = watched_runs(monkeypatch), fresh("bert"), batches_for("bert")
    module = cut(source, batches, retention=1.0)
    assert not runs
    assert distance(module, source, batches_for("bert", seed=1)) < 1e-10


def test_nothing_is_fitted_where_the_cut_neurons_do_not_matter(monkeypatch, caplog):
    runs, source, batches = watched_runs(monkeypatch), fresh("bert"), batches_for("bert", 240)
    with torch.no_grad():
        for layer in source.bert.encoder.layer:
            layer.output.dense.weight[:, 16:] = 0
    module = cut(source, batches, 0.5, nemo_config=generated(targets=["ffn"]))
    found = module.config.extraction
    assert found["neurons"] < 1
    assert not runs
    assert found["distance"] == found["cut_distance"] < 1e-9
    assert "not reconstructed" not in caplog.text
