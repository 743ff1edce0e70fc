"""
Training runs and what may go wrong around them: damaged states, full disks, dead ranks, losses that are no numbers.

    python -m pytest tests/test_faults.py

Mutants that these tests catch. test_damage_*, test_*_damaged_*: digests not compared, states not checked, a refused one
counted as one of the last two. test_settings_*: a run without its run.json begins anew. test_a_log_*: the log decoded
strictly. test_a_full_disk_*: SafetensorError, the log's and --keep's OSError not caught. test_a_loss_*: not looked at.
test_what_was_written_*: not compared. test_torchrun_*: one place in the store for all attempts.

As a program it is a rank that torchrun starts, with a fault: tests/test_faults.py PIDS FAULT train_sft.py --model ...
"""

import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import tiny  # first: it finds the repository

import pytest
import torch

import common
import state
from common import parse_config
from forked import (SCRIPTS, STEP, before, broken, flags, folder, full_disk, go, inputs, kill, patched, refused, same,
                    states, steps, straight, term)

cpu = tiny.cpu


def content(path):
    """Every file below a folder and its bytes."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


# --- damaged states ---

def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.fixture(scope="module")
def stopped(inputs, tmp_path_factory):
    """A run with states behind steps 3 and 4 of 6 (and one behind 2, which is gone), and its command."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    words = [*flags(inputs, "dpo"), "--out", out]
    go("dpo", *words, "--save_every", 1, fault=partial(before, STEP, 5, kill), code=-9)
    assert [p.name for p in states(out)] == ["step-00000004", "step-00000003"]
    return out, words


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "random-00000.safetensors", "state.json",
                                  "manifest.json"])
@pytest.mark.parametrize("harm", [flip, cut, Path.unlink])
def test_damage_is_found(stopped, tmp_path, name, harm):
    shutil.copytree(states(stopped[0])[0], tmp_path / "state")
    assert state.damage(tmp_path / "state") == ""
    harm(tmp_path / "state" / name)
    found = state.damage(tmp_path / "state")
    assert found.startswith(name) or (name == "manifest.json" and found), found
    assert found.count(".") <= 3 and "\n" not in found


def moved(stopped, tmp_path, harm):
    """The stopped run again, in another place, with one of its states harmed."""
    out, words = stopped
    shutil.copytree(folder(out), tmp_path / "out.unfinished")
    words = [tmp_path / "out" if word == out else word for word in words]
    newest, other = states(tmp_path / "out")
    for path, name in harm(newest, other):
        flip(path / name)
    return tmp_path / "out", [*words, "--save_every", 1]


def test_a_damaged_state_is_refused_for_the_one_before(straight, stopped, tmp_path):
    out, words = moved(stopped, tmp_path, lambda newest, other: [(newest, "__0_0.distcp")])
    said = go("dpo", *words, fault=partial(before, STEP, 2, kill), code=-9).out[0]  # step 4 again
    assert f"{states(out)[0]} is refused: __0_0.distcp has changed" in said and "3 steps done" in said
    assert [state.damage(path) for path in states(out)] == ["", ""]
    assert "4 steps done" in go("dpo", *words).out[0]
    same(out, straight("dpo"))


def test_a_refused_state_does_not_count_as_one_of_the_last_two(stopped, straight, tmp_path):
    """Refused, step 4 lies ahead of what is saved next: an online round's end, or a state saved by the clock."""
    out, words = moved(stopped, tmp_path, lambda newest, other: [(newest, ".metadata")])
    ahead = states(out)[0]
    os.rename(ahead, ahead.with_name("step-00000099"))
    go("dpo", *words, fault=partial(before, STEP, 3, kill), code=-9)
    assert [p.name for p in states(out)] == ["step-00000005", "step-00000004"]
    go("dpo", *words)
    same(out, straight("dpo"))


def test_two_damaged_states_are_one_line_and_nothing_is_deleted(stopped, tmp_path):
    out, words = moved(stopped, tmp_path, lambda newest, other: [(newest, "state.json"), (other, "manifest.json")])
    before = content(tmp_path)
    line = refused("dpo", *words)
    assert line == (f"error: no saved state in {folder(out)}/resume is whole; copy it again, or start over with "
                    "--resume never")
    assert content(tmp_path) == before


def test_settings_that_are_lost_or_damaged(stopped, tmp_path):
    out, words = moved(stopped, tmp_path, lambda newest, other: [])
    settings = folder(out) / "run.json"
    settings.write_bytes(b"{" + settings.read_bytes())
    before = content(tmp_path)
    assert "run.json is damaged" in refused("dpo", *words)
    settings.unlink()
    assert "run.json is missing" in refused("dpo", *words) and content(tmp_path).items() < before.items()


