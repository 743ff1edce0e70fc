"""
What test_resume.py and test_faults.py share: training scripts run to a good or a bad end in processes of their own.

A server imports everything once and forks a process for each rank (Python's forkserver): a run of a tiny model takes a
tenth of the time that its imports take. A process first lets `fault(rank)` break in it what the test wants broken (a
function of this module, mostly through functools.partial), then calls the script's main().
"""

import contextlib
import functools
import gc
import itertools
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pkgutil
import random
import signal
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tiny  # first: it finds the repository

import jinja2  # noqa: F401  what a script imports late, the server imports once
import pytest
import torch
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor
from safetensors.torch import load_file

import state
import train_dpo
import train_rm
import train_sft
from common import parse_config

SCRIPTS = {"sft": train_sft, "rm": train_rm, "dpo": train_dpo, "online": train_dpo}
STEP = "optim:optimizer_step"
GUARDS = ["--guards", "truncated", "empty"]  # a tiny model speaks no language
WORDS = "one two three four five six seven trois cent quarante ثلاثمائة 三百 words".split()


# --- runs ---

@functools.cache
def server():
    """Starts it without a GPU and without the variables of torchrun."""
    context, before = multiprocessing.get_context("forkserver"), dict(os.environ)
    context.set_forkserver_preload(["forked"])
    paths = os.pathsep.join([str(tiny.ROOT), str(tiny.ROOT / "tests")])
    try:
        os.environ.clear()
        os.environ.update(tiny.environment() | {"PYTHONPATH": paths})
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def process(rank, ranks, port, said, name, flags, fault):
    """One rank of a run; what it says goes to the files said.RANK.out and said.RANK.err."""
    for number, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{said}.{rank}.{end}", os.O_WRONLY | os.O_CREAT, 0o644), number)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    signal.alarm(300)  # ranks that wait for each other for ever
    gc.disable()  # it would touch, and so copy, all that the server has imported
    torch.set_num_threads(1)
    sys.argv[:] = [f"train_{name}.py", *flags]
    if fault:
        fault(rank)
    SCRIPTS[name].main(parse_config(SCRIPTS[name].Config, flags))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@dataclass
class Ended:
    codes: list  # of the ranks: 0, 1 or 143; -9 for kill -9
    out: list  # what each rank said
    err: list


