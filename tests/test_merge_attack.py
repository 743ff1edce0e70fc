"""
merge.py interrupted at every write, fed damaged files by the hundred, and given a tensor far larger than its memory.
Run: python -m pytest tests/test_merge_attack.py
"""

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from test_merge import METHODS, ROOT, family, read, run, same_bits, write  # noqa: F401
import merge  # noqa: E402
import merge_stream  # noqa: E402

KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import merge
import merge_stream
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
merge_stream.CHUNK, n = 50, [0]
{what}
def counted(*args, **kwargs):
    n[0] += 1
    if n[0] == {after}:
        {how}
    return whole(*args, **kwargs)
{where} = counted
merge.main(merge.parse_config(merge.Config))
"""
KILL, INTERRUPT = "os.kill(os.getpid(), signal.SIGKILL)", "os.kill(os.getpid(), signal.SIGINT)"
FULL = "raise OSError(28, 'No space left on device')"
WRITE, RENAME, COPY = "os.pwrite", "os.rename", "merge.shutil.copyfile"  # where the interruption comes



@pytest.mark.parametrize("how,where,after,leaves_nothing", [
    (KILL, WRITE, 4, False), (KILL, "os.fsync", 1, False), (KILL, RENAME, 1, False), (KILL, RENAME, 2, False),
    (KILL, COPY, 1, False), (KILL, "os.fsync", 9, False), (INTERRUPT, WRITE, 3, True), (FULL, WRITE, 6, True),
    (FULL, WRITE, 1, True), (FULL, "os.fsync", 2, True)])
def test_interrupted(family, how, where, after, leaves_nothing):
    """No folder of that name, nothing beside it that looks whole and is not; run again, it finishes."""
    args = ["--models", family / "a", family / "b", "--out", family / "out"]
    code = KILLED.format(root=str(ROOT), after=after, how=how, what=f"whole = {where}", where=where)
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and not (family / "out").exists()
    if how == FULL:
        assert done.stderr.startswith("error: ") and "No space left" in done.stderr and done.stderr.count("\n") == 1
    left = check_left(family)
    assert not (left and leaves_nothing)
    finishes(family, left)


def check_left(family):
    """What lies beside the models after an interruption: {name of a safetensors file: its bytes}."""
    left = [p for p in family.iterdir() if p.name not in ("a", "b", "c", "base")]
    assert all(folder.name == ".out.partial" for folder in left)
    return {file.name: file.read_bytes() for folder in left for file in folder.glob("*.safetensors")}


def finishes(family, left):
    again = run(family / "out", [family / "a", family / "b"])
    assert sorted(p.name for p in family.iterdir()) == ["a", "b", "base", "c", "out"]
    for name, data in left.items():  # a file that had its name was whole
        assert data == (family / "out" / name).read_bytes(), name
    same_bits(again, run(family / "other", [family / "a", family / "b"]))
    shutil.rmtree(family / "other")


def test_killed_at_every_write(family, monkeypatch):
    """The process ends inside each of its writes, half of which has reached the file."""
    monkeypatch.setattr(merge_stream, "CHUNK", 50)
    whole, last, left = os.pwrite, 0, {}
    while True:
        last += 1
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            count = [0]

            def half(fd, data, at):
                count[0] += 1
                if count[0] == last:
                    whole(fd, bytes(data)[:len(data) // 2], at)
                    os._exit(9)
                return whole(fd, data, at)

            os.pwrite, code = half, 1
            try:
                torch.set_num_threads(1)
                merge.main(merge.Config(models=[str(family / "a"), str(family / "b")], out=str(family / "out"), threads=2))
                code = 0
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == 0:
            break
        assert code == 9 and not (family / "out").exists()
        for name, data in check_left(family).items():
            assert left.setdefault(name, data) == data
    assert last > 25  # headers and chunks of two files
    shutil.rmtree(family / "out")
    finishes(family, left)


# ---------------------------------------------------------------------------------------------------------------------
# damaged inputs

def outcome(folder, out, method="linear"):
    """What a merge with this folder does: "refused" in one line, or "merged"; anything else fails the test."""
    good, base = folder.parent / "a", folder.parent / "base"
    try:
        run(out, [good, folder], method=method, base=base, **METHODS[method])
    except SystemExit as e:
        message = str(e.code)
        assert message.startswith("error: ") and "\n" not in message and len(message) < 2000, message
        assert not out.exists() and not list(out.parent.glob(".out*"))
        return "refused"
    shutil.rmtree(out)
    return "merged"


def test_headers_damaged_by_the_hundred(family, capsys):
    """One byte of length or header changed, a file cut or grown: refused in one line, or it still says the same."""
    rng, source = random.Random(0), write(family / "x", read(family / "a"))
    whole = (source / "model.safetensors").read_bytes()
    size = 8 + struct.unpack("<Q", whole[:8])[0]
    found = {"refused": 0, "merged": 0}
    for i in range(300):
        data = bytearray(whole)
        kind = rng.randrange(4)
        if kind == 0:
            data[rng.randrange(size)] = rng.randrange(256)
        elif kind == 1:
            data[rng.randrange(size)] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[rng.randrange(len(data)):]
        else:
            at = rng.randrange(size)
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        (source / "model.safetensors").write_bytes(data)
        result = outcome(source, family / "out")
        found[result] += 1
        if result == "merged":  # a space for a space, or the value of __metadata__: nothing that a tensor depends on
            same_bits(read(source), read(family / "a"))
        capsys.readouterr()
    assert found["refused"] > 250, found


LIES = [{"shape": [12, 13]}, {"shape": [-12, -12]}, {"shape": [12.0, 12]}, {"shape": "12"}, {"shape": None}, {"shape": [144]},
        {"dtype": "F32"}, {"dtype": "Q8"}, {"dtype": 3}, {"dtype": None}, {"data_offsets": [0, 1]}, {"data_offsets": [0]},
        {"data_offsets": [-8, 280]}, {"data_offsets": [10**18, 10**18 + 288]}, {"data_offsets": ["0", "288"]},
        {"data_offsets": None}, {"shape": [1 << 40, 1 << 40]}, {"shape": [True, 144]}]


@pytest.mark.parametrize("lie", LIES, ids=str)
def test_headers_that_lie_refused(family, lie):
    source = write(family / "x", read(family / "a"))
    data = (source / "model.safetensors").read_bytes()
    size, = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + size])
    header["model.layers.0.self_attn.q_proj.weight"] |= lie
    text = json.dumps(header).encode()
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size:])
    assert outcome(source, family / "out") == "refused"


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_json_damaged_by_the_hundred(family, file, capsys):
    """Bytes changed, cut out and put in, and values of other kinds: one line, or a merge that is the same to the bit."""
    rng, source = random.Random(1), write(family / "x", read(family / "a"), shards=2)
    whole, good = (source / file).read_bytes(), run(family / "good", [family / "a", family / "a"])
    values = [None, 0, -1, 1.5, "x", [], {}, True, [1], {"a": 1}, 1e999, "\ud800"]
    for i in range(150):
        data = bytearray(whole)
        if i % 2:
            at = rng.randrange(len(data))
            data[at:at + rng.randrange(4)] = rng.randbytes(rng.randrange(4))
        else:
            value = json.loads(whole)
            where = value
            while isinstance(where, dict) and where:
                key, inside = rng.choice(list(where)), where
                where = where[key]
                if rng.random() < 0.5:
                    break
            inside[key] = rng.choice(values)
            data = json.dumps(value).encode()
        (source / file).write_bytes(data)
        if outcome(source, family / "out") == "merged":
            same_bits(run(family / "again", [family / "a", source]), good)
            shutil.rmtree(family / "again")
        capsys.readouterr()


def test_a_file_that_shrinks_during_the_merge_refused(family, monkeypatch):
    """Headers were checked, then the file is cut: said by name, and no folder is left."""
    plain = merge.check_tokenizers

    def cut(folders):
        path = family / "b" / "model-00002-of-00003.safetensors"
        os.truncate(path, path.stat().st_size - 100)
        return plain(folders)

    monkeypatch.setattr(merge, "check_tokenizers", cut)
    with pytest.raises(SystemExit, match="model-00002-of-00003.safetensors ends inside tensor"):
        run(family / "out", [family / "a", family / "b"])
    assert sorted(p.name for p in family.iterdir()) == ["a", "b", "base", "c"]


# ---------------------------------------------------------------------------------------------------------------------
# memory

PROBE = """
import sys, threading, time
sys.path.insert(0, {root!r})
import merge
def now():
    with open("/proc/self/status", encoding="utf-8") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmRSS")) * 1024
