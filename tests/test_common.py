"""
common.py: flags, files that survive a kill, the schedule, the optimizer, the log, and two gloo ranks under torchrun.

    python -m pytest tests/test_common.py

As a program, this file is what those ranks and the full-disk test run: torchrun tests/test_common.py ranks DIR.
"""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import types
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest
import torch
from safetensors.torch import load_file, save_file

import common
import optim
import sharding
from common import atomic_dir, atomic_file, parse_config
from generate import generate
from model import Config as ModelConfig
from model import Transformer, load, save
from optim import cosine_lr
from tiny import largest_file

ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} | {
    "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}


# ---------------------------------------------------------------------------------------------------------------------
# flags

@dataclass
class Flags:
    """The docstring's `lr: 5` is no field."""
    out: str = "out/x"  # folder to write
    lr: float = 1e-3  # peak learning rate (#1 knob)
    max_steps: int = 10
    pack: bool = False  # put rows end to end
    shuffle: bool = True  # draw an order
    data: list[str] = field(default_factory=lambda: ["a.jsonl",
                                                     "b.jsonl"])  # files, each with optional :weight
    weights: list[float] = field(default_factory=list)  # one a file
    base: str | None = None  # checkpoint to subtract
    limit: int | None = None  # at most this many


@dataclass
class Required:
    model: str  # checkpoint
    seed: int = 0  # of everything


def refused(words, *fragments, config=Flags):
    """These words end the program with one line that holds all fragments."""
    with pytest.raises(SystemExit) as e:
        parse_config(config, words.split())
    line = e.value.code
    assert line.startswith("error: ") and "\n" not in line
    for fragment in fragments:
        assert fragment in line, line


def test_flags_have_the_fields_types():
    words = "--out y --lr 5e-4 --max_steps 3 --pack --data p.jsonl:0.9 q.jsonl:0.1 --weights 1 2.5"
    cfg = parse_config(Flags, words.split())
    assert cfg == Flags("y", 5e-4, 3, True, True, ["p.jsonl:0.9", "q.jsonl:0.1"], [1.0, 2.5])
    assert [type(v) for v in (cfg.lr, cfg.max_steps, cfg.weights[0])] == [float, int, float]
    assert parse_config(Flags, []) == Flags()


def test_command_line_is_the_default_source(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--max_steps", "7"])
    assert parse_config(Flags).max_steps == 7


def test_dashes_and_underscores_are_the_same_and_abbreviations_are_refused():
    assert parse_config(Flags, ["--max-steps", "4"]) == parse_config(Flags, ["--max_steps=4"]) == Flags(max_steps=4)
    refused("--max 4", "'--max'", "--max_steps")
    refused("--max_step 4", "'--max_step'")
    refused("--l 4", "'--l'")


def test_equals_signs_belong_to_the_value_after_the_first():
    assert parse_config(Flags, ["--out=a=b=c"]).out == "a=b=c"
    assert parse_config(Flags, ["--out="]).out == ""
    assert parse_config(Flags, ["--out=--lr"]).out == "--lr"
    assert parse_config(Flags, ["--data=a=1", "b"]).data == ["a=1", "b"]


@pytest.mark.parametrize("words,pack,shuffle", [
    ("", False, True), ("--pack --no-shuffle", True, False), ("--no_pack --shuffle", False, True),
    ("--pack true --shuffle no", True, False), ("--pack=1 --shuffle=False", True, False),
    ("--shuffle 0 --pack YES", True, False)])
def test_booleans(words, pack, shuffle):
    cfg = parse_config(Flags, words.split())
    assert (cfg.pack, cfg.shuffle) == (pack, shuffle)


def test_negative_numbers_are_values():
    cfg = parse_config(Flags, "--lr -0.5 --max_steps -3 --weights -1 -2e3 --limit -7".split())
    assert (cfg.lr, cfg.max_steps, cfg.weights, cfg.limit) == (-0.5, -3, [-1.0, -2000.0], -7)


def test_a_list_ends_at_the_next_flag_and_the_last_of_two_wins():
    cfg = parse_config(Flags, "--data x y --lr 1 --weights=3 4 --data z".split())
    assert cfg.data == ["z"] and cfg.weights == [3.0, 4.0] and cfg.lr == 1.0


def test_optional_fields_take_the_inner_type():
    cfg = parse_config(Flags, "--base folder --limit 12".split())
    assert cfg.base == "folder" and cfg.limit == 12
    refused("--limit many", "--limit", "int", "'many'")


@pytest.mark.parametrize("words,fragments", [
    ("--outs x", ["'--outs'"]), ("--max_stpes 4", ["did you mean --max_steps?"]), ("out x", ["'out'"]),
    ("-lr 1", ["'-lr'"]), ("x", ["'x'"]),
    ("--lr x", ["--lr", "float", "'x'"]), ("--lr=", ["--lr", "float"]),
    ("--max_steps 1.5", ["--max_steps", "int", "'1.5'"]),
    ("--weights 1 two", ["--weights", "float", "'two'"]), ("--pack maybe", ["--pack", "true or false", "'maybe'"]),
    ("--lr", ["--lr needs a value"]), ("--lr --out x", ["--lr needs a value"]), ("--data", ["--data", "at least one"]),
    ("--data --lr 1", ["--data", "at least one"]), ("--no-pack true", ["--no-pack", "no value"]),
    ("--no-pack=true", ["--no-pack", "no value"]), ("--no-lr 1", ["'--no-lr'"]), ("--no-data a", ["'--no-data'"]),
    ("--lr 1 2", ["'2'"]), ("--", ["'--'"])])
def test_what_is_wrong_with_a_command_line_is_said_in_one_line(words, fragments):
    refused(words, *fragments)


def test_a_field_without_default_is_required():
    assert parse_config(Required, ["--model", "m"]) == Required("m", 0)
    refused("--seed 1", "missing --model", config=Required)


def test_help_texts_are_the_trailing_comments(capsys):
    with pytest.raises(SystemExit) as e:
        parse_config(Flags, ["--lr", "1", "--help"])
    assert e.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("common.py: flags, files that survive a kill")  # the script's docstring comes first
    line = {words[0]: " ".join(words[1:]) for words in map(str.split, shown.splitlines())
            if words and words[0].startswith("--")}
    assert line["--out"] == "folder to write (default: 'out/x')"
    assert line["--lr"] == "peak learning rate (#1 knob) (default: 0.001)"
    assert line["--max_steps"] == "(default: 10)"  # no comment, and not the next field's
    assert line["--data"] == "files, each with optional :weight (default: ['a.jsonl', 'b.jsonl'])"  # of two lines
    assert line["--base"] == "checkpoint to subtract (default: None)"
    assert len(line) == 9
    with pytest.raises(SystemExit):
        parse_config(Required, ["-h"])
    shown = capsys.readouterr().out
    assert re.search(r"--model +checkpoint +\(required\)", shown) and re.search(r"--seed +of everything", shown)


def test_a_class_inside_a_function_has_help_too():
    @dataclass
    class Inner:
        a: int = 1  # first
        b: int = 2  # second
    assert common._help_texts(Inner) == {"a": "first", "b": "second"}


# ---------------------------------------------------------------------------------------------------------------------
# files

def names(folder):
    return sorted(p.name for p in Path(folder).iterdir())


def write_old(path):
    path.mkdir(parents=True)
    (path / "weights").write_text("old weights", encoding="utf-8")
    (path / "only_old").write_text("old", encoding="utf-8")


def write_new(path, fail=None):
    with atomic_dir(path) as folder:
        for name in ("weights", "config"):
            with open(folder / name, "w", encoding="utf-8") as f:
                f.write("new ")
                f.flush()
                os.fsync(f.fileno())  # half written; a place to be killed at
                f.write(name)
        if fail:
            raise fail


def content(path):
    return {p.name: p.read_text(encoding="utf-8") for p in path.iterdir()}


OLD = {"weights": "old weights", "only_old": "old"}
NEW = {"weights": "new weights", "config": "new config"}


def test_atomic_file_appears_whole(tmp_path):
    path = tmp_path / "deep" / "er" / "rows.jsonl"
    with atomic_file(path) as f:
        f.write("été 🌍\n")
        f.flush()
        assert not path.exists()
    assert path.read_bytes() == "été 🌍\n".encode() and names(path.parent) == ["rows.jsonl"]
    with atomic_file(path, "wb") as f:
        f.write(b"\x00\xff")
        f.flush()
        assert path.read_bytes() == "été 🌍\n".encode()
    assert path.read_bytes() == b"\x00\xff" and names(path.parent) == ["rows.jsonl"]
    with open(path, "rb") as reader:  # who is reading the old file reads it to its end
        with atomic_file(path) as f:
            f.write("new")
        assert reader.read() == b"\x00\xff" and path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), SystemExit("error: row 3")])
