"""A killed fit goes on bit by bit; a damaged, foreign or malicious checkpoint is refused; a full disk loses nothing."""

import os
import pickle
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from killed import EPOCHS, SETTINGS, learner_of
from torch import nn

from normlab.errors import InputError
from normlab.training import Callback, Checkpoint, Learner, load_checkpoint
from normlab.training.checkpoint import HEAD, previous, save_checkpoint

KILLED = Path(__file__).with_name("killed.py")


@pytest.mark.parametrize("name", ["ours", "DataLoader, accumulation, bfloat16"])
def test_a_killed_fit_goes_on_bit_by_bit(name):
    arguments = [sys.executable, str(KILLED), "--kills", "4", "--settings", name]
    run = subprocess.run(arguments, capture_output=True, text=True)
    assert run.stdout == f"{name}: 4 of 4 the same\n", run.stderr


class Ends(Exception):
    pass


class EndAt(Callback):
    """Ends the fit after so many steps, as a crash does."""

    def __init__(self, steps):
        self.steps = steps

    def after_step(self):
        self.steps -= 1
        if not self.steps:
            raise Ends


@pytest.mark.parametrize("steps", [1, 2, 3, 50, 51, 52, 60, 153])
@pytest.mark.parametrize("name", ["ours", "float16, accumulation"])
def test_it_goes_on_from_any_place(tmp_path, name, steps):
    """Before the first checkpoint, within an epoch, at its end, in the last batch."""
    whole, recorder, _ = learner_of(tmp_path / "whole.ckpt", **SETTINGS[name])
    expected = whole.fit(EPOCHS)
    steps = min(steps, whole.step)
    ended, _, _ = learner_of(tmp_path / "a.ckpt", **SETTINGS[name])
    ended.callbacks.append(EndAt(steps))
    with pytest.raises(Ends):
        ended.fit(EPOCHS)
    again, recorded, checkpoint = learner_of(tmp_path / "a.ckpt", **SETTINGS[name])
    assert checkpoint.resume(again) == (tmp_path / "a.ckpt").exists()
    found = again.fit(EPOCHS)
    assert [[row["train"], row["valid"]] for row in found] == [[row["train"], row["valid"]] for row in expected]
    assert recorded.losses == recorder.losses
    assert all(map(torch.equal, again.model.state_dict().values(), whole.model.state_dict().values()))


def test_after_the_last_epoch_there_is_nothing_to_do_and_more_epochs_go_on(tmp_path):
    first, _, _ = learner_of(tmp_path / "a.ckpt")
    first.fit(2)
    again, _, checkpoint = learner_of(tmp_path / "a.ckpt")
    assert checkpoint.resume(again)
    assert [row["train"] for row in again.fit(2)] == [row["train"] for row in first.history]
    checkpoint.resume(again)
    assert len(again.fit(3)) == 3


def test_an_error_within_a_batch_leaves_no_checkpoint_of_it(tmp_path):
    learner, _, checkpoint = learner_of(tmp_path / "a.ckpt")
    checkpoint.batches = 1
    learner.callbacks.append(EndAt(5))
    with pytest.raises(Ends):
        learner.fit(1)
    assert load_checkpoint(tmp_path / "a.ckpt")["batches"] == 4


def test_a_loader_that_does_not_keep_its_place_says_that_batches_are_skipped(tmp_path):
    learner, _, _ = learner_of(tmp_path / "a.ckpt", loader="DataLoader")
    learner.callbacks.append(EndAt(7))
    with pytest.raises(Ends):
        learner.fit(1)
    again, _, checkpoint = learner_of(tmp_path / "a.ckpt", loader="DataLoader")
    checkpoint.resume(again)
    with pytest.warns(UserWarning, match="train has no state_dict: its first 6 batches are drawn again and skipped"):
        again.fit(1)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """Two checkpoints, one after the other."""
    path = tmp_path / "a.ckpt"
    for number in range(2):
        save_checkpoint({"number": torch.tensor(number), "list": [1, "a"]}, path)
    return path


