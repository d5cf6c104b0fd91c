"""Two processes on one machine compute what one process computes."""

import os
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
from test_trainer import (
    assert_same_state,
    check_message,
    quick_collection,  # noqa: F401 - a fixture
)

from nemo_hf import NeMoForImageClassification
from nemo_hf.config import OBJECTIVES

HERE = Path(__file__).parent
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def launch(script, *words, check=True, **variables):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*LAUNCH, str(script), *map(str, words)],
        env=environment | variables, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stderr[-6000:]
    return done


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process computes, and the directory of its files."""
    out = tmp_path_factory.mktemp("processes")
    return out, worker.trained(out / "one", save_strategy="steps", save_steps=2)


@pytest.fixture(scope="module")
def two(one):
    """What each of two processes computed."""
    out, _ = one
    return run_of_two("replicated", out)


def run_of_two(name, out):
    launch(HERE / "distributed_worker.py", name, out)
    return [torch.load(out / f"{name}-{rank}.pt") for rank in range(2)]


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
