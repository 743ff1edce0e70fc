"""
What every script shares: flags, ranks, atomic files and folders, logging and progress.

A training script sees distribution only through a few names: init_distributed(), wrap(model) (in sharding.py), all_sum(x),
is_main() and print0(). On one process each of them does nothing, so reading a script "for one GPU" is reading it for eight.

    @dataclass
    class Config:
        lr: float = 1e-3  # peak learning rate          <- the comment is the help text of --lr
    cfg = parse_config(Config)
"""

import ast
import contextlib
import dataclasses
import datetime
import functools
import inspect
import io
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import textwrap
import time
import tokenize
import types
import typing
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError


# ---------------------------------------------------------------------------------------------------------------------
# errors and flags

def die(message):
    """One line that says what is wrong, in which file and line, and what to do; exit status 1."""
    raise SystemExit("error: " + " ".join(message.splitlines()))  # names from files may hold line breaks


def _help_texts(config_class):
    """Field name -> its trailing comment, read from the source of the class and of those it extends."""
    texts = {}
    for part in reversed(config_class.__mro__[:-1]):
        source = textwrap.dedent(inspect.getsource(part))
        comments = {t.start[0]: t.string.lstrip("# ") for t in tokenize.generate_tokens(io.StringIO(source).readline)
                    if t.type == tokenize.COMMENT}
        texts |= {node.target.id: comments.get(node.end_lineno, "") for node in ast.parse(source).body[0].body
                  if isinstance(node, ast.AnnAssign)}
    return texts


def _convert(flag, text, kind):
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            die(f"--{flag} takes true or false, got {text!r}")
        return text.lower() in ("true", "1", "yes")
    try:
        return kind(text)
    except ValueError:
        die(f"--{flag} takes {kind.__name__}, got {text!r}")


def parse_config(config_class, argv=None):
    """
    A dataclass becomes the command line: --name value, --name=value, --flag / --no-flag for booleans, several values
    for list fields; - and _ in names are the same. Typos, wrong types and missing values are errors. Returns an
    instance.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    hints, values = typing.get_type_hints(config_class), {}
    if "-h" in argv or "--help" in argv:
        texts = _help_texts(config_class)
        print((sys.modules[config_class.__module__].__doc__ or "").strip() + "\n\nflags:")
        for name, f in fields.items():
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            default = None if required else f.default_factory() if f.default is dataclasses.MISSING else f.default
            print(f"  --{name:<20} {texts.get(name, '')}  " + ("(required)" if required else f"(default: {default!r})"))
        raise SystemExit(0)
    while argv:
        word = argv.pop(0)
        name, given, inline = word.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        negated = name.startswith("no_") and name not in fields and hints.get(name[3:]) is bool
        if negated:
            name = name[3:]
        if not word.startswith("--") or name not in fields:
            die(f"unknown argument {word!r}; see --help" + (f" (did you mean --{close}?)" if (close := next(
                (f for f in fields if f.startswith(name[:4])), None)) else ""))
        kind = hints[name]
        if isinstance(kind, types.UnionType):  # str | None
            kind = next(k for k in kind.__args__ if k is not type(None))
        if typing.get_origin(kind) is list:
            words = [inline] if given else []
            while argv and not argv[0].startswith("--"):
                words.append(argv.pop(0))
            if not words:
                die(f"--{name} needs at least one value")
            values[name] = [_convert(name, w, kind.__args__[0]) for w in words]
        elif kind is bool and not given and (not argv or argv[0].startswith("--")):
            values[name] = not negated
        elif negated:
            die(f"--no-{name} takes no value")
        elif given or (argv and not argv[0].startswith("--")):
            values[name] = _convert(name, inline if given else argv.pop(0), kind)
        else:
            die(f"--{name} needs a value")
    missing = [n for n, f in fields.items() if n not in values
               and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    if missing:
        die("missing " + ", ".join(f"--{n}" for n in missing) + "; see --help")
    return config_class(**values)


# ---------------------------------------------------------------------------------------------------------------------
# ranks

def init_distributed():
    """Joins torchrun's group if there is one. Returns this rank's torch.device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        options = {}
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # one machine under torchrun, whose restarts share one store
            store, number, ranks = next(dist.rendezvous("env://"))
            # what a dead rank has said in it must not be taken for its successor's word. (On several machines attempts
            # are not counted alike, and torch makes a new store.)
            store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
            options = {"store": store, "rank": number, "world_size": ranks}
        dist.init_process_group(backend(), **options)
    return device


def backend():
    """Of every process group: gloo for what lies in the CPU's memory, and nccl for what lies in the GPUs'."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return rank() == 0


def print0(*args):
    if is_main():
        print(*args, flush=True)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def all_sum(x):
    """Sum of a number or tensor over all ranks (every rank gets it). The one collective that the losses need."""
    if world() == 1:
        return x
    t = torch.as_tensor(x, dtype=torch.float64, device="cpu").clone()
    dist.all_reduce(t)
    return t if isinstance(x, torch.Tensor) else t.item()


def gather_list(items):
    """Concatenates every rank's list, in rank order, on every rank (small Python objects: rows, counts)."""
    if world() == 1:
        return items
    parts = [None] * world()
    dist.all_gather_object(parts, items)
    return [x for part in parts for x in part]


