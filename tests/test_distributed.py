"""Two processes on one machine compute what one process computes."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import distributed_worker as worker
import pytest
import torch
from conftest import generated
from training_helpers import assert_same_state, check_message, state, varied_parent
from transformers import ViTConfig, ViTForImageClassification

from nemo_hf import NeMoForImageClassification, NeMoTrainer, compute_relevance, make_parent
from nemo_hf.neurons.masks import build_masks
from nemo_hf.neurons.user_sites import model_sites
from nemo_hf.training.distributed import check_parallelism, gather_masks, in_step, sharded_layers

HERE = Path(__file__).parent
PAGE = (HERE.parent / "docs" / "many_devices.md").read_text(encoding="utf-8")


def launch(name, out, check=True, count=2):
    """Runs a function of the worker in some processes; returns what each of them found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "OMP_NUM_THREADS": "1"}
    script = str(HERE / "distributed_worker.py")
    done = subprocess.run(
        [*command, script, name, str(out)], env=environment, capture_output=True, text=True, timeout=400
    )
    if not check:
        return done
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(out / f"{name}-{rank}.pt") for rank in range(count)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process computes, and the directory of its files."""
    out = tmp_path_factory.mktemp("processes")
    return out, worker.trained(out / "one", evaluates=True, **worker.SAVED)


@pytest.fixture(scope="module")
def two(one):
    """What each of two processes computed; they are forked where no device forbids it, since imports take longest."""
    if torch.cuda.is_available():
        return launch("replicated", one[0])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    torch.multiprocessing.start_processes(worker.forked, ("replicated", one[0], port), nprocs=2, start_method="fork")
    return [torch.load(one[0] / f"replicated-{rank}.pt") for rank in range(2)]


def assert_close(got, expected, rtol=1e-4, atol=3e-6):
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, check_dtype=False)


def losses_and_state(run):
    return {name: run[name] for name in ("losses", "state")}


@pytest.mark.parametrize("micro_batches", list(worker.MICRO_BATCHES))
@pytest.mark.parametrize("setting", list(worker.SETTINGS))
def test_every_gradient_is_that_of_one_process(setting, micro_batches, two, tmp_path):
    splits = worker.MICRO_BATCHES[micro_batches]
    expected = worker.gradients_of(setting, splits, tmp_path)
    for result in two:
        got = result[f"{setting} {micro_batches}"]
        assert all(value is None or value.isfinite().all() for value in got.values())
        if setting != "within":
            assert_close(got, expected)
        elif micro_batches == "accumulated":  # compared with others, the contrast is another one
            assert (got["losses"] - expected["losses"]).abs().max() > 1e-3


def test_a_process_that_can_not_count_its_samples_stops_no_other_and_streams_are_shared_out(two):
    for result in two:
        assert result["counted"]["source"] == "running"
        parent = varied_parent("vit")
        parent.load_state_dict(result["counted"]["parent"])
        compute_relevance(parent, [worker.batch_of(worker.image_samples(13))], show_progress=False)
        assert_same_state(state(parent), result["counted"]["parent"], rtol=0, atol=0)


def test_neurons_are_assigned_alike_in_all_processes(two, tmp_path):
    """Each teaches modules on samples of its own, so that losses differ from those of one process."""
    first, second = (result["assigned"] for result in two)
    assert_same_state(first["state"], second["state"], rtol=0, atol=0)
    assert len(first["losses"]) >= 2
    expected = worker.assigned(tmp_path)["state"]
    tables = [name for name in expected if name.endswith("relevance")]
    assert tables
    for name in tables:
        assert (first["state"][name] == expected[name]).float().mean() > 0.9, name  # but for near ties
        assert (expected[name] == 0).any()


def test_a_run_is_that_of_one_process(one, two):
    assert worker.EVALUATED % 4 not in (0, 1)  # the last batches of an evaluation are filled up
    for name in ("trained", "checkpointing", "bf16", "resumed"):
        assert_same_state(two[0][name]["state"], two[1][name]["state"], rtol=0, atol=0)
    for result in two:
        assert_close(result["trained"], one[1])
        assert_close(result["checkpointing"], losses_and_state(one[1]))
        assert_close(result["resumed"], losses_and_state(one[1]))
        assert_close(result["bf16"]["losses"], one[1]["losses"], rtol=0.1, atol=0.02)
        assert not torch.equal(result["bf16"]["losses"]["loss"], result["trained"]["losses"]["loss"])


def test_one_process_resumes_what_two_began(one, two):
    out, expected = one
    assert_close(worker.trained(out / "one again", out / "two" / "checkpoint-2"), losses_and_state(expected))


@pytest.mark.sweep  # three starts of processes
def test_sharded_parameters_train_and_resume_as_whole_ones(one):
    out, expected = one
    for result in launch("sharded", out):
        assert_close(result["trained"], expected)
        assert_close(result["checkpointing"], losses_and_state(expected))
        assert_close(result["resumed"], losses_and_state(expected))
    saved = NeMoForImageClassification.from_pretrained(out / "sharded" / "checkpoint-4")
    whole = NeMoForImageClassification.from_pretrained(out / "one" / "checkpoint-4")
    own = {name: getattr(saved.config, name) for name in ("save_identity", "training")}
    assert saved.config.to_dict() == whole.config.to_dict() | own
    assert_same_state(saved.state_dict(), whole.state_dict(), rtol=1e-4, atol=3e-6)
    assert_close(launch("resharded", out, count=1)[0]["resumed"], losses_and_state(expected))


@pytest.mark.parametrize(
    ("args", "state", "split", "word"),
    [
        ({"n_gpu": 4}, {}, None, "--num_processes 4"),
        ({}, {"fsdp_plugin": SimpleNamespace(fsdp_version=1)}, None, "fsdp2.yaml"),
        ({}, {"deepspeed_plugin": object()}, None, "DeepSpeed"),
        ({}, {}, SimpleNamespace(tp_enabled=True, cp_enabled=True), "tp and cp"),
    ],
)
def test_other_ways_to_spread_a_model_are_refused(args, state, split, word, vit, monkeypatch):
    accelerator = SimpleNamespace(state=SimpleNamespace(**state), parallelism_config=split)
    with pytest.raises(ValueError, match="Got") as error:
        check_parallelism(SimpleNamespace(**{"n_gpu": 0, "fsdp": None} | args), accelerator)
    check_message(error, word)
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "true")
    with pytest.raises(ValueError, match="ram_efficient"):
        NeMoTrainer(vit)


def test_a_batch_above_the_capacity_is_not_gathered():
    with pytest.raises(ValueError, match=r"batch of 3 samples.*gather_across_devices=False"):
        gather_masks(torch.rand(3, 4), torch.tensor([0, 0, 1]), 2)


def test_whole_models_don_t_wait_for_each_other_and_blocks_are_what_is_sharded():
    batches = [{"labels": torch.zeros(1)}] * 3
    assert list(in_step(batches, torch.nn.Linear(1, 1))) == [(batch, True) for batch in batches]
    for family, layer in {"vit": "ViTLayer", "bert": "BertLayer"}.items():
        assert sharded_layers(varied_parent(family)) == [layer]


@pytest.mark.sweep  # starts processes
def test_a_killed_process_leaves_a_checkpoint_to_resume_from(one):
    out, expected = one
    done = launch("dying", out, check=False)
    assert "SIGKILL" in done.stderr
    folder = out / "dying"
    assert (folder / "checkpoint-4" / "model.safetensors").exists()  # written, but not to the end
    for step in (2, 4):
        loaded = NeMoForImageClassification.from_pretrained(folder / f"checkpoint-{step}")
        assert loaded.config.relevance_source == "running"
    with pytest.raises(ValueError, match=r"checkpoint-4.*written last") as error:
        worker.trained(folder, folder / "checkpoint-4")
    check_message(error, "trainer_state.json")
    assert_close(worker.trained(folder, True), losses_and_state(expected))


def test_the_page_counts_parameters_as_the_library_does():
    rows = re.findall(r"\((\d+) x (\d+)\) \| ([\d.,]+) M \| ([\d.]+) M \| ([\d.]+) % \| ([\d,]+) \|", PAGE)
    assert len(rows) == 5
    for width, layers, *claimed in rows:
        size = {"hidden_size": int(width), "num_hidden_layers": int(layers), "num_attention_heads": int(width) // 64}
        with torch.device("meta"):
            model = ViTForImageClassification(ViTConfig(**size, intermediate_size=4 * int(width), num_labels=100))
            sites = model_sites(model, generated())
            masks = build_masks(sites, generated(), model.num_parameters(), 100)
        counts = [model.num_parameters() / 1e6, sum(p.numel() for p in masks.parameters()) / 1e6]
        claims = [float(value.replace(",", "")) for value in claimed[:2]]
        assert [float(f"{count:.3g}") for count in counts] == [float(f"{claim:.3g}") for claim in claims]
        assert claimed[2:] == [f"{100 * counts[1] / counts[0]:.1f}", f"{sum(site.neurons for site in sites):,}"]


@pytest.mark.sweep  # a model of real size
def test_the_page_measures_memory_as_the_library_does():
    size = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_labels": 100}
    plain, kept = ViTForImageClassification(ViTConfig(**size)).eval(), []
    for make in (lambda: plain, lambda: make_parent(plain, generated())):
        model, stored = make(), {}
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        inputs = {"pixel_values": torch.zeros(4, 3, 224, 224), "labels": torch.zeros(4, dtype=torch.long)}
        note = lambda x, found=stored: found.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            model.train()(**inputs)
        kept.append(sum(size for pointer, size in stored.items() if pointer not in own) / 4e6)
    claimed = re.search(r"keeps ([\d.]+) MB a sample .*? and ([\d.]+) MB with.*?measured are ([\d.]+) MB", PAGE, re.S)
    assert [f"{kept[0]:.1f}", f"{kept[1]:.1f}", f"{kept[1] - kept[0]:.1f}"] == list(claimed.groups())
