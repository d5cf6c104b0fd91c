"""Two processes on one machine compute what one process computes."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import distributed_worker as worker
import pytest
import torch
from filelock import FileLock
from test_trainer import (
    assert_same_state,
    check_message,
    lively_parent,
    quick_collection,  # noqa: F401 - a fixture
)
from transformers import ViTConfig, ViTForImageClassification

import nemo_hf.training.distributed
from nemo_hf import NeMoConfig, NeMoForImageClassification, NeMoTrainer, make_parent
from nemo_hf.config import OBJECTIVES
from nemo_hf.neurons.masks import build_masks
from nemo_hf.neurons.user_sites import model_sites
from nemo_hf.training.distributed import check_parallelism, gather_masks, in_step, real_samples, sharded_layers

HERE = Path(__file__).parent
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone")


def launch(script, *words, check=True, count=2, **variables):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*LAUNCH, f"--nproc_per_node={count}", str(script), *map(str, words)],
        env=environment | variables, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stderr[-6000:]
    return done


def once(path, compute):
    """What was computed, by whichever of the processes that run the tests came first."""
    with FileLock(f"{path}.lock"):
        if not path.exists():
            torch.save(compute(), path)
    return torch.load(path)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process computes, and the directory of its files."""
    root = tmp_path_factory.getbasetemp()
    out = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "processes"
    out.mkdir(exist_ok=True)
    return out, once(out / "one.pt", lambda: worker.trained(out / "one", save_strategy="steps", save_steps=2))


@pytest.fixture(scope="module")
def two(one):
    """What each of two processes computed."""
    return run_of_two("replicated", one[0])


def run_of_two(name, out):
    def run():
        launch(HERE / "distributed_worker.py", name, out)
        return [torch.load(out / f"{name}-{rank}.pt") for rank in range(2)]

    return once(out / f"{name}.pt", run)