peak, start = [0], now()
def watch():
    while True:
        peak[0] = max(peak[0], now())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
merge.main(merge.parse_config(merge.Config))
print(peak[0] - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("method,models,trim,n", [("linear", 2, "tensor", 3 * 10**8), ("ties", 1, "model", 10**8)])
def test_memory_does_not_grow_with_the_tensor(tmp_path, method, models, trim, n):
    """One tensor of 0.6 GB in every model (holes of a sparse file, so that the test writes only the result), 0.2 for TIES."""
    for i in range(models + 1):
        save_file({"model.w": torch.zeros(0, dtype=torch.bfloat16)}, write(tmp_path / str(i), {}) / "model.safetensors")
        header = json.dumps({"model.w": {"dtype": "BF16", "shape": [n], "data_offsets": [0, 2 * n]}}).encode()
        (tmp_path / str(i) / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        os.truncate(tmp_path / str(i) / "model.safetensors", 8 + len(header) + 2 * n)
    base = ["--base", str(tmp_path / str(models))] if method == "ties" else []
    done = subprocess.run([sys.executable, "-c", PROBE.format(root=str(ROOT)), "--method", method, "--models",
                           *(str(tmp_path / str(i)) for i in range(models)), *base, "--trim", trim, "--threads", "2",
                           "--out", str(tmp_path / "out")], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 2 * n
    shutil.rmtree(tmp_path)
    resident = int(done.stdout.splitlines()[-1])
    assert resident < 100e6, f"{resident / 1e6:.0f} MB on top of the imports"