def test_a_log_that_was_cut_or_lost(stopped, straight, tmp_path):
    """A killed run may leave half a line, which may end inside a character; the log may be lost as a whole."""
    out, words = moved(stopped, tmp_path, lambda newest, other: [])
    log = folder(out) / "log.jsonl"
    text = log.read_bytes()
    log.write_bytes(text + '{"step": 5, "tokens": "é'.encode()[:-1])
    go("dpo", *words, fault=partial(before, STEP, 2, kill), code=-9)
    rows = tiny.read(log)
    assert [row["step"] for row in rows if "step" in row] == [1, 2, 3, 4, 5]
    assert sum("argv" in row for row in rows) == 2
    log.unlink()
    go("dpo", *words)
    assert [row["step"] for row in steps(out)] == [6]
    assert (out / "model.safetensors").read_bytes() == (straight("dpo") / "model.safetensors").read_bytes()


# --- a full disk ---

REFERENCE = "train_dpo:reference_logps"


@pytest.mark.parametrize("name, target, limit, at, words", [
    ("sft", "state:States.save", 20_000, 2, "cannot save the state {out}.unfinished/resume/step-00000002: "),
    ("sft", "state:States.save", 5_000, 1, "cannot save the state {out}.unfinished/resume/step-00000001: "),
    ("sft", "state:States.save", 0, 1, "cannot save the state {out}.unfinished/resume/step-00000001: "),
    ("sft", "state:States.seal", 10, 3, "cannot write {out}.unfinished/resume/.step-00000003.partial/manifest.json: "),
    ("dpo", REFERENCE, 100, 1, "cannot write {out}.unfinished/reference-"),
    ("online", "train_dpo:append_rows", 100, 2, "cannot write {out}.unfinished/completions-1.jsonl: "),
    ("online", "train_dpo:write_rows", 100, 1, "cannot write {out}.unfinished/pairs-1.jsonl: "),
    ("sft", "run:write_checkpoint", 20_000, 1, "cannot write {out}.unfinished/at-50: "),
    ("sft", "run:write_checkpoint", 20_000, 2, "cannot write {out}: "),
    ("rm", "run:write_checkpoint", 0, 2, "cannot write {out}: "),
    ("sft", "common:Log.step", 2000, 3, "cannot write {out}.unfinished/log.jsonl: ")])
def test_a_full_disk_is_one_line_and_nothing_is_lost(inputs, straight, tmp_path, name, target, limit, at, words):
    out = tmp_path / "out"
    shutil.copytree(straight("sft", "--seed", 1), out)
    before = content(out)
    command = [*flags(inputs, name), "--out", out, "--save_every", 1, "--keep", 50]
    line = refused(name, *command, fault=partial(full_disk, target, limit, at=at))
    assert line.startswith("error: " + words.format(out=out)), line
    assert content(out) == before and all(state.damage(path) == "" for path in states(out))
    go(name, *command)
    same(out, straight(name, "--keep", 50))


# --- losses that are no numbers ---

def not_a_number(rank, where, target):
    """The loss of a row, by its "file:line", is NaN."""
    def make(plain):
        def add(self, items, **values):
            spoilt = torch.tensor([torch.nan if item.where.endswith(where) else 1.0 for item in items])
            loss = values["loss"]
            values["loss"] = (loss[0] * spoilt, loss[1]) if isinstance(loss, tuple) else loss * spoilt
            return plain(self, items, **values)
        return add
    patched(target, make, rank)


@pytest.mark.parametrize("name, ranks", [("sft", 1), ("rm", 1), ("dpo", 2)])
def test_a_loss_that_is_no_number_names_its_row(inputs, straight, tmp_path, name, ranks):
    """And nothing that is on the disk changes."""
    out = tmp_path / "out"
    words, file = [*flags(inputs, name), "--out", out], "sft.jsonl" if name == "sft" else "pairs.jsonl"
    go(name, *words, ranks=ranks, fault=partial(before, STEP, 3, term), code=143)
    saved = content(folder(out) / "resume")
    done = go(name, *words, ranks=ranks, fault=partial(not_a_number, where=":7", target="meter:Meter.add"), code=None)
    lines = [line for err in done.err for line in err.splitlines() if line.startswith("error: ")]
    assert f"error: the loss of {inputs / file}:7 is not a number: nothing was updated; mend or remove the row" in lines
    assert not {0, 143} & set(done.codes) and content(folder(out) / "resume") == saved and not out.exists()
    go(name, *words, ranks=ranks)
    same(out, straight(name, ranks=ranks))


@pytest.mark.parametrize("name", ["sft", "rm", "dpo"])
def test_weights_that_diverge(inputs, tmp_path, name):
    words = [*flags(inputs, name), "--out", tmp_path / "out", "--save_every", 1]
    go(name, *words, fault=partial(before, STEP, 2, kill), code=-9)
    saved = content(folder(tmp_path / "out") / "resume")
    line = refused(name, *words, "--lr", 1e30)
    assert "is not a number: nothing was updated" in line or "the gradient norm is" in line
    assert content(folder(tmp_path / "out") / "resume" / "step-00000001").items() <= {
        k.removeprefix("step-00000001/"): v for k, v in saved.items()}.items()
    assert not (tmp_path / "out").exists()


# --- the disk lies ---