@functools.cache
def patient_group():
    """A process group whose collectives wait for days."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))


def on_main(work):
    """What work() returns on rank 0, on every rank (small Python objects), however long it takes: requests to a server."""
    if world() == 1:
        return work()
    group, found = patient_group(), [work() if is_main() else None]
    dist.broadcast_object_list(found, src=0, group=group)
    return found[0]


def seed_everything(seed):
    random.seed(seed)
    torch.manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------------
# files: what is finished is never lost, and nothing half-written looks finished

def fsync(path):
    """A file's bytes, or a folder's entries, are on the disk when this returns."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_file(path, mode="w"):
    """A file handle; the file appears under its name, whole and on disk, only when the block ends without an error."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
        fsync(path.parent)
    except OSError as e:
        die(f"cannot write {path}: {e.strerror or e}; nothing that was finished before is lost: mend it and run again")
    finally:
        with contextlib.suppress(OSError):  # gone already, or nothing can be written there
            partial.unlink()


def recover_dir(path):
    """Rank 0: puts back the old folder `path` if a kill came between the two renames of replace_dir()."""
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        os.rename(old, path)


def replace_dir(new, path):
    """Rank 0: a finished folder takes the name `path`; what had it before goes only then."""
    old = path.with_name(f".{path.name}.old")
    for file in new.rglob("*"):
        if file.is_file():
            fsync(file)
    fsync(new)
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.rename(path, old)  # a rename cannot replace a folder that holds files
    os.rename(new, path)
    fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def writing(path):
    """A full disk, or a place where nothing can be written, is one line that names `path`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:
        if isinstance(e, OSError) or "No space left" in str(e) or "os error" in str(e).lower():
            die(f"cannot write {path}: {getattr(e, 'strerror', None) or e}; what was finished before is intact")
        raise


@contextlib.contextmanager
def atomic_dir(path):
    """
    A folder beside `path` to write into; renamed to `path` when the block ends without an error (an older `path` is
    replaced). A kill leaves at most a `.partial` folder, which the next run removes. Rank 0 writes, all ranks wait.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        if is_main():
            shutil.rmtree(partial, ignore_errors=True)
            recover_dir(path)
            partial.mkdir(parents=True)
        barrier()
        yield partial
        barrier()
        if is_main():
            replace_dir(partial, path)
        barrier()


# ---------------------------------------------------------------------------------------------------------------------
# logging

def git_commit():
    """Short commit of the code that runs, with + if the tree differs from it; "unknown" outside a git checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return (commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")) if commit.returncode == 0 else "unknown"


def hardware():
    """What the numbers of a run were measured on, in a few words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            name = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), name)
    return f"{os.cpu_count()} x {name}"


class Log:
    """
    `folder`/log.jsonl: a first line with everything needed to run it again, then one line a step; and on the console
    `step 0120/0300 | loss 0.512 | acc 0.78 | lr 5.0e-07 | 11.2k tok/s | 0.4 GB`. Rank 0 only. `kept`: rows of the run so
    far, if this one continues it; what was logged behind them is gone and will be logged again.
    """

    def __init__(self, folder, cfg, device, every=10, kept=()):
        self.every, self.tokens, self.last = every, 0, time.time()
        self.file, path = None, Path(folder) / "log.jsonl"
        if is_main():
            if kept:
                with atomic_file(path) as f:
                    f.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
            self.file = open(path, "a" if kept else "w", encoding="utf-8")
        self.write({"argv": sys.argv, "config": dataclasses.asdict(cfg), "commit": git_commit(), "torch":
                    torch.__version__, "python": platform.python_version(), "device": str(device),
                    "hardware": hardware(), "ranks": world(), "threads": torch.get_num_threads(),
                    "seed": getattr(cfg, "seed", None)})

    def write(self, row):
        if self.file:
            with writing(self.file.name):
                self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
                self.file.flush()

    def step(self, step, max_steps, tokens, metrics, **more):
        """step is 1-based; tokens: how many this step took over all ranks; metrics: name -> number; more: for the file."""
        self.tokens += tokens
        self.write({"step": step, "tokens": tokens, **metrics, **more})
        if self.file and (step % self.every == 0 or step in (1, max_steps)):
            rate, self.tokens, self.last = self.tokens / (time.time() - self.last + 1e-9), 0, time.time()
            shown = " | ".join(f"{k.split('/')[-1]} {v:.1e}" if k == "lr" else f"{k.split('/')[-1]} {v:.3f}"
                               for k, v in metrics.items())
            mfu = f" | mfu {100 * more['speed']['mfu']:.0f} %" if "mfu" in more.get("speed", {}) else ""
            print(f"step {step:04d}/{max_steps:04d} | {shown} | {rate / 1e3:.1f}k tok/s{mfu} | {memory_gb():.1f} GB",
                  flush=True)

    def close(self):
        if self.file:
            with contextlib.suppress(OSError):  # of a row that did not fit on the disk, which has been said
                self.file.close()


def memory_gb():
    """Peak memory of this process in GB: the GPU's if there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes on macOS, kilobytes on Linux


def progress(iterable, what, total=None):
    """tqdm on rank 0 of a terminal; silent in logs and pipes."""
    from tqdm import tqdm
    return tqdm(iterable, desc=what, total=total, disable=not (is_main() and sys.stderr.isatty()), leave=False)