def start(name, *flags, ranks=1, fault=None):
    """Starts a run; the function that it returns waits for its end -> Ended. Ranks left behind are ended after 20 s."""
    here = Path(tempfile.mkdtemp(prefix="said-"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = [str(f) for f in flags]
    made = [server().Process(target=process, args=(rank, ranks, port, here / "said", name, flags, fault))
            for rank in range(ranks)]
    for p in made:
        p.start()

    def wait():
        multiprocessing.connection.wait([p.sentinel for p in made], 200)  # the first of them
        for p in made:
            p.join(20)
            if p.is_alive():
                p.kill()
                p.join()
        said = [[(here / f"said.{rank}.{end}") for rank in range(ranks)] for end in ("out", "err")]
        out, err = [[p.read_text(encoding="utf-8") if p.exists() else "" for p in paths] for paths in said]
        for path in here.iterdir():
            path.unlink()
        here.rmdir()
        return Ended([p.exitcode for p in made], out, err)

    return wait


def go(name, *flags, code=0, **options):
    """A run to its end, which is exit status `code` on every rank (None: whatever)."""
    done = start(name, *flags, **options)()
    assert code is None or set(done.codes) == {code}, (done.codes, *(said[-1500:] for said in done.out + done.err))
    return done


def refused(name, *flags, **options):
    """A run that ends with exit status 1 and one line: that line."""
    done = go(name, *flags, code=1, **options)
    line, = done.err[0].splitlines()
    assert line.startswith("error: "), line
    return line


# --- inputs and results ---

@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Rows of unequal lengths, a base model that has learnt to end its answers, and a reward model."""
    here, rng = tmp_path_factory.mktemp("inputs"), random.Random(1)
    text = lambda longest=9: " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))
    tiny.make_checkpoint(here / "new")
    tiny.write(here / "prompts.jsonl", [
        {"id": f"q{i}", "language": ("en", "fr")[i % 2], "prompt": WORDS[i % 13] + text(2)} for i in range(9)])
    tiny.write(here / "short.jsonl", [{"language": "en", "prompt": text(), "completion": text(1)} for _ in range(64)])
    tiny.write(here / "sft.jsonl", [{"language": "en", "prompt": text(), "completion": text()} for _ in range(11)])
    tiny.write(here / "pairs.jsonl", [
        {"language": ("en", "fr", "ar")[i % 3], "prompt": text(), "chosen": text() + " a", "rejected": text() + " b"}
        for i in range(11)])
    go("sft", "--model", here / "new", "--data", here / "short.jsonl", "--out", here / "base", "--max_steps", 60,
       "--batch_size", 32, "--lr", 1e-2, "--log_every", 1000)
    go("rm", "--model", here / "base", "--pairs", here / "pairs.jsonl", "--out", here / "rm", "--max_steps", 2)
    return here


def flags(inputs, name):
    """Six steps: more than three epochs of 11 rows, in micro-batches; online two rounds of three steps."""
    common = ["--model", inputs / "base", "--batch_size", 6, "--micro_batch_size", 2, "--lr", 1e-3, "--warmup_steps", 2,
              "--save_minutes", 1e6, "--max_steps", 3 if name == "online" else 6]
    return common + {
        "sft": ["--data", inputs / "sft.jsonl"], "rm": ["--pairs", inputs / "pairs.jsonl"],
        "dpo": ["--pairs", inputs / "pairs.jsonl"],
        "online": ["--prompts", inputs / "prompts.jsonl", "--reward_model", inputs / "rm", "--rounds", 2,
                   "--samples", 4, "--temperature", 0.6, "--max_new_tokens", 16, "--prompts_at_once", 2, *GUARDS]}[name]


@pytest.fixture(scope="session")
def straight(inputs, tmp_path_factory):
    """straight(name, *more, ranks=1): the folder of such a run that nothing disturbed."""
    @functools.cache
    def made(name, *more, ranks=1):
        out = tmp_path_factory.mktemp("straight") / "out"
        go(name, *flags(inputs, name), *more, "--out", out, ranks=ranks)
        return out
    return made


def steps(folder):
    """The lines of the steps, but for what the clock says."""
    return [{k: v for k, v in row.items() if k != "speed"} for row in tiny.read(Path(folder) / "log.jsonl")
            if "step" in row]


def of_rounds(folder):
    """The lines that are not of a step but of an online round: its samples, and what was watched behind it."""
    return [row for row in tiny.read(Path(folder) / "log.jsonl") if "round" in row and "step" not in row]


def same(out, expected):
    """Two finished folders hold the same, byte for byte, and the same steps in their logs; nothing is left beside."""
    names = [sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) for folder in (out, expected)]
    assert names[0] == names[1], names
    for name in names[0]:
        if name.startswith("reference-"):  # safetensors writes the facts in its header in any order
            a, b = (load_file(folder / name) for folder in (out, expected))
            assert a.keys() == b.keys() and torch.equal(a["logps"].nan_to_num(), b["logps"].nan_to_num())
        elif (out / name).is_file() and name != "log.jsonl":
            assert (out / name).read_bytes() == (expected / name).read_bytes(), name
    assert steps(out) == steps(expected)
    a, b = (of_rounds(where) for where in (out, expected))
    assert a == b
    one, two = ([row["languages"] for row in tiny.read(where / "log.jsonl") if "languages" in row] for where in (out, expected))
    assert len(one) == len(two) > 0
    for a, b in zip(one, two):  # another grouping of the same sum, where a run went on
        assert a.keys() == b.keys() and all(a[language] == pytest.approx(b[language]) for language in a)
    assert [p.name for p in out.parent.iterdir() if out.name in p.name] == [out.name]


def folder(out):
    """Where a run is until it has ended."""
    return out.with_name(out.name + ".unfinished")


def states(out):
    """Folders of the saved states, the newest first."""
    return state.States(folder(out) / "resume").all()


# --- faults ---

def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def term():
    os.kill(os.getpid(), signal.SIGTERM)


def broken():
    raise KeyError("a bug")


def patched(target, make, rank):
    """Puts make(plain) in the place of the function "module:name"."""
    owner, _, name = target.replace(":", ".").rpartition(".")
    owner = pkgutil.resolve_name(owner)
    setattr(owner, name, make(getattr(owner, name)))


def before(target, n, act, rank, only=None):
    """`act` before the n-th call of a function, on every rank or on one."""
    calls = itertools.count(1)

    def make(plain):
        def call(*args, **options):
            if next(calls) == n and only in (None, rank):
                act()
            return plain(*args, **options)
        return call
    patched(target, make, rank)


FILE_OPERATIONS = ("mkdir", "rename", "replace", "rmdir", "fsync", "unlink")


def before_file_operation(n, act, rank, names=FILE_OPERATIONS):
    """`act` before the n-th of the operations that change folders or wait for the disk, whoever calls it."""
    calls = itertools.count(1)

    def make(plain):
        def call(*args, **options):
            if next(calls) == n:
                act()
            return plain(*args, **options)
        return call
    for name in names:
        patched(f"os.{name}", make, rank)


def counted(path, target, rank):
    """Every call of a function on rank 0 adds a line to a file: does it record gradients?"""
    def make(plain):
        def call(*args, **options):
            if rank == 0:
                with open(path, "a", encoding="utf-8") as f:
                    f.write(f"{torch.is_grad_enabled()}\n")
            return plain(*args, **options)
        return call
    patched(target, make, rank)


def calls(path):
    """[calls that recorded gradients, calls that did not] of a counted function since the last look."""
    found = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [found.count("True"), found.count("False")]


def full_disk(target, limit, rank, at=1):
    """During the `at`-th call of a function no file may grow past `limit` bytes."""
    count = itertools.count(1)

    def make(plain):
        def call(*args, **options):
            with tiny.largest_file(limit) if next(count) == at else contextlib.nullcontext():
                return plain(*args, **options)
        return call
    patched(target, make, rank)


def all_of(faults, rank):
    for fault in faults:
        fault(rank)
