"""A few faults of `make faults`, and a lost run is detected."""

import shutil

import pytest
import torch

from tests.faults.campaign import EVERY, Campaign, Trial


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """With simulated disk errors, without mounts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork has only the thread that made it
    yield Campaign(tmp_path_factory.mktemp("campaign"), mounted=False)
    torch.set_num_threads(before)


@pytest.fixture
def late(campaign):
    """An optimizer step two thirds through the run, after several checkpoints."""
    return [i for i, name in enumerate(campaign.undisturbed.events) if name == "train_step"][18]


def survived(trial):
    return trial.problem == "" and trial.lost <= EVERY


def test_a_run_survives_a_full_disk(campaign):
    events = campaign.undisturbed.events
    for name in ("open labels.json.part", "save_file", "open adapter_config.json.part", "open report.json.part"):
        last = len(events) - 1 - events[::-1].index(name)
        trial = campaign.trial(last, campaign.fill, says="the disk is full")
        assert survived(trial), trial


def test_a_run_survives_a_clock_set_back(campaign, late):
    trial = campaign.trial(late, between=campaign.of_next_year)
    assert survived(trial) and trial.lost > 0, trial


def test_a_removed_checkpoint_loses_too_many_steps(campaign, late):
    trial = campaign.trial(late, between=lambda: shutil.rmtree(campaign.output / "checkpoint"))
    assert trial == Trial("", lost=18) and not survived(trial)


def test_a_traceback_or_a_fault_that_never_occurred_is_not_a_pass(campaign):
    def bug(_event):
        raise ZeroDivisionError

    first_step = campaign.undisturbed.events.index("train_step")
    assert "ended with code 99" in campaign.trial(first_step, bug).problem
    assert "the fault never occurred" in campaign.trial(10**6).problem
