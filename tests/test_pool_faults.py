"""
A pool at work and what may go wrong around it: kills at every file operation, full disks, other settings, memory.

    python -m pytest tests/test_pool_faults.py

Runs that are killed are forked from this process: a few milliseconds each instead of the seconds of their imports. The
teachers are a server that counts what it is asked, and a file.
"""

import collections
import os
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial

import tiny  # first: it finds the repository

import pytest
import torch

import arbitrage
import common
import pool
import routers
from arbitrage import main
from rows import RowsOnDisk, RowWriter
from forked import before_file_operation, full_disk, kill, patched
from test_arbitrage import made, refusal  # noqa: F401  made: a fixture
from test_endpoint import serving, waits, whole  # noqa: F401  a fixture: nobody waits for a retry
from test_pool import config, lines, plain, prompts, report_of, rows_of, says  # noqa: F401  plain: a fixture

cpu = tiny.cpu


def forked(cfg, fault=lambda rank: None):
    """main(cfg) in a forked process -> its exit status, -9 if it was killed."""
    pid = os.fork()
    if not pid:
        code = 2
        try:
            signal.alarm(60)
            torch.set_num_threads(1)
            fault(0)
            main(cfg)
            code = 0
        except SystemExit as e:
            print(e, file=sys.stderr)
            code = 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def answer(payload):
    return "+" * (payload["seed"] % 3)  # some are empty


FILES = ("completions.jsonl", "sft.jsonl", "pairs.jsonl")


def content(out):
    """What a finished run is, but for time."""
    report = {k: v for k, v in report_of(out.parent, out.name).items() if k != "seconds"}
    return {name: (out / name).read_bytes() for name in FILES} | {"report": report}


@pytest.fixture
def setting(made, tmp_path, monkeypatch):
    """(here, server, setting(router, out) -> Config): two parts in either round. What only takes time is left out."""
    monkeypatch.setattr(common, "git_commit", lambda: "abc")
    monkeypatch.setattr(os, "fsync",
        lambda fd: None)  # it is counted all the same; a kill of a process does not need it
    monkeypatch.setattr(routers.Learned, "fit", lambda *_, **__: (0.0, 0.0))
    with serving(says(answer)) as server:
        stored = [{"id": f"q{i}", "language": "de", "prompt": "x", "completion": "+" * (i % 2), "tokens": 1}
            for i in range(10)]
        pool_rows = [{"name": "s", "model": server.url}, {"name": "file", "model": lines(tmp_path / "file.jsonl",
            *stored)}]
        make = lambda router, out: config(made, tmp_path, *pool_rows, prompts=prompts(tmp_path / "ten.jsonl", 10),
            router=router, scored=2,
                                          completions_at_once=4, out=str(tmp_path / out))
        yield tmp_path, server, make


def count_scores(path):
    """From now on every completion that is scored is a line of this file."""
    def make(score):
        def call(model, chat, pairs, batch_tokens):
            with open(path, "a", encoding="utf-8") as f:
                f.write("".join(f"{p}|{c}\n" for p, c in pairs))
            return score(model, chat, pairs, batch_tokens)
        return call
    patched("pool:score", make, 0)


def torn_kill(fd):
    """The last bytes of what was written are not on the disk."""
    size = os.fstat(fd).st_size
    try:
        os.ftruncate(fd, max(0, size - 7))
    except OSError:
        pass  # a folder
    kill()


def before_fsync(n, act, rank):
    """Like before_file_operation(), but `act` knows the file."""
    def make(plain):
        calls = iter(range(1, 10**6))

        def call(fd):
            if next(calls) == n:
                act(fd)
            return plain(fd)
        return call
    patched("os.fsync", make, rank)


@pytest.mark.parametrize("router, torn", [("fixed", False), ("reward", True)])
def test_a_kill_at_every_file_operation(router, torn, setting, waits):
    """The same command then makes the same files. Asked twice: at most what was under way; scored twice: one part."""
    here, server, make = setting
    scores, plain = here / "scores", pool.score
    try:
        count_scores(scores)
        main(make(router, "straight"))
        expected, once = content(here / "straight"), len(server.seen)
        scored = len(scores.read_text(encoding="utf-8").splitlines())
        assert set(server.count.values()) == {1}
        killed = 0
        for n in range(1, 200):
            server.count.clear()
            scores.write_text("", encoding="utf-8")
            shutil.rmtree(here / "out", ignore_errors=True)
            fault = partial(before_fsync, n, torn_kill) if torn else partial(before_file_operation, n, kill)
            code = forked(make(router, "out"), fault)
            if code == 0:
                break
            assert code == -9, n
            killed += 1
            main(make(router, "out"))
            assert content(here / "out") == expected, n
            times = collections.Counter(server.count.values())
            assert len(server.count) == once and times.keys() <= {1, 2} and times[2] <= 1, (n, times)
            again = len(scores.read_text(encoding="utf-8").splitlines())
            assert scored <= again <= scored + 4, (n, scored, again)
            left = [p.name for p in here.iterdir() if "out" in p.name and p.name not in ("out", ".out.unfinished.gone")]
            assert not left, (n, left)
        assert killed > (25 if torn else 35) and code == 0
    finally:
        pool.score = plain