def flipped(rank):
    """A bit of the weights flips between writing and reading back."""
    def make(plain):
        def verify(written, *rest):
            if rank == 0:
                flip(written / "model.safetensors")
            common.barrier()
            return plain(written, *rest)
        return verify
    patched("run:verify", make, rank)


@pytest.mark.parametrize("name, ranks", [("sft", 1), ("dpo", 2)])
def test_what_was_written_is_read_back(inputs, straight, tmp_path, name, ranks):
    out = tmp_path / "out"
    shutil.copytree(straight("sft", "--seed", 1), out)
    old, words = content(out), [*flags(inputs, name), "--out", out, "--save_every", 3]
    done = go(name, *words, ranks=ranks, fault=flipped, code=None)
    lines = [line for err in done.err for line in err.splitlines() if line.startswith("error: ")]
    line, = lines
    assert line.startswith(f"error: {folder(out)}: tensor ") and "is not what was written" in line
    assert 0 not in done.codes and content(out) == old and [p.name for p in states(out)] == ["step-00000003"]
    assert "3 steps done" in go(name, *words, ranks=ranks).out[0]
    same(out, straight(name, ranks=ranks))


# --- ranks that die ---

@pytest.mark.parametrize("act, code", [(kill, -9), (broken, 1)])
def test_when_a_rank_dies_the_other_ends_by_itself(inputs, straight, tmp_path, act, code):
    words = [*flags(inputs, "dpo"), "--out", tmp_path / "out", "--save_every", 1]
    begin = time.time()
    done = go("dpo", *words, ranks=2, code=None, fault=partial(before, STEP, 3, act, only=1))
    assert done.codes == [1, code] and time.time() - begin < 30  # the harness would have ended it with kill -9
    assert "2 steps done" in go("dpo", *words, ranks=2).out[0]
    same(tmp_path / "out", straight("dpo", ranks=2))


def late(rank):
    """Rank 0 asks first where rank 1 is: what rank 1 said before it died must not be the answer."""
    time.sleep(2 * rank)


# what happens in each attempt of torchrun
STORIES = {"dies": [partial(before, STEP, 4, kill, only=1), late],
           "slow": [partial(patched, STEP, lambda plain: lambda *args: (time.sleep(0.7), plain(*args))[1])]}


def one_rank(pids, story, name, *words):
    """What torchrun starts: notes its process, lets happen what the story has for this attempt, and trains."""
    with open(pids, "a", encoding="utf-8") as f:
        f.write(f"{os.getpid()}\n")
    STORIES[story][int(os.environ["TORCHELASTIC_RESTART_COUNT"])](int(os.environ["RANK"]))
    SCRIPTS[name].main(parse_config(SCRIPTS[name].Config, list(words)))
    torch.distributed.destroy_process_group()


def torchrun(here, story, name, *words, restarts=0):
    """Starts two ranks -> the process, to be waited for, with its output as text."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               f"--max-restarts={restarts}", __file__, here / "pids", story, name, *words]
    return subprocess.Popen([str(word) for word in command], env=tiny.environment(), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def end(process):
    """What it said, when it has ended: of its own accord within the time of a slow machine."""
    try:
        return process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.terminate()  # not kill: torchrun takes its ranks with it
        raise


def all_gone(here):
    """How many ranks there were; none is left."""
    pids = [int(line) for line in (here / "pids").read_text(encoding="utf-8").split()]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    return len(pids)


def test_torchrun_carries_on_after_a_dead_rank(inputs, straight, tmp_path):
    words = [*flags(inputs, "sft"), "--out", tmp_path / "out"]
    process = torchrun(tmp_path, "dies", "sft", *words, "--save_every", 2, restarts=2)
    out, err = end(process)
    assert process.returncode == 0 and "step-00000002: 2 steps done" in out, err[-3000:]
    assert all_gone(tmp_path) == 4
    same(tmp_path / "out", straight("sft", ranks=2))


def test_torchrun_is_told_to_stop(inputs, straight, tmp_path):
    """SIGTERM to torchrun reaches its ranks: they save and end within the 30 seconds that it gives them."""
    words, log = [*flags(inputs, "rm"), "--out", tmp_path / "out"], folder(tmp_path / "out") / "log.jsonl"
    process = torchrun(tmp_path, "slow", "rm", *words)
    while process.poll() is None and not (log.exists() and '"step": 2' in log.read_text(encoding="utf-8")):
        time.sleep(0.05)
    begin = time.time()
    process.terminate()
    out, err = end(process)
    assert time.time() - begin < 25 and process.returncode != 0 and all_gone(tmp_path) == 2
    line, = [line for line in out.splitlines() if line.startswith("stopped by SIGTERM")]
    done = int(line.split()[4])
    assert 2 <= done < 6 and [p.name for p in states(tmp_path / "out")] == [f"step-{done:08d}"]
    assert f"{done} steps done" in go("rm", *words, ranks=2).out[0]
    same(tmp_path / "out", straight("rm", ranks=2))


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_rank(*sys.argv[1:])