def test_the_one_before_is_kept(saved):
    assert load_checkpoint(saved)["number"] == 1
    assert load_checkpoint(previous(saved))["number"] == 0
    assert sorted(path.name for path in saved.parent.iterdir()) == ["a.ckpt", "a.previous.ckpt"]


def test_a_cut_file_is_refused_and_the_one_before_named(saved):
    content = saved.read_bytes()
    for size in range(0, len(content), 97):
        saved.write_bytes(content[:size])
        with pytest.raises(InputError, match=r"a\.ckpt: .*The checkpoint before it is .*a\.previous\.ckpt"):
            load_checkpoint(saved)


def test_every_flipped_bit_is_seen(saved):
    content = saved.read_bytes()
    for place in range(0, 8 * len(content), 1000):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        saved.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.ckpt: "):
            load_checkpoint(saved)
    for place in range(8 * (len(HEAD) + 66)):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        saved.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.ckpt: "):
            load_checkpoint(saved)


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


@pytest.mark.parametrize("inside", [True, False])
def test_code_in_a_file_is_not_run(saved, tmp_path, monkeypatch, inside):
    monkeypatch.setenv("EVIL", str(tmp_path / "was_here"))
    if inside:  # with a head and a checksum that are right
        save_checkpoint({"version": 1, "model": Evil()}, saved)
    else:
        saved.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match=r"a\.ckpt: it (holds more than tensors|is no checkpoint)"):
        load_checkpoint(saved)
    assert not (tmp_path / "was_here").exists()


def test_another_version_is_refused_by_name(saved, tmp_path):
    saved.write_bytes(saved.read_bytes().replace(b"checkpoint 1\n", b"checkpoint 2\n"))
    with pytest.raises(InputError, match=r"its format is b'normlab checkpoint 2', that of another version"):
        load_checkpoint(saved)
    learner, _, _ = learner_of(tmp_path / "b.ckpt")
    state = learner.state_dict()
    with pytest.raises(InputError, match=r"state: version=7 is not usable\. Accepted: 1, as this normlab saves it"):
        learner.load_state_dict({**state, "version": 7})


def test_the_state_of_other_parts_is_refused(tmp_path):
    learner, recorder, _ = learner_of(tmp_path / "a.ckpt")
    state = learner.state_dict()
    other = nn.Linear(3, 3)
    with pytest.raises(InputError, match="state: it was saved from another model or optimizer"):
        Learner(other, [1], optimizer=torch.optim.AdamW(other.parameters())).load_state_dict(state)
    learner.fit(1)
    state = learner.state_dict()
    learner.callbacks.remove(recorder)
    learner.load_state_dict(state)
    with pytest.raises(InputError, match=r"callbacks='Metrics' is not usable\. Accepted: those .*: Metrics, Recorder"):
        learner.fit(2)


def test_on_a_full_disk_the_fit_goes_on_and_the_last_file_stays(tmp_path):
    """A file may not be longer than the first checkpoint's half, once that is there."""
    learner, *_ = learner_of(tmp_path / "a.ckpt")

    class Fill(Callback):
        def after_batch(self):
            if (tmp_path / "a.ckpt").exists() and self.learner.batch == 20 and self.learner.training:
                half = (tmp_path / "a.ckpt").stat().st_size // 2
                resource.setrlimit(resource.RLIMIT_FSIZE, (half, resource.RLIM_INFINITY))

    learner.callbacks.append(Fill())
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            learner.fit(1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "could not be written: File too large. The one before is there." in str(said[0].message)
    assert learner.step == 51
    assert load_checkpoint(tmp_path / "a.ckpt")["batches"] == 18
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "a.previous.ckpt"]


@pytest.mark.parametrize("options", [{"batches": 0}, {"batches": 1.5}, {"seconds": 0}, {"seconds": "1"}])
def test_arguments_out_of_range_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Checkpoint("a.ckpt", **options)