@pytest.mark.parametrize("target, n", [("pool:score", 1), ("pool:score", 4), ("asking:Journal.add", 6),
    ("arbitrage:write_data", 1)])
def test_a_kill_in_the_middle_of_work(target, n, setting):
    here, server, make = setting
    main(make("reward", "straight"))
    server.count.clear()
    times = iter(range(1, 100))

    def fault(rank):
        patched(target, lambda plain: lambda *words, **more: kill() if next(times) == n else plain(*words, **more),
            rank)
    assert forked(make("reward", "out"), fault) == -9
    first = collections.Counter(server.count)
    main(make("reward", "out"))
    assert content(here / "out") == content(here / "straight")
    assert sum(k > 1 for k in server.count.values()) == (1 if target == "asking:Journal.add" else 0)
    assert len(first) == (6 if target == "asking:Journal.add" else 10)


@pytest.mark.parametrize("limit", [300, 700, 1500])
def test_a_full_disk(limit, setting, capfd):
    """Journals, rows and what is made of them at the end: one line, and nothing that was answered is asked again."""
    here, server, make = setting
    main(make("reward", "straight"))
    server.count.clear()
    assert forked(make("reward", "out"), lambda rank: full_disk("arbitrage:ask", limit, rank)) == 1
    line, = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert "cannot write" in line and not (here / "out").exists()
    main(make("reward", "out"))
    assert content(here / "out") == content(here / "straight")
    assert sum(k > 1 for k in server.count.values()) <= 1  # the answer that did not fit


@pytest.mark.parametrize("group, cut, kept", [(1, 0, 6), (1, 1, 5), (2, 1, 4), (3, 0, 6), (3, 40, 3), (3, 10**6, 0)])
def test_rows_that_a_kill_cut_off_go(group, cut, kept, tmp_path, monkeypatch):
    """Some 20 bytes a row; the last group that is not whole goes, and what is added then stands behind the others."""
    path, synced, fsync = tmp_path / "rows.jsonl", [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size) or fsync(fd))
    writer = RowWriter(path, group)
    writer.add([{"a": "é", "n": n} for n in range(6)])
    assert synced == [path.stat().st_size]  # it is on the disk, not on its way
    path.write_bytes(path.read_bytes()[:max(0, path.stat().st_size - cut)])
    writer = RowWriter(path, group)
    assert writer.rows == kept
    writer.add([{"n": 9}])
    found = RowsOnDisk(path).scanned()
    assert writer.rows == len(found) == kept + 1 and [found[n]["n"] for n in (kept, *range(kept))] == [9, *range(kept)]


# --- other settings ---

@pytest.fixture
def stopped(setting, made):
    """A run that is not finished, as one of its teachers is away, and its flags."""
    here, server, make = setting
    with serving(lambda handler, payload, times: handler.send(401, b"{}")) as away:
        flags = vars(make("reward", "out"))
        lines(here / "pool.jsonl", *tiny.read(here / "pool.jsonl"), {"name": "away", "model": away.url})
        main(arbitrage.Config(**flags))
        assert (here / "out.unfinished").exists() and len(server.seen) == 10
        yield here, server, flags


def test_settings_that_change_what_was_answered(stopped, made):
    here, server, flags = stopped
    teachers = tiny.read(here / "pool.jsonl")
    base = "out.unfinished holds an unfinished run with another "
    for change, words in (({"seed": 1}, "seed:"), ({"languages": ["de"]}, "languages:"),
            ({"reward_model": str(made / "rm-south")}, "reward model:"),
                          ({"judge": str(made / "rm-south")}, "judge:"), ({"router": "fixed"}, "router, another "),
                          ({"prompts": prompts(here / "more.jsonl", 11)}, "prompts:"),
                          ({"seed": 1, "judge": str(made / "rm-south")}, "seed, another judge:"),
                          ({"pool": lines(here / "p.jsonl", teachers[0] | {"temperature": 0.5}, *teachers[1:])},
                          "teacher s:")):
        refusal(base, words, "--resume never to throw it away", **flags | change)
    lines(here / "file.jsonl", *(r | {"completion": "other"} for r in tiny.read(here / "file.jsonl")))
    refusal(base, "teacher file:", **flags)
    assert len(server.seen) == 10
    main(arbitrage.Config(**flags | {"seed": 1, "resume": "never"}))
    assert len(server.seen) == 20 and len(set(server.count)) == 20


