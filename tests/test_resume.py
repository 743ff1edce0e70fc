"""
Training runs that are stopped, killed and continued end with the same bytes as runs that nothing disturbed.

    python -m pytest tests/test_resume.py
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import common
import model
import optim
import run
import state
import tiny
import train_dpo
from data import Example, Item
from forked import (FILE_OPERATIONS, all_of, before, before_file_operation, calls, counted, flags, go, inputs, kill, refused, same, states,
                    steps, straight, term)

cpu = tiny.cpu
STEP = "optim:optimizer_step"


def folder(out):
    return out.with_name(out.name + ".unfinished")


# --- stopped and continued ---

CASES = [(name, (), ranks) for name in ("sft", "rm", "dpo") for ranks in (1, 2)]
CASES += [("dpo", ("--live_reference",), 1), ("dpo", ("--live_reference",), 2), ("dpo", ("--async_save",), 1),
          ("sft", ("--async_save",), 2), ("dpo", ("--param_dtype", "bfloat16"), 1), ("sft", ("--batch_tokens", 150), 1)]


@pytest.mark.parametrize("name, more, ranks", CASES, ids=lambda x: " ".join(map(str, x)) if isinstance(x, tuple) else None)
def test_stopped_killed_and_continued(inputs, straight, tmp_path, name, more, ranks):
    """SIGTERM in step 2, where a checkpoint is kept; saves behind step 4, kill -9 in step 5; then to the end."""
    words = [*flags(inputs, name), *more, "--out", tmp_path / "out", "--keep", 33, 67]
    stopped = go(name, *words, ranks=ranks, fault=partial(before, STEP, 2, term, only=ranks - 1), code=143)
    assert "stopped by SIGTERM after 2 steps" in stopped.out[0] and stopped.err == [""] * ranks
    killed = go(name, *words, "--save_every", 2, ranks=ranks, fault=partial(before, STEP, 3, kill, only=ranks - 1), code=None)
    assert killed.codes[-1] == -9 and "2 steps done" in killed.out[0]
    found = [p.name for p in states(tmp_path / "out")]
    assert found == ["step-00000004", "step-00000002"] or ("--async_save" in more and found == ["step-00000002"])
    assert f"going on from {folder(tmp_path / 'out')}/resume/{found[0]}" in go(name, *words, ranks=ranks).out[0]
    same(tmp_path / "out", straight(name, *more, "--keep", 33, 67, ranks=ranks))


@pytest.mark.parametrize("more, ranks", [((), 1), ((), 2), (("--live_reference",), 1)])
def test_online_rounds_stopped_everywhere(inputs, straight, tmp_path, more, ranks):
    """
    Nine prompts, two at a time: three parts in the first round, two in the second; each is sampled and answered greedily.
    """
    words, asked = [*flags(inputs, "online"), *more, "--out", tmp_path / "out"], tmp_path / "asked"
    count = partial(counted, asked, "train_dpo:complete")
    seen = []

    def go_on(fault, code):
        done = go("online", *words, ranks=ranks, code=code, fault=partial(all_of, [count, fault]))
        seen.append(calls(asked)[0])
        return done

    sample = "train_dpo:complete"
    go_on(partial(before, sample, 3, kill, only=0), None)  # before the second part
    go_on(partial(before, sample, 2, term, only=0), 143)  # during the second part, which is finished
    go_on(partial(before, STEP, 2, term, only=0), 143)  # the third part, and in the middle of the round
    go_on(partial(before, STEP, 1, term, only=0), 143)  # in the last step of the round
    go_on(partial(before, sample, 2, kill, only=0), None)  # the round's end is saved; nothing of the first part
    go_on(partial(before, STEP, 1, kill, only=0), None)  # all is sampled, no step is done
    go_on(partial(before, STEP, 3, term, only=0), 143)  # the last step of all
    done = go_on(partial(before, STEP, 1, kill), 0)  # there is no step left
    assert "6 steps done" in done.out[0]
    assert seen == [2, 2, 2, 0, 1, 4, 0, 0]  # three parts once; what the second kill lost, again
    same(tmp_path / "out", straight("online", *more, ranks=ranks))


@pytest.mark.parametrize("name, more, ranks", [("sft", (), 1), ("dpo", (), 2), ("online", ("--save_every", 1), 1)])
def test_two_runs_of_one_seed_are_equal(inputs, straight, tmp_path, name, more, ranks):
    go(name, *flags(inputs, name), *more, "--out", tmp_path / "out", ranks=ranks)
    same(tmp_path / "out", straight(name, ranks=ranks))


@pytest.mark.parametrize("name", ["sft", "dpo", "online"])
@pytest.mark.parametrize("ranks", [(2, 1), (1, 2)])
def test_another_number_of_ranks_goes_on_equal_to_rounding(inputs, straight, tmp_path, name, ranks):
    out = tmp_path / "out"
    words = [*flags(inputs, name), "--out", out]
    go(name, *words, ranks=ranks[0], fault=partial(before, STEP, 2, term), code=143)
    done = go(name, *words, ranks=ranks[1])
    assert (f"{ranks[1]} ranks, the state was saved on {ranks[0]}: it goes on equal to rounding, not bit for bit"
            in done.out[0])
    expected, found = (load_file(f / "model.safetensors") for f in (straight(name), out))
    for key, p in expected.items():
        assert (found[key] - p).abs().max() < 1e-4 * p.abs().max(), key
    assert [row["step"] for row in steps(out)] == [row["step"] for row in steps(straight(name))]
    for a, b in zip(steps(out), steps(straight(name))):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


# --- killed anywhere ---

def looks_whole(out, *finished):
    """OUT is missing, or what one of the finished folders is; of the states, the newest two are whole."""
    if out.exists():
        assert (out / "model.safetensors").read_bytes() in [(f / "model.safetensors").read_bytes() for f in finished]
        model.load(out)
        assert not (out / "resume").exists() and not (out / "run.json").exists()
    assert [state.damage(path) for path in states(out)[:2]] == [""] * len(states(out)[:2])


@pytest.mark.parametrize("name, more, ranks, seed", [
    ("sft", (), 1, 1), ("rm", ("--async_save",), 1, 2), ("dpo", ("--keep", 50), 1, 3), ("dpo", (), 2, 4), ("online", (), 1, 5)])
def test_killed_at_random_many_times(inputs, straight, tmp_path, name, more, ranks, seed):
    """kill -9 before one of the operations on files, again and again, where an older OUT lies; then to the end."""
    out, rng, killed, old = tmp_path / "out", random.Random(seed), 0, straight("sft", "--seed", 1)
    shutil.copytree(old, out)
    words = [*flags(inputs, name), *more, "--out", out, "--save_every", 1]
    for _ in range(6 if ranks == 1 else 3):
        done = go(name, *words, ranks=ranks, fault=partial(before_file_operation, rng.randint(1, 50), kill), code=None)
        looks_whole(out, old, straight(name, *more, ranks=ranks))
        killed += -9 in done.codes
        if set(done.codes) == {0}:
            break
    else:
        go(name, *words, ranks=ranks)
    assert killed > 1
    same(out, straight(name, *more, ranks=ranks))




def life(out, rounds, model_folder, **settings):
    """A script in miniature: `rounds` rounds of two steps with made-up gradients, without reading any data."""
    cfg = train_dpo.Config(out=str(out), prompts="p", keep=[50], save_minutes=1e6, **settings)
    net = model.load(model_folder)
    optimizer, items = optim.make_optimizer(net, 0.1), [Item((Example(np.array([5, 6]), np.array([False, True])),), "en", "file:1")]
    with run.Run(cfg, "cpu", model_folder, {"data": "d"}) as life:
        life.restore({"policy": net}, optimizer)
        for number in range(life.round, rounds + 1):
            for _ in life.batches([[0], [0]], [2]):
                for p in net.parameters():
                    p.grad = torch.full_like(p, 0.1 * (life.total + 1)) * p
                life.meter.add(items, loss=torch.ones(1))
                life.meter.check()
                norm = optim.optimizer_step(net, optimizer, 0.01, 1.0)
                life.end_step({"policy": net}, optimizer, 2, items, norm, 0.01, keep=number == rounds)
            if number < rounds:
                life.next_round({"policy": net}, optimizer)
        life.finish(net)


def forked(work, *faults):
    """Runs work() in a forked process -> its exit status."""
    child = os.fork()
    if not child:
        code = 1
        try:
            for fault in faults:
                fault(0)
            work()
            code = 0
        except SystemExit as e:
            print(e, file=sys.stderr)
            code = e.code if isinstance(e.code, int) else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def every_kill(here, base, rounds, settings, stop, rank):
    """
    In place of a script: lives killed before their 1st, 2nd, ... operation on folders, each in a folder of its own where an
    older OUT lies (and, if `stop`, where a life was stopped by SIGTERM in step `stop`); a second one goes on to the end.
    """
    count, found = partial(counted, here / "steps", STEP), []
    work = lambda: life(here / "out", rounds, base, **settings)
    common.git_commit = lambda: "two processes that take time"
    for n in itertools.count(1):
        for path in here.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(base, here / "out")
        done = stop and forked(work, partial(before, STEP, stop, term))
        killed = forked(work, count, partial(before_file_operation, n, kill, names=FILE_OPERATIONS[:4]))
        there = next(here / name for name in ("out", ".out.old") if (here / name).exists())
        old, whole = ((there / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes(),
                      all((there / name).exists() for name in ("config.json", "tokenizer.json")))
        damaged = [state.damage(path) for path in states(here / "out")[:2]]
        ended = forked(work, count)
        found.append({"before": done, "killed": killed, "ended": ended, "old": old, "whole": whole, "damaged": damaged,
                      "steps": len(calls(here / "steps"))})
        if ended == 0:
            files = {str(p.relative_to(here)): hashlib.sha256(p.read_bytes()).hexdigest() for p in here.rglob("*")
                     if p.is_file() and p.name != "log.jsonl"}
            found[-1] |= {"files": files, "log": steps(here / "out")}
        if killed != -9:
            break
    (here.parent / "found.json").write_text(json.dumps(found), encoding="utf-8")
    raise SystemExit(0)


@pytest.mark.parametrize("rounds, settings, stop", [(1, {"save_every": 1}, 0), (2, {}, 2)])
def test_killed_before_every_operation(inputs, tmp_path, rounds, settings, stop):
    """
    A whole life of two steps with a state between them; and what follows a SIGTERM in the last step of a round. Never is
    more than one step done again, and the older OUT stays until the new one is there.
    """
    (tmp_path / "here").mkdir()
    go("sft", fault=partial(every_kill, tmp_path / "here", inputs / "base", rounds, settings, stop))
    *found, last = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert last["killed"] == last["ended"] == 0 and len(found) > 20
    new = [not row["old"] for row in found]
    assert new == sorted(new) and new[-1]  # the older one, then the new one
    for n, row in enumerate(found, 1):
        assert row["before"] == (143 if stop else 0) and row["killed"] == -9 and row["ended"] == 0, (n, row)
        assert row["whole"] and not any(row["damaged"]), (n, row)
        assert row["steps"] <= (3 if rounds == 1 else 4), (n, row)
        assert row["files"] == found[0]["files"] and row["log"] == found[0]["log"], n
