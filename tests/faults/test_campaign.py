"""A few faults of `make faults`, and that it notices a lost run."""

import shutil

import pytest
import torch

from tests.faults.campaign import EVERY, Campaign, Trial


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """With simulated errors of the disk: nothing is mounted here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork has only the thread that made it
    yield Campaign(tmp_path_factory.mktemp("campaign"), mounted=False)
    torch.set_num_threads(before)


@pytest.fixture
def late(campaign):
    """A moment two thirds through the run: an optimizer step with checkpoints behind it."""
    return [i for i, name in enumerate(campaign.whole.events) if name == "train_step"][18]


def survived(trial):
    return trial.problem == "" and trial.lost <= EVERY


def test_a_disk_that_is_full_is_survived(campaign):
    events = campaign.whole.events
    for name in ("open labels.json", "save_file", "open adapter_config.json.part", "open report.json.part"):
        last = len(events) - 1 - events[::-1].index(name)
        trial = campaign.trial(last, campaign.fill, says="the disk is full")
        assert survived(trial), trial


def test_a_clock_set_back_is_survived(campaign, late):
    trial = campaign.trial(late, between=campaign.of_next_year)
    assert survived(trial) and trial.lost > 0, trial


def test_a_checkpoint_that_vanished_is_too_much_lost(campaign, late):
    trial = campaign.trial(late, between=lambda: shutil.rmtree(campaign.output / "checkpoint"))
    assert trial == Trial("", lost=18) and not survived(trial)


def test_a_traceback_or_a_fault_that_never_came_is_no_pass(campaign):
    def bug(_event):
        raise ZeroDivisionError

    first_step = campaign.whole.events.index("train_step")
    assert "ended with code 99" in campaign.trial(first_step, bug).problem
    assert "the fault never came" in campaign.trial(10**6).problem