def test_a_kill_while_an_unfinished_run_is_thrown_away(stopped):
    """One file goes at a time; while there are answers, run.json says whose they are."""
    here, server, flags = stopped
    folder, flags = here / "out.unfinished", flags | {"seed": 1}
    for left in range(len(list(folder.iterdir())) - 1, 1, -1):
        fault = partial(before_file_operation, 2, kill, names=("unlink",))
        assert forked(arbitrage.Config(**flags | {"resume": "never"}), fault) == -9
        assert len(list(folder.iterdir())) == left and (folder / "run.json").exists()
        if list(folder.glob("*.jsonl")):
            refusal("another seed:", **flags)
    assert len(server.seen) == 10


def test_what_may_change(stopped):
    """Flags of routing and sending; a teacher that is added, taken out, or mended before it said anything."""
    here, server, flags = stopped
    old = tiny.read(here / "pool.jsonl")
    flags = flags | {"margin": 0.5, "threads": 3, "completions_at_once": 2, "rejected_guards": []}
    with serving(says(lambda payload: "++++")) as other:
        lines(here / "pool.jsonl", {"name": "new", "model": other.url}, old[0], {"name": "away", "model": other.url})
        main(arbitrage.Config(**flags))
        assert len(server.seen) == 10 and len(other.seen) == 20
    assert list(report_of(here)["teachers"]) == ["new", "s", "away"] and not (here / "out.unfinished").exists()
    assert {r["teacher"] for r in rows_of(here, "sft")} == {"new"}


def test_picks_belong_to_a_pool(stopped):
    """A router that picks: no teacher more or less; another order is the same."""
    here, server, flags = stopped
    flags, old = flags | {"router": "fixed", "out": str(here / "fixed")}, tiny.read(here / "pool.jsonl")
    main(arbitrage.Config(**flags))
    expected, seen = rows_of(here, "sft", "fixed"), len(server.seen)
    for rows_ in (old[:2], [*old, {"name": "more", "model": old[1]["model"]}]):
        lines(here / "pool.jsonl", *rows_)
        refusal("with another pool:", **flags)
    lines(here / "pool.jsonl", *old[::-1])
    main(arbitrage.Config(**flags))
    assert len(server.seen) == seen
    picked = lambda rows: [(r["id"], r["teacher"]) for r in rows
        if r["id"] > "q3"]  # the others are the sample, with ties
    assert picked(rows_of(here, "sft", "fixed")) == picked(expected) and len(picked(expected)) > 2


def test_two_runs_in_one_folder(setting):
    """The second is refused while the first one asks; when the first has ended, it has lost nothing."""
    here, server, make = setting
    going, go_on = threading.Event(), threading.Event()

    def behave(handler, payload, times):
        going.set()
        go_on.wait(30)
        handler.send(200, whole(payload, answer(payload)))
    server.behave, cfg = behave, make("reward", "out")
    ended = []
    first = threading.Thread(target=lambda: ended.append(forked(cfg)))
    first.start()
    assert going.wait(30)
    refusal(f"another run works in {here / 'out.unfinished'}: wait for it to end", **vars(cfg))
    refusal("another run works", **vars(cfg) | {"resume": "never", "seed": 9})
    go_on.set()
    first.join(60)
    assert ended == [0] and set(server.count.values()) == {1} and len(rows_of(here)) == 20


# --- memory ---

MEMORY = """
import json, resource, sys
sys.path[:0] = sys.argv[1:3]
import tiny, torch
torch.cuda.is_available = lambda: False
from arbitrage import Config, main
def run(n):
    with open(f"{sys.argv[3]}/{n}.jsonl", "w", encoding="utf-8") as f:
        for i in range(n):
            for t in "xyz":
                f.write(json.dumps({"id": f"q{i}", "language": "en", "prompt": f"prompt {i}",
                                    "completion": f"{t} {i} " + "word " * 800,
                                    "teacher": t, "flags": [], "tokens": 9, "reward": i % 7 + ord(t) % 5}) + "\\n")
    main(Config(completions=[f"{sys.argv[3]}/{n}.jsonl"], out=f"{sys.argv[3]}/out-{n}"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("peaks", run(500), run(5000))
"""


def test_texts_are_not_held(tmp_path):
    """Ten times the completions, 54 MB more of text (in a subprocess): its memory grows by a fraction of that."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tiny.ROOT), str(tiny.ROOT / "tests"), str(tmp_path)],
        capture_output=True,
                          text=True, env=tiny.environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    small, large = map(int, done.stdout.splitlines()[-1].split()[1:])
    assert (tmp_path / "5000.jsonl").stat().st_size - (tmp_path / "500.jsonl").stat().st_size > 50e6
    assert large - small < 12_000, (small, large)  # kilobytes
