"""
Training runs that are stopped, killed and continued end with the same bytes as runs that nothing disturbed.

    python -m pytest tests/test_resume.py

Mutants that these tests catch. test_stopped_*: order not skipped, a count of AdamW not saved, one state kept, the
state saved after the stop, a stop that only one rank sees, a live reference that follows. test_online_*: finished
prompts sampled again, rows appended at the wrong place. test_killed_at_random_*: states written in place, partial files
kept. test_killed_before_*: states removed before OUT has its name, a run that had ended not seen, OUT not put back, a
round's end under the name of its last step. test_reference_*, test_a_reference_*: file ignored, not checked, forgotten.
test_random_*: generators not restored. test_every_flag_*, test_other_*: --beta may change, contents not compared.
test_the_log_*: lines behind the state kept.
"""

import dataclasses
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
from safetensors.torch import load, load_file

import common
import model
import optim
import run
import state
import tiny
import train_dpo
import train_rm
import train_sft
from data import Example, Item
from forked import (FILE_OPERATIONS, STEP, all_of, before, before_file_operation, broken, calls, counted, flags, folder,
                    go, inputs, kill, patched, refused, same, start, states, steps, straight, term)

cpu = tiny.cpu


# --- stopped and continued ---

CASES = [("sft", (), 1), ("sft", (), 2), ("rm", (), 1), ("dpo", (), 1), ("dpo", (), 2)]
CASES += [("dpo", ("--live_reference",), 2), ("dpo", ("--async_save",), 1),
          ("sft", ("--async_save",), 2), ("dpo", ("--param_dtype", "bfloat16"), 1), ("sft", ("--batch_tokens", 150), 1)]


@pytest.mark.parametrize("name, more, ranks", CASES)
def test_stopped_killed_and_continued(inputs, straight, tmp_path, name, more, ranks):
    """SIGTERM in step 2, where a checkpoint is kept; saves behind step 4, kill -9 in step 5; then to the end."""
    words = [*flags(inputs, name), *more, "--out", tmp_path / "out", "--keep", 33, 67]
    stopped = go(name, *words, ranks=ranks, fault=partial(before, STEP, 2, term, only=ranks - 1), code=143)
    assert "stopped by SIGTERM after 2 steps" in stopped.out[0] and stopped.err == [""] * ranks
    killed = go(name, *words, "--save_every", 2, ranks=ranks, code=None,
                fault=partial(before, STEP, 3, kill, only=ranks - 1))
    assert killed.codes[-1] == -9 and "2 steps done" in killed.out[0]
    found = [p.name for p in states(tmp_path / "out")]
    assert found == ["step-00000004", "step-00000002"] or ("--async_save" in more and found == ["step-00000002"])
    assert f"going on from {folder(tmp_path / 'out')}/resume/{found[0]}" in go(name, *words, ranks=ranks).out[0]
    same(tmp_path / "out", straight(name, *more, "--keep", 33, 67, ranks=ranks))