def assert_close(got, expected, rtol=1e-4, atol=1e-6):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_close(got[name], value, rtol, atol)
        elif isinstance(value, torch.Tensor):
            torch.testing.assert_close(
                got[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
            )
        else:
            assert got[name] == pytest.approx(value, rel=rtol, abs=atol), name


@pytest.mark.parametrize("has_several", [False, True], ids=["one-label", "several-labels"])
@pytest.mark.parametrize("split", list(worker.SPLITS))
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_objective_is_that_of_all_samples(objective, split, has_several, two):
    expected = worker.objective_of(objective, worker.SPLITS[split], has_several)
    got = [result[f"{objective} {split} {has_several}"] for result in two]
    assert expected["masks"].any(1).sum() > 2
    for result in got:
        torch.testing.assert_close(result["loss"], expected["loss"])
    torch.testing.assert_close(torch.cat([result["masks"] for result in got]), expected["masks"])


@pytest.mark.parametrize("setting", [name for name in worker.SETTINGS if name != "within"])
def test_every_gradient_is_that_of_one_process(setting, two, tmp_path):
    expected = worker.gradients_of(setting, [(4, 4), (6, 3)], tmp_path)
    for result in two:
        assert_close(result[f"{setting} accumulated"], expected)


def test_a_process_with_one_sample_contributes_its_share(two, tmp_path):
    expected = worker.gradients_of("plain", [(5, 1)], tmp_path)
    for result in two:
        assert_close(result["one sample"], expected)


def test_without_gathering_the_contrast_is_another_one(two):
    for result in two:
        gathered, alone = result["plain accumulated"], result["within accumulated"]
        assert (gathered["losses"] - alone["losses"]).abs().max() > 1e-3


def test_both_processes_end_alike(two):
    for name in ("trained", "checkpointing", "bf16", "resumed"):
        assert_same_state(two[0][name]["state"], two[1][name]["state"], rtol=0, atol=0)


def test_a_run_is_that_of_one_process(one, two):
    assert_close(two[0]["trained"], one[1], atol=3e-6)


def test_no_sample_counts_twice_in_an_evaluation(one, two):
    assert worker.EVALUATED % 4 not in (0, 1)  # the last batches are filled up
    for result in two:
        assert_close(result["trained"]["eval"], one[1]["eval"])
        assert_close(result["trained"]["report"], one[1]["report"])


def test_replayed_layers_change_nothing(one, two):
    assert_close(two[0]["checkpointing"], one[1], atol=3e-6)


def test_half_precision_stays_near(one, two):
    losses = two[0]["bf16"]["losses"]
    assert_close(losses, one[1]["losses"], rtol=0.1, atol=0.02)
    assert not torch.equal(losses["loss"], two[0]["trained"]["losses"]["loss"])


def test_two_processes_resume_what_one_began(one, two):
    for result in two:
        assert_close(result["resumed"], {name: one[1][name] for name in ("losses", "state")}, atol=3e-6)


def test_one_process_resumes_what_two_began(one, two):
    out, expected = one
    got = worker.resumed(out / "one again", out / "two" / "checkpoint-2")
    assert_close(got, {name: expected[name] for name in ("losses", "state")}, atol=3e-6)


@pytest.mark.parametrize("processes", [2, 3, 5])
@pytest.mark.parametrize("samples", [1, 7, 12, 20])
@pytest.mark.parametrize("resumed", [False, True])
def test_the_real_samples_of_the_last_batches_are_all_there_are(processes, samples, resumed, monkeypatch):
    monkeypatch.setattr(nemo_hf.training.distributed, "processes", lambda: processes)
    left = samples % (2 * processes)
    shard = SimpleNamespace(batch_size=2, num_processes=processes, split_batches=False, drop_last=False)
    loader = SimpleNamespace(dataset=range(samples), batch_sampler=SimpleNamespace(batch_sampler=shard))
    gradient_state = SimpleNamespace(
        end_of_dataloader=True, remainder=-1 if resumed else left, active_dataloader=loader if resumed else None
    )
    kept = [real_samples(2, gradient_state, rank) for rank in range(processes)]
    assert sum(kept) == (left or 2 * processes)
    assert kept == sorted(kept, reverse=True)
    gradient_state.end_of_dataloader = False
    assert real_samples(2, gradient_state, processes - 1) == 2


def test_a_batch_over_the_capacity_is_refused():
    with pytest.raises(ValueError, match="batch of 3 samples") as error:
        gather_masks([torch.rand(3, 4)], torch.tensor([0, 0, 1]), 2)
    check_message(error, "gather_across_devices=False")


@pytest.mark.parametrize(
    ("args", "state", "split", "word"),
    [
        ({"n_gpu": 4}, {}, None, "--num_processes 4"),
        ({}, {"fsdp_plugin": SimpleNamespace(fsdp_version=1)}, None, "fsdp2.yaml"),
        ({}, {"deepspeed_plugin": object()}, None, "DeepSpeed"),
        ({}, {}, SimpleNamespace(tp_enabled=True, cp_enabled=True), "tp and cp"),
    ],
)
def test_other_ways_to_spread_a_model_are_refused(args, state, split, word):
    accelerator = SimpleNamespace(state=SimpleNamespace(**state), parallelism_config=split)
    with pytest.raises(ValueError, match="Got") as error:
        check_parallelism(SimpleNamespace(**{"n_gpu": 0, "fsdp": None} | args), accelerator)
    check_message(error, word)


def test_weights_in_one_process_only_are_refused(vit, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "True")
    with pytest.raises(ValueError, match="ram_efficient") as error:
        NeMoTrainer(vit)
    check_message(error, "expected false")


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_the_units_of_sharding_are_the_blocks(family):
    parent = lively_parent(family)
    names = sharded_layers(parent)
    assert names == [{"vit": "ViTLayer", "bert": "BertLayer"}[family]]


def test_whole_models_don_t_wait_for_each_other():
    batches = [{"labels": torch.zeros(1)}] * 3
    assert list(in_step(batches, torch.nn.Linear(1, 1))) == [(batch, True) for batch in batches]


def test_the_page_counts_as_the_library_does():
    page = (HERE.parent / "docs" / "many_devices.md").read_text(encoding="utf-8")
    rows = re.findall(r"\((\d+) x (\d+)\) \| ([\d.,]+) M \| ([\d.]+) M \| ([\d.]+) % \| ([\d,]+) \|", page)
    assert len(rows) == 5
    for width, layers, parameters, generators, share, neurons in rows:
        size = int(width)
        heads = size // 64
        with torch.device("meta"):
            config = ViTConfig(
                hidden_size=size, num_hidden_layers=int(layers), num_attention_heads=heads, intermediate_size=4 * size,
                num_labels=100,
            )  # fmt: skip
            model = ViTForImageClassification(config)
            sites = model_sites(model, NeMoConfig())
            masks = build_masks(sites, NeMoConfig(), model.num_parameters(), 100)
        counted = [model.num_parameters() / 1e6, sum(parameter.numel() for parameter in masks.parameters()) / 1e6]
        assert [float(f"{count:.3g}") for count in counted] == [
            float(f"{float(value.replace(',', '')):.3g}") for value in (parameters, generators)
        ]
        assert f"{100 * counted[1] / counted[0]:.1f}" == share
        assert sum(site.neurons for site in sites) == int(neurons.replace(",", ""))


def kept_for_backward(model) -> int:
    """Bytes that a training step keeps beside the parameters, each tensor once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model.train()(pixel_values=torch.zeros(4, 3, 224, 224), labels=torch.zeros(4, dtype=torch.long))
    assert output.loss.requires_grad
    return sum(kept.values())


@pytest.mark.slow  # a model of real size
def test_the_page_measures_as_the_library_does():
    config = ViTConfig(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=100,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    plain = ViTForImageClassification(config)
    without = kept_for_backward(plain) / 4e6
    masked = kept_for_backward(make_parent(plain)) / 4e6
    page = (HERE.parent / "docs" / "many_devices.md").read_text(encoding="utf-8")
    said = re.search(r"keeps ([\d.]+) MB a sample .*? and ([\d.]+) MB with.*?measured are ([\d.]+) MB", page, re.DOTALL)
    assert [f"{without:.1f}", f"{masked:.1f}", f"{masked - without:.1f}"] == list(said.groups())


@pytest.mark.slow  # starts two interpreters
def test_sharded_parameters_train_and_resume_as_whole_ones(one):
    out, expected = one
    for result in run_of_two("sharded", out):
        assert_close(result["trained"], expected, atol=3e-6)
        assert_close(result["checkpointing"], expected, atol=3e-6)
        assert_close(result["resumed"], {name: expected[name] for name in ("losses", "state")}, atol=3e-6)
    saved = NeMoForImageClassification.from_pretrained(out / "sharded" / "checkpoint-4")
    whole = NeMoForImageClassification.from_pretrained(out / "one" / "checkpoint-4")
    own = {name: getattr(saved.config, name) for name in ("_name_or_path", "training")}
    assert saved.config.to_dict() == whole.config.to_dict() | own
    assert_same_state(saved.state_dict(), whole.state_dict(), rtol=1e-4, atol=3e-6)
    launch(HERE / "distributed_worker.py", "resharded", out, count=1)
    alone = torch.load(out / "resharded-0.pt")["resumed"]
    assert_close(alone, {name: expected[name] for name in ("losses", "state")}, atol=3e-6)


@pytest.mark.slow  # starts two interpreters
def test_a_killed_process_leaves_a_checkpoint_to_resume_from(one):
    out, expected = one
    done = launch(HERE / "distributed_worker.py", "dying", out, check=False)
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    folder = out / "dying"
    assert not (out / "dying-0.pt").exists()
    assert (folder / "checkpoint-4" / "model.safetensors").exists()  # written, but not to the end
    for step in (2, 4):
        loaded = NeMoForImageClassification.from_pretrained(folder / f"checkpoint-{step}")
        assert loaded.config.relevance_source == "running"
    with pytest.raises(ValueError, match=r"checkpoint-4.*written last") as error:
        worker.resumed(folder, folder / "checkpoint-4")
    check_message(error, "trainer_state.json")
    got = worker.resumed(folder, True)
    assert_close(got, {name: expected[name] for name in ("losses", "state")}, atol=3e-6)