def test_an_error_inside_atomic_file_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path / "a").write_text("old", encoding="utf-8")
    for name in ("a", "b"):
        with pytest.raises(type(error)), atomic_file(tmp_path / name) as f:
            f.write("half")
            raise error
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text(encoding="utf-8") == "old"


def test_atomic_dir_replaces_the_whole_folder(tmp_path):
    path = tmp_path / "deep" / "model"
    with atomic_dir(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("1", encoding="utf-8")
        assert not path.exists() and folder.parent == path.parent  # one file system: the rename is atomic
    assert (path / "sub" / "x").read_text(encoding="utf-8") == "1" and names(path.parent) == ["model"]
    write_new(path)
    assert content(path) == NEW and names(path.parent) == ["model"]


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("shapes differ"), SystemExit("error: NaN")])
def test_an_error_inside_atomic_dir_leaves_the_old_folder(tmp_path, error):
    path = tmp_path / "model"
    write_old(path)
    with pytest.raises(type(error)) as e:
        write_new(path, fail=error)
    assert e.value is error  # an error of the program is not turned into a full disk
    assert content(path) == OLD
    write_new(path)  # and what it leaves behind (with its log) is gone after the next run
    assert content(path) == NEW and names(tmp_path) == ["model"]


def killed_before(n, work):
    """Forks; the child gets kill -9 just before its n-th file operation. Returns False if it lived to the end."""
    child = os.fork()
    if child == 0:
        calls = itertools.count()

        def armed(operation):
            def call(*args, **kwargs):
                if next(calls) == n:
                    os.kill(os.getpid(), signal.SIGKILL)
                return operation(*args, **kwargs)
            return call
        for name in ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir"):
            setattr(os, name, armed(getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_kill_9_at_every_step_of_atomic_file(tmp_path):
    def work():
        with atomic_file(path) as f:
            f.write("new ")
            f.flush()
            os.fsync(f.fileno())
            f.write("text")
    for n in itertools.count():
        path = tmp_path / str(n) / "file"
        path.parent.mkdir()
        path.write_text("old", encoding="utf-8")
        killed = killed_before(n, work)
        found = path.read_text(encoding="utf-8")
        assert found in ("old", "new text") and (killed or found == "new text"), (n, found)
        work()
        assert path.read_text(encoding="utf-8") == "new text"
        if not killed:
            break
    assert n >= 4  # folder, half-written, whole, rename, folder's entry


def test_kill_9_at_every_step_of_atomic_dir(tmp_path):
    between = 0
    for n in itertools.count():
        path = tmp_path / str(n) / "model"
        write_old(path)
        killed = killed_before(n, lambda: write_new(path))
        between += not path.exists()  # between the two renames
        assert not path.exists() or content(path) in (OLD, NEW), n
        assert killed or content(path) == NEW
        with pytest.raises(KeyError):  # the next run fails: one of the two is still there, whole
            write_new(path, fail=KeyError())
        assert content(path) in (OLD, NEW), n
        write_new(path)  # the run after it does not
        assert content(path) == NEW and names(path.parent) == ["model"], n
        if not killed:
            break
    assert n >= 10 and between == 1


def test_a_full_disk_in_atomic_file_is_one_line_and_loses_nothing(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("old", encoding="utf-8")
    for at_once in (True, False):  # the write itself fails, or the flush at the end of the block
        with pytest.raises(SystemExit) as e, largest_file(1000), atomic_file(path) as f:
            f.write("x" * (100_000 if at_once else 1001))
        assert e.value.code.startswith(f"error: cannot write {path}: ") and "\n" not in e.value.code
        assert names(tmp_path) == ["rows.jsonl"] and path.read_text(encoding="utf-8") == "old"


def test_places_where_nothing_can_be_written_are_one_line(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "x" / "y"):
        for writer in (atomic_file, atomic_dir):
            with pytest.raises(SystemExit) as e, writer(path):
                pass
            assert e.value.code.startswith(f"error: cannot write {path}: ") and "\n" not in e.value.code
    with pytest.raises(SystemExit) as e, atomic_file(tmp_path) as f:  # a folder has the name
        f.write("x")
    assert f"cannot write {tmp_path}" in e.value.code
    assert names(tmp_path) == ["file"]


def full_disk_main(path):
    """What the next test runs: a checkpoint (written by safetensors, in Rust) does not fit."""
    with largest_file(20_000):
        save(tiny_model(seed=1), path)


def test_a_full_disk_ends_a_script_with_one_line_and_status_1(tmp_path):
    path = tmp_path / "model"
    save(tiny_model(seed=0), path)
    before = (path / "model.safetensors").read_bytes()
    assert len(before) > 20_000
    done = subprocess.run([sys.executable, __file__, "full_disk", str(path)], env=ENVIRONMENT, capture_output=True,
                          timeout=300)
    lines = done.stderr.decode().strip().splitlines()
    assert done.returncode == 1 and len(lines) == 1, lines
    assert lines[0].startswith(f"error: cannot write {path}: ") and "intact" in lines[0]
    assert (path / "model.safetensors").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# optimisation

def test_cosine_lr_by_hand():
    lr = [cosine_lr(step, 12, 2.0, warmup=4, floor=0.1) for step in range(13)]
    assert lr[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]  # a quarter of the peak in step 0, never 0
    # from step 4 on: 2 (0.1 + 0.9 (1 + cos(pi (step - 4) / 8)) / 2); cos(pi/4) = 0.70710678
    assert lr[6] == pytest.approx(2 * (0.1 + 0.45 * 1.70710678))
    assert lr[10] == pytest.approx(2 * (0.1 + 0.45 * 0.29289322))
    assert lr[8] == pytest.approx(1.1) and lr[12] == pytest.approx(0.2)
    assert cosine_lr(40, 12, 2.0, 4, 0.1) == pytest.approx(0.2)  # past the end it stays at the floor
    assert [cosine_lr(s, 2, 1.0) for s in range(3)] == pytest.approx([1.0, 0.5, 0.0])
    assert cosine_lr(0, 1, 3.0) == 3.0 and cosine_lr(0, 0, 3.0) == 3.0
    assert cosine_lr(1, 2, 1.0, warmup=10) == pytest.approx(0.2)  # warm-up longer than the run


def tiny_model(seed=0, **sizes):
    return Transformer(ModelConfig(**{"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2,
                                      "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
                                      "logit_scale": 1.0, "initializer_range": 0.3} | sizes)).init_weights(seed)


def test_optimizer_decays_matrices_and_no_norms():
    model = tiny_model(use_qk_norm=True)
    model.model.layers[1].mlp.requires_grad_(False)
    optimizer = optim.make_optimizer(model, weight_decay=0.1)
    name_of = {id(p): n for n, p in model.named_parameters()}
    decayed, other = ({name_of[id(p)] for p in g["params"]} for g in optimizer.param_groups)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    attention = {f"model.layers.{i}.self_attn.{x}_proj.weight" for i in (0, 1) for x in "qkvo"}
    assert decayed == attention | {"model.embed_tokens.weight"} | {f"model.layers.0.mlp.{x}_proj.weight"
                                                                   for x in ("gate", "up", "down")}
    assert other == {"model.norm.weight"} | {f"model.layers.{i}.{x}.weight" for i in (0, 1) for x in
                                             ("input_layernorm", "self_attn.q_norm", "self_attn.k_norm")}


def test_weight_decay_by_hand():
    model = tiny_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = optim.make_optimizer(model, weight_decay=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    assert optim.optimizer_step(model, optimizer, lr=0.5, max_norm=1.0) == 0.0
    for name, p in model.named_parameters():  # no gradient: what is left is p (1 - lr * decay)
        torch.testing.assert_close(p.detach(), before[name] * (1.0 if "norm" in name else 0.95))


def test_a_model_of_matrices_only_has_one_group():
    assert len(optim.make_optimizer(torch.nn.Linear(2, 2, bias=False), 0.1).param_groups) == 1


def point():
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.data.copy_(torch.tensor([[1.0, -2.0]]))
    return layer, optim.make_optimizer(layer, weight_decay=0.1, betas=(0.8, 0.9))


def test_optimizer_step_is_clipped_adamw_written_down_again():
    """Loshchilov & Hutter's Algorithm 2 in Python floats; the second gradient is clipped from norm 5 to 1."""
    layer, optimizer = point()
    w, m, v, norms = [1.0, -2.0], [0.0, 0.0], [0.0, 0.0], []
    for t, (lr, g) in enumerate([(0.1, (0.3, 0.4)), (0.05, (-3.0, 4.0)), (0.2, (0.6, 0.0))], 1):
        layer.weight.grad = torch.tensor([g])
        norms.append(optim.optimizer_step(layer, optimizer, lr, max_norm=1.0))
        assert layer.weight.grad is None
        clip = min(1.0, 1.0 / math.hypot(*g))
        for i in range(2):
            w[i] *= 1 - lr * 0.1
            m[i] = 0.8 * m[i] + 0.2 * clip * g[i]
            v[i] = 0.9 * v[i] + 0.1 * (clip * g[i]) ** 2
            w[i] -= lr * m[i] / (1 - 0.8 ** t) / (math.sqrt(v[i] / (1 - 0.9 ** t)) + 1e-8)
        assert layer.weight.tolist()[0] == pytest.approx(w, rel=1e-5), t
    assert norms == pytest.approx([0.5, 5.0, 0.6])  # before clipping


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_optimizer_step_refuses_what_is_not_finite(bad):
    layer, optimizer = point()
    layer.weight.grad = torch.tensor([[1.0, bad]])
    with pytest.raises(SystemExit) as e:
        optim.optimizer_step(layer, optimizer, lr=0.1, max_norm=1.0)
    assert "gradient norm" in e.value.code and "nothing was updated" in e.value.code
    assert layer.weight.tolist() == [[1.0, -2.0]]


def test_seed_everything_repeats_both_generators():
    import random
    found = []
    for seed in (5, 5, 6):
        common.seed_everything(seed)
        found.append((random.random(), torch.rand(2).tolist()))
    assert found[0] == found[1] and found[0][0] != found[2][0] and found[0][1] != found[2][1]


# ---------------------------------------------------------------------------------------------------------------------
# log

def log_rows(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_log_lines(tmp_path, capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(common, "time", types.SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(common, "memory_gb", lambda: 3.14)
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", "modèle"])
    log = common.Log(tmp_path, Required("modèle", 7), "cpu", every=2)
    rows = log_rows(tmp_path)  # the first line is on disk before the first step
    assert rows[0]["argv"] == ["train.py", "--out", "modèle"] and rows[0]["config"] == {"model": "modèle", "seed": 7}
    assert [rows[0][k] for k in ("seed", "ranks", "device", "torch")] == [7, 1, "cpu", torch.__version__]
    assert rows[0]["python"] == sys.version.split()[0] and rows[0]["threads"] == torch.get_num_threads()
    assert set(rows[0]) == {"argv", "config", "commit", "torch", "python", "device", "hardware", "ranks", "threads",
                            "seed"}
    assert len(rows) == 1 and capsys.readouterr().out == ""
    for step in range(1, 6):
        now[0] += 0.5
        log.step(step, 6, 1000 * step, {"loss": 0.5123, "rewards/accuracies": 0.75, "lr": 5e-7}, speed={"mfu": 0.42})
        assert log_rows(tmp_path)[-1] == {"step": step, "tokens": 1000 * step, "loss": 0.5123,
                                          "rewards/accuracies": 0.75, "lr": 5e-7, "speed": {"mfu": 0.42}}
    assert len(log_rows(tmp_path)) == 6
    # steps 1, 2, 4 are shown: the first and every second; tokens since the line before: 1000 in 0.5 s, 2000 in
    # 0.5 s, 7000 in 1 s
    assert capsys.readouterr().out.splitlines() == [
        f"step {step:04d}/0006 | loss 0.512 | accuracies 0.750 | lr 5.0e-07 | {rate}k tok/s | mfu 42 % | 3.1 GB"
        for step, rate in ((1, "2.0"), (2, "4.0"), (4, "7.0"))]
    log.close()
    assert "modèle" in (tmp_path / "log.jsonl").read_text(encoding="utf-8")  # UTF-8, not escapes
    log = common.Log(tmp_path, Required("m"), "cpu", every=5, kept=log_rows(tmp_path)[:4])  # it goes on behind step 3
    log.step(7, 7, 1, {"loss": 1.0})
    log.close()
    assert [r.get("step") for r in log_rows(tmp_path)] == [None, 1, 2, 3, None, 7]
    assert capsys.readouterr().out.startswith("step 0007/0007 | loss 1.000 | ")  # the last step is always shown
    common.Log(tmp_path, Required("m"), "cpu").close()
    assert len(log_rows(tmp_path)) == 1  # without kept: a new file


def test_commit_and_memory(tmp_path, monkeypatch):
    assert re.fullmatch(r"[0-9a-f]{7,40}\+?|unknown", common.git_commit())
    assert 0.05 < common.memory_gb() < 500 and common.hardware()
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    assert common.git_commit() == "unknown"
    git = lambda *words: subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *words], cwd=tmp_path,
                                        check=True, capture_output=True)
    git("init")
    (tmp_path / "common.py").write_text("a", encoding="utf-8")
    git("add", "."), git("commit", "-m", "x")
    clean = common.git_commit()
    assert re.fullmatch(r"[0-9a-f]{7,40}", clean)
    (tmp_path / "common.py").write_text("b", encoding="utf-8")
    assert common.git_commit() == clean + "+"


def test_progress_is_quiet_in_a_pipe(capsys):
    assert list(common.progress([1, 2, 3], "sampling")) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------------------------------
# ranks

def test_one_process_needs_no_group(capsys):
    assert (common.rank(), common.world(), common.is_main()) == (0, 1, True)
    x, items, model = torch.ones(2), [1, 2], torch.nn.Linear(2, 2)
    assert common.all_sum(x) is x and common.all_sum(3) == 3 and common.gather_list(items) == [1, 2]
    common.barrier()
    assert sharding.wrap(model) is model
    with sharding.unsharded(model) as inside:
        assert inside is model
    common.print0("once", 2)
    assert capsys.readouterr().out == "once 2\n"


PROMPTS = [[5, 9, 11, 40], [5, 3], [5, 60, 61, 62, 63, 20], [5, 8, 8]]
# per round of sampling: (prompts, new tokens) of each rank; the second rank runs longer, then it has nothing to do
SHARES = [[(PROMPTS[:1], 3), (PROMPTS[1:], 11)], [(PROMPTS, 5), ([], 5)]]


def batch():
    """8 rows of uneven length: ids (8, 12), loss_mask. Rank r takes rows r::2: the ranks train uneven token counts."""
    g = torch.Generator().manual_seed(4)
    ids = torch.randint(1, 64, (8, 12), generator=g)
    return ids, torch.arange(12)[None] < torch.tensor([12, 3, 9, 4, 12, 2, 7, 5])[:, None]


def train_step(model, optimizer, between=lambda: None, micro_batch_size=2):
    """
    Mean NLL over the tokens of the whole batch, in micro-batches, this rank's rows only; returns (loss, norm).
    `between` runs after the last backward, before the weights change.
    """
    ids, mask = batch()
    tokens, total = mask[:, 1:].sum().item(), 0.0
    mine = list(range(8))[common.rank()::common.world()]
    for m in range(0, len(mine), micro_batch_size):
        rows = mine[m:m + micro_batch_size]
        loss = -model.token_logps(ids[rows], mask[rows]).sum() / tokens
        loss.backward()
        total += loss.item()
    between()
    return common.all_sum(total), optim.optimizer_step(model, optimizer, lr=1e-3, max_norm=1.0)


def story(model):
    """Online DPO's order of things: sample before any training, train, look, sample, train, look, and then some."""
    model = sharding.wrap(model)
    optimizer = optim.make_optimizer(model, weight_decay=0.1)
    found = {"sampled": [], "trained": [], "logps": [], "inside": [], "outside": []}
    whole = lambda: [not hasattr(p, "full_tensor") for p in model.parameters()]

    def look():
        with torch.no_grad():  # all ranks, the same rows
            found["logps"].append(model.token_logps(*batch()).double().tolist())
        found["outside"] += whole()

    def sample(shares):
        mine = shares if common.world() == 1 else [shares[common.rank()]]
        with sharding.unsharded(model):
            found["inside"] += whole()
            found["sampled"].append([generate(model, prompts, n) for prompts, n in mine])
        found["outside"] += whole()
    for shares in SHARES:
        sample(shares)
        found["trained"].append(train_step(model, optimizer))
        look()
    # whole weights gathered just before the weights change must not outlive the change
    for between in (look, lambda: sample(SHARES[0])):
        found["trained"].append(train_step(model, optimizer, between))
        look()
    return found, model


def story_without_sampling(model):
    """A forward without gradients just before the weights change, as offline DPO's evaluation would do it."""
    model, found = sharding.wrap(model), []

    def look():
        with torch.no_grad():
            found.append(model.token_logps(*batch()).sum().item())
        found.append(sum(not hasattr(p, "full_tensor") for p in model.parameters()))
    found += train_step(model, optim.make_optimizer(model, weight_decay=0.1), between=look)
    look()
    return found


def ranks_main(out):
    """One of two ranks; writes rank-0.json and rank-1.json, and a checkpoint."""
    out = Path(out)
    assert common.rank() == 0 and common.world() == 1
    device = common.init_distributed()
    from torch.distributed.fsdp import FSDPModule
    r = common.rank()
    found = {"device": str(device), "rank": r, "world": common.world(), "is_main": common.is_main()}
    common.print0("only rank 0 says this")
    found["number"], found["whole"] = common.all_sum(1.5 + r), common.all_sum(2 ** 24 + r)
    tensor = torch.tensor([1.0, 2.0]) * (r + 1)
    found["tensor"], found["untouched"] = common.all_sum(tensor).tolist(), tensor.tolist()
    found["big"] = common.all_sum(torch.tensor([2.0 ** 24, 1.0])).tolist()
    found["gathered"] = common.gather_list([["a"], [{"b": 1}, None]][r])
    found["nothing"] = common.gather_list([])
    if r == 0:
        time.sleep(0.5)
        (out / "late").write_text("", encoding="utf-8")
    common.barrier()
    found["after_barrier"] = (out / "late").exists()
    with atomic_dir(out / "folder") as folder:
        found["folder_is_there"] = folder.is_dir()
        common.Log(folder, Required("m"), device).close()
        if r == 0:
            time.sleep(0.5)
            (folder / "x").write_text("1", encoding="utf-8")
    found["folder"] = names(out / "folder")
    found["without_sampling"] = story_without_sampling(tiny_model(seed=3))
    story_found, model = story(tiny_model(seed=3))

    found |= story_found
    state = {name: p.full_tensor().detach() for name, p in model.state_dict().items()}
    found["state"] = sorted(state)
    if r == 0:
        save_file(state, out / "state.safetensors")
    save(model, out / "checkpoint")
    found["sharded"] = {n: p.to_local().numel() for n, p in model.named_parameters()}
    found["groups"] = [n for n, m in model.named_modules() if isinstance(m, FSDPModule)]
    (out / f"rank-{r}.json").write_text(json.dumps(found), encoding="utf-8")
    common.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """[what rank 0 found, what rank 1 found], the folder they wrote, and what they printed."""
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, "ranks",
               str(out)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        printed, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()  # not kill: torchrun takes its ranks with it
        printed, errors = process.communicate()
        errors = b"the ranks wait for each other\n" + errors
    assert process.returncode == 0, errors.decode()[-4000:]
    return [json.loads((out / f"rank-{r}.json").read_text(encoding="utf-8")) for r in (0, 1)], out, printed.decode()


@pytest.fixture(scope="module")
def one_process():
    return story(tiny_model(seed=3))


def test_two_ranks_know_each_other(two_ranks):
    found, _, printed = two_ranks
    known = [(f["rank"], f["world"], f["is_main"], f["device"]) for f in found]
    assert known == [(0, 2, True, "cpu"), (1, 2, False, "cpu")]
    assert printed.count("only rank 0 says this") == 1


def test_sums_and_lists_over_two_ranks(two_ranks):
    for f in two_ranks[0]:
        assert f["number"] == 1.5 + 2.5 and f["whole"] == 2 ** 25 + 1  # exact: fp32 has no 2^25 + 1
        assert f["tensor"] == [3.0, 6.0] and f["big"] == [2.0 ** 25, 2.0]
        assert f["gathered"] == ["a", {"b": 1}, None] and f["nothing"] == []
    assert [f["untouched"] for f in two_ranks[0]] == [[1.0, 2.0], [2.0, 4.0]]  # the caller's tensor keeps its value


def test_ranks_wait_for_files(two_ranks):
    found, out, _ = two_ranks
    for f in found:
        assert f["after_barrier"] and f["folder_is_there"] and f["folder"] == ["log.jsonl", "x"]
    assert log_rows(out / "folder")[0]["ranks"] == 2 and len(log_rows(out / "folder")) == 1  # one rank writes
    assert names(out) == ["checkpoint", "folder", "late", "rank-0.json", "rank-1.json", "state.safetensors"]


def test_parameters_are_sharded(two_ranks):
    for name, p in tiny_model().named_parameters():
        assert sum(f["sharded"][name] for f in two_ranks[0]) == p.numel()
        assert two_ranks[0][0]["sharded"][name] == p.numel() // 2
    for f in two_ranks[0]:
        assert f["groups"] == ["", "model.layers.0", "model.layers.1"]  # a block's weights come and go with the block
        assert all(f["inside"]) and not any(f["outside"])  # whole while sampling, sharded again after it


def test_sampling_unsharded_ends_and_is_what_one_process_samples(two_ranks, one_process):
    (first, second), expected = two_ranks[0], one_process[0]["sampled"]
    assert [len(c[0]) for c in expected[0][1]] == [11, 11, 11] and len(expected[0][0][0][0]) == 3
    for r, f in enumerate((first, second)):
        assert f["sampled"] == [[shares[r]] for shares in expected]


def test_two_ranks_train_as_one_process_does(two_ranks, one_process):
    found, out, _ = two_ranks
    expected, model = one_process
    for f in found:  # loss and norm of four steps, on both ranks
        torch.testing.assert_close(torch.tensor(f["trained"]), torch.tensor(expected["trained"]), rtol=1e-6, atol=1e-6)
    looks = torch.tensor(expected["logps"])  # after steps 1 and 2, within step 3, after 3 and 4
    for f in found:  # what was trained is what the next forward uses
        torch.testing.assert_close(torch.tensor(f["logps"]), looks, rtol=0, atol=2e-5)
    moved = (looks[1:] - looks[:-1]).abs().amax((1, 2))
    assert moved[1] == 0 and moved[[0, 2, 3]].min() > 1e-3  # far more than the tolerance
    state = load_file(out / "state.safetensors")
    for name, p in model.state_dict().items():
        torch.testing.assert_close(state[name], p, rtol=0, atol=1e-6)


def test_a_look_before_the_weights_change_does_not_keep_old_weights(two_ranks):
    before, _, loss, norm, after, whole = story_without_sampling(tiny_model(seed=3))
    assert abs(before - after) > 0.1 and whole > 0
    for f in two_ranks[0]:
        assert f["without_sampling"] == pytest.approx([before, 0, loss, norm, after, 0], rel=1e-6)


def test_full_state_is_on_rank_0_only_and_a_checkpoint_of_two_ranks_loads(two_ranks, one_process):
    found, out, _ = two_ranks
    assert found[0]["state"] == found[1]["state"] == sorted(one_process[1].state_dict())
    state = load_file(out / "state.safetensors")
    for name, p in load(out / "checkpoint").state_dict().items():
        assert torch.equal(p, state[name])


if __name__ == "__main__":
    {"ranks": ranks_main, "full_disk": full_disk_main}[sys.argv[1]](sys.argv[2])