@pytest.mark.parametrize("more, ranks", [((), 1), ((), 2), (("--live_reference",), 1)])
def test_online_rounds_stopped_everywhere(inputs, straight, tmp_path, more, ranks):
    """
    Nine prompts, two at a time: three parts in the first round, two in the second; each is sampled, then answered
    greedily.
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
    ("sft", (), 1, 1), ("rm", ("--async_save",), 1, 2), ("dpo", ("--keep", 50), 1, 3), ("dpo", (), 2, 4),
    ("online", (), 1, 5)])
def test_killed_at_random_many_times(inputs, straight, tmp_path, name, more, ranks, seed):
    """kill -9 before one of the operations on files, again and again, where an older OUT lies; then to the end."""
    out, rng, killed, old = tmp_path / "out", random.Random(seed), 0, straight("sft", "--seed", 1)
    shutil.copytree(old, out)
    words = [*flags(inputs, name), *more, "--out", out, "--save_every", 1]
    for _ in range(6 if ranks == 1 else 3):
        done = go(name, *words, ranks=ranks, code=None, fault=partial(before_file_operation, rng.randint(1, 50), kill))
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
    document = Example(np.array([5, 6]), np.array([False, True]))
    optimizer, items = optim.make_optimizer(net, 0.1), [Item((document,), "en", "file:1")]
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
    In place of a script: lives killed before their 1st, 2nd, ... operation on folders, each where an older OUT lies
    (and, if `stop`, where a life was stopped by SIGTERM in step `stop`); a second one goes on to the end.
    """
    count, found, first = partial(counted, here / "steps", STEP), [], here.with_name("first")
    work = lambda: life(here / "out", rounds, base, **settings)
    common.git_commit = lambda: "two processes that take time"
    shutil.copytree(base, here / "out")
    stopped = stop and forked(work, partial(before, STEP, stop, term))
    here.rename(first)
    for n in itertools.count(1):
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(first, here)
        killed = forked(work, count, partial(before_file_operation, n, kill, names=FILE_OPERATIONS[:4]))
        there = next(here / name for name in ("out", ".out.old") if (here / name).exists())
        old, whole = ((there / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes(),
                      all((there / name).exists() for name in ("config.json", "tokenizer.json")))
        damaged = [state.damage(path) for path in states(here / "out")[:2]]
        if there.name == ".out.old":  # between two renames: the next run, whatever becomes of it, puts it back
            forked(work, partial(before, "run:verify", 1, broken))
        back = (here / "out").exists()
        ended = forked(work, count)
        found.append({"before": stopped, "killed": killed, "ended": ended, "old": old, "whole": whole, "back": back,
                      "damaged": damaged, "steps": sum(calls(here / "steps"))})
        if ended == 0:
            files = {str(p.relative_to(here)): hashlib.sha256(p.read_bytes()).hexdigest() for p in here.rglob("*")
                     if p.is_file() and p.name != "log.jsonl"}
            found[-1] |= {"files": files, "log": steps(here / "out")}
        if killed != -9:
            break
    (here.parent / "found.json").write_text(json.dumps(found), encoding="utf-8")
    raise SystemExit(0)


LIVES = [(1, {"save_every": 1}, 0), (2, {}, 2)]  # rounds, settings, stopped in step


@pytest.fixture(scope="module")
def lives(inputs, tmp_path_factory):
    """What happened in the lives, side by side: they take their time."""
    folders = [tmp_path_factory.mktemp("life") for _ in LIVES]
    waiting = []
    for place, life_of in zip(folders, LIVES):
        (place / "here").mkdir()
        waiting.append(start("sft", fault=partial(every_kill, place / "here", inputs / "base", *life_of)))
    for wait in waiting:
        done = wait()
        assert done.codes == [0], done.err
    return [json.loads((place / "found.json").read_text(encoding="utf-8")) for place in folders]


@pytest.mark.parametrize("which", [0, 1])
def test_killed_before_every_operation(lives, which):
    """
    A whole life of two steps with a state between them; and what follows a SIGTERM in the last step of a round. No more
    than one step is ever done again, and the older OUT stays until the new one is there.
    """
    (rounds, settings, stop), (*found, last) = LIVES[which], lives[which]
    assert last["killed"] == last["ended"] == 0 and len(found) >= 15
    new = [not row["old"] for row in found]
    assert new == sorted(new) and new[-1]  # the older one, then the new one
    for n, row in enumerate(found, 1):
        assert row["before"] == (143 if stop else 0) and row["killed"] == -9 and row["ended"] == 0, (n, row)
        assert row["whole"] and row["back"] and not any(row["damaged"]), (n, row)
        assert row["steps"] <= (3 if rounds == 1 else 4), (n, row)
        assert row["files"] == found[0]["files"] and row["log"] == found[0]["log"], n


# --- the reference's log-probs ---

FORWARD = "train_dpo:seq_logps"


def test_reference_pass_is_stopped_and_completed(inputs, straight, tmp_path):
    """SIGTERM in the first of its batches; then kill -9 before the first step, where no state was ever saved."""
    out, asked = tmp_path / "out", tmp_path / "asked"
    words, count = [*flags(inputs, "dpo"), "--out", out], partial(counted, tmp_path / "asked", FORWARD)
    stopped = go("dpo", *words, code=143, fault=partial(all_of, [count, partial(before, FORWARD, 2, term)]))
    assert "stopped by SIGTERM after 0 steps" in stopped.out[0]
    first = calls(asked)[1]
    go("dpo", *words, code=-9, fault=partial(all_of, [count, partial(before, STEP, 1, kill)]))
    rest = calls(asked)[1]
    go("dpo", *words, fault=count)
    assert calls(asked)[1] == 0
    same(out, straight("dpo"))
    go("dpo", *words, "--seed", 0, fault=count)
    assert 0 < first < rest + first == calls(asked)[1]


def test_reference_pass_stopped_on_two_ranks(inputs, straight, tmp_path):
    words = [*flags(inputs, "dpo"), "--out", tmp_path / "out"]
    go("dpo", *words, ranks=2, code=143, fault=partial(before, FORWARD, 1, term, only=1))
    go("dpo", *words, ranks=2)
    same(tmp_path / "out", straight("dpo", ranks=2))


def test_reference_files_are_used_only_if_they_are_right(inputs, straight, tmp_path):
    out, cache, asked = tmp_path / "out", tmp_path / "cache", tmp_path / "asked"
    words = [*flags(inputs, "dpo"), "--reference_cache", cache]
    go("dpo", *words, "--out", tmp_path / "a", fault=partial(counted, asked, FORWARD))
    all_of_them = calls(asked)[1]
    go("dpo", *words, "--out", tmp_path / "b", "--beta", 0.3, fault=partial(counted, asked, FORWARD))
    assert calls(asked)[1] == 0 < all_of_them  # a run with other settings shares them
    path, = cache.iterdir()
    right = path.read_bytes()

    def spoilt(data, words_said, *more):
        path.write_bytes(data)
        done = go("dpo", *words, *more, "--out", out, fault=partial(counted, asked, FORWARD))
        assert f"{path} is not used ({words_said}" in done.out[0] and calls(asked)[1] == all_of_them
        assert (out / "model.safetensors").read_bytes() == (straight("dpo") / "model.safetensors").read_bytes()
        assert torch.equal(load_file(path)["logps"], load(right)["logps"])

    data = bytearray(right)
    data[-3] ^= 64
    spoilt(bytes(data), "it was made from other weights or rows, or has changed")
    spoilt(right[:-1], "")
    spoilt(b"", "")
    tiny.write(tmp_path / "pairs.jsonl", tiny.read(inputs / "pairs.jsonl")[::-1])
    words_of_c = [*words, "--pairs", tmp_path / "pairs.jsonl", "--out", tmp_path / "c"]
    go("dpo", *words_of_c, fault=partial(counted, asked, FORWARD))
    assert calls(asked)[1] == all_of_them and len(list(cache.iterdir())) == 2  # the same rows in another order
    other, = {*cache.iterdir()} - {path}
    spoilt(other.read_bytes(), "it was made from other weights or rows, or has changed")


def test_a_reference_lost_in_the_middle_of_a_round(inputs, straight, tmp_path):
    out = tmp_path / "out"
    words = [*flags(inputs, "online"), "--out", out]
    go("online", *words, code=143, fault=partial(before, STEP, 5, term))
    facts = json.loads((states(out)[0] / "state.json").read_text(encoding="utf-8"))
    path = folder(out) / f"reference-{facts['reference'][:16]}.safetensors"
    kept = path.read_bytes()
    path.unlink()
    line = refused("online", *words)
    assert line.startswith(f"error: {path} is missing or damaged, and the run goes on behind step 2")
    path.write_bytes(kept[:-1])
    assert line == refused("online", *words)
    path.write_bytes(kept)
    pairs = folder(out) / "pairs-2.jsonl"
    kept = pairs.read_bytes()
    pairs.write_bytes(kept.replace(b'"chosen": "', b'"chosen": "x', 1))
    assert refused("online", *words).startswith(f"error: {pairs} has changed since the round began")
    pairs.write_bytes(kept)
    go("online", *words)
    same(out, straight("online"))


def broken_reference(rank):
    def make(plain):
        def logps(model, items, device):
            chosen, rejected = plain(model, items, device)
            spoilt = torch.tensor([torch.nan if item.where.endswith(":7") else 0.0 for item in items])
            return chosen, rejected if torch.is_grad_enabled() else rejected + spoilt
        return logps
    patched(FORWARD, make, rank)


def test_a_reference_that_is_no_number_names_its_row(inputs, tmp_path):
    line = refused("dpo", *flags(inputs, "dpo"), "--out", tmp_path / "out", fault=broken_reference)
    assert line.startswith(f"error: the reference log-prob of {inputs / 'pairs.jsonl'}:7 is not a number")
    assert not [*folder(tmp_path / "out").glob("reference-*")]


# --- random states ---

def draws(path, rank):
    """Every step draws from both generators, on rank 1 more often, and writes down what it drew."""
    def make(plain):
        def step(*args):
            with open(f"{path}.{rank}", "a", encoding="utf-8") as f:
                for _ in range(rank + 1):
                    f.write(f"{torch.rand(()).item()} {random.random()} {random.gauss(0, 1)}\n")
            return plain(*args)
        return step
    patched(STEP, make, rank)


def test_random_generators_of_every_rank_go_on(inputs, tmp_path):
    words = flags(inputs, "sft")
    go("sft", *words, "--out", tmp_path / "a", ranks=2, fault=partial(draws, tmp_path / "a"))
    stop = partial(all_of, [partial(draws, tmp_path / "b"), partial(before, STEP, 3, term)])
    go("sft", *words, "--out", tmp_path / "b", ranks=2, code=143, fault=stop)
    go("sft", *words, "--out", tmp_path / "b", ranks=2, fault=partial(draws, tmp_path / "b"))
    a, b = ([(tmp_path / f"{name}.{rank}").read_text(encoding="utf-8").splitlines() for rank in (0, 1)]
            for name in "ab")
    assert a == b and [len(set(lines)) for lines in a] == [6, 12]


# --- settings ---

FIXED = {"model", "tokenizer", "hidden_size", "layers", "heads", "kv_heads", "intermediate_size", "init_std", "data",
         "languages", "batch_size", "batch_tokens", "max_tokens", "seed", "pairs", "lm_weight", "prompts",
         "reward_model", "rounds", "samples", "temperature", "max_new_tokens", "prompts_at_once", "margin", "beta",
         "live_reference", "max_steps", "epochs", "guards", "rejected_guards", "sft", "judge", "watch", "watch_prompts", "on_hacking"}


@pytest.mark.parametrize("script", [train_sft, train_rm, train_dpo], ids=lambda script: script.__name__)
def test_every_flag_may_change_or_is_refused_by_name(tmp_path, capsys, script):
    for field in dataclasses.fields(script.Config):
        cfg, changed = script.Config(), script.Config()
        old = getattr(cfg, field.name)
        new = not old if isinstance(old, bool) else [*old, 7] if isinstance(old, list) else old + type(old)(1)
        setattr(changed, field.name, new)
        one = run.Run.__new__(run.Run)
        one.cfg, one.folder, one.found, one.identity = changed, tmp_path, None, {"data": "d"}
        before = {"config": json.loads(json.dumps(dataclasses.asdict(cfg))), "identity": {"data": "d"}}
        said = f"--{field.name} was {old!r}, is {new!r}"
        assert (field.name in run.FREE) != (field.name in FIXED), f"--{field.name}: may it change when a run goes on?"
        if field.name in run.FREE:
            one.compare(before)
            assert capsys.readouterr().out == f"changed since the run began: {said}\n"
        else:
            with pytest.raises(SystemExit) as e:
                one.compare(before)
            assert f"other settings ({said})" in str(e.value) and "--resume never" in str(e.value)
    fields = {f.name for s in (train_sft, train_rm, train_dpo) for f in dataclasses.fields(s.Config)}
    assert run.FREE | FIXED == fields


def test_other_inputs_and_settings_are_refused(inputs, straight, tmp_path):
    shutil.copytree(inputs / "base", tmp_path / "base")
    shutil.copy(inputs / "sft.jsonl", tmp_path / "sft.jsonl")
    out = tmp_path / "out"
    words = [*flags(inputs, "sft"), "--model", tmp_path / "base", "--data", tmp_path / "sft.jsonl", "--out", out]
    go("sft", *words, code=143, fault=partial(before, STEP, 3, term))
    weights, rows = (tmp_path / "base" / "model.safetensors").read_bytes(), (tmp_path / "sft.jsonl").read_bytes()
    saved = [p.name for p in states(out)]
    for path, old, new in ((tmp_path / "base" / "model.safetensors", weights, weights[:-1] + bytes([weights[-1] ^ 1])),
                           (tmp_path / "sft.jsonl", rows, rows.replace(b'"completion": "', b'"completion": "x', 1))):
        path.write_bytes(new)
        what = "model" if path.parent.name == "base" else "data"
        assert f"(the content of the {what} was 'what it was', is 'another')" in refused("sft", *words)
        path.write_bytes(old)
    assert "other settings (--batch_size was 6, is 5)" in refused("sft", *words, "--batch_size", 5)
    assert refused("sft", *words, "--resume", "latest") == "error: --resume is auto or never, got 'latest'"
    assert [p.name for p in states(out)] == saved
    listed = go("sft", *words, "--lr", 2e-3, "--log_every", 7, fault=partial(before, STEP, 2, kill), code=-9).out[0]
    assert "changed since the run began: --log_every was 20, is 7; --lr was 0.001, is 0.002" in listed
    assert "going on" not in go("sft", *words, "--resume", "never").out[0]
    same(out, straight("sft"))
    rows = tiny.read(out / "log.jsonl")
    assert [row.get("step") for row in rows] == [None, 1, 2, 3, 4, 5, 6, None]  # started over: one header


def test_the_log_has_every_step_once(inputs, straight, tmp_path):
    """Killed behind steps that no state holds: they are logged again, once."""
    words = [*flags(inputs, "sft"), "--out", tmp_path / "out", "--save_every", 2, "--log_every", 2]
    for n, last in ((4, "step-00000002"), (2, "step-00000002"), (4, "step-00000004")):
        go("sft", *words, code=-9, fault=partial(before, STEP, n, kill))
        assert states(tmp_path / "out")[0].name == last
    go("sft", *words)
    rows = tiny.read(tmp_path / "out" / "log.jsonl")
    assert [row.get("step", sorted(row)[0]) for row in rows] == [
        "argv", 1, 2, "languages", "argv", "argv", 3, 4, "languages", "argv", 5, 6, "languages"]
    assert [row["seed"] for row in rows if "argv" in row] == [0] * 4
    assert steps(tmp_path / "out") == steps(straight("sft"))
