"""
What every script shares: flags, ranks and FSDP, the learning-rate schedule, atomic folders, logging and progress.

A training script sees distribution only through a few names: init_distributed(), wrap(model), all_sum(x), is_main() and
print0(). On one process each of them does nothing, so reading a script "for one GPU" is reading it for eight.

    @dataclass
    class Config:
        lr: float = 1e-3  # peak learning rate          <- the comment is the help text of --lr
    cfg = parse_config(Config)
"""

import ast
import contextlib
import dataclasses
import inspect
import io
import json
import math
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
from torch.optim.adamw import adamw
from safetensors import SafetensorError


# ---------------------------------------------------------------------------------------------------------------------
# errors and flags

def die(message):
    """One line that says what is wrong, in which file and line, and what to do; exit status 1."""
    raise SystemExit("error: " + " ".join(message.splitlines()))  # names from files may hold line breaks


def _help_texts(config_class):
    """Field name -> its trailing comment, read from the class's own source (one place for default, type and help)."""
    source = textwrap.dedent(inspect.getsource(config_class))
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokenize.generate_tokens(io.StringIO(source).readline)
                if t.type == tokenize.COMMENT}
    return {node.target.id: comments.get(node.end_lineno, "") for node in ast.parse(source).body[0].body
            if isinstance(node, ast.AnnAssign)}


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
    """Joins torchrun's group if there is one (nccl on GPUs, gloo on CPUs). Returns this rank's torch.device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return device


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
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    t = torch.as_tensor(x, dtype=torch.float64, device=device).clone()
    dist.all_reduce(t)
    return t if isinstance(x, torch.Tensor) else t.item()


def gather_list(items):
    """Concatenates every rank's list, in rank order, on every rank (small Python objects: rows, counts)."""
    if world() == 1:
        return items
    parts = [None] * world()
    dist.all_gather_object(parts, items)
    return [x for part in parts for x in part]


def wrap(model):
    """
    FSDP2: each block's parameters, gradients and optimizer state are sharded over the ranks; the tied embedding, final
    norm and head share the root's group (a tied tensor must not be split over two). One process: returned as it is.
    """
    if world() == 1:
        return model
    from torch.distributed.fsdp import fully_shard
    mesh = torch.distributed.init_device_mesh("cuda" if dist.get_backend() == "nccl" else "cpu", (world(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)  # True: no stale root weights after a no_grad pass


@contextlib.contextmanager
def unsharded(model):
    """
    Full weights on every rank for a while: sampling runs different numbers of forwards on different ranks, and sharded
    forwards that do not match would wait for each other forever. Weights must not be updated inside. A model that was
    never wrapped (a teacher, a reward model) is whole on every rank already.
    """
    parts = []
    if world() > 1:
        from torch.distributed.fsdp import FSDPModule
        parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
    if not parts:
        yield model
        return
    model._get_fsdp_state()._lazy_init()  # sampling enters at the blocks: the first to run would make itself the root
    for m in parts:
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    try:
        yield model
    finally:
        for m in parts:
            m.reshard()
            m.set_reshard_after_forward(True, recurse=False)
        # the next backward would prefetch what ran before it, here: another layer, or none, on every rank
        model._get_fsdp_state()._comm_ctx.post_forward_order.clear()


# ---------------------------------------------------------------------------------------------------------------------
# optimisation

def seed_everything(seed):
    random.seed(seed)
    torch.manual_seed(seed)


def cosine_lr(step, max_steps, peak, warmup=0, floor=0.0):
    """Learning rate of 0-based `step`: linear warm-up over `warmup` steps, then cosine from `peak` to floor * peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, max_steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class AdamW:
    """
    Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101): torch's own fused update and the same
    numbers as torch.optim.AdamW. That class is not used because its first call imports the compiler, three seconds on a
    CPU, and a recipe in miniature is many short commands.
    """

    def __init__(self, groups, betas, eps=1e-8):
        """groups: [{"params": [...], "weight_decay": float}], as torch.optim has them."""
        self.param_groups, self.betas, self.eps, self.lr = groups, betas, eps, 0.0
        self.state = {}  # parameter -> (mean of the gradient, mean of its square, step count), made at the first step

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if p not in self.state:
                    self.state[p] = torch.zeros_like(p), torch.zeros_like(p), torch.zeros((), device=p.device)
            means, squares, steps = map(list, zip(*(self.state[p] for p in params))) if params else ([], [], [])
            adamw(params, [p.grad for p in params], means, squares, [], steps, fused=True, amsgrad=False,
                  maximize=False, beta1=self.betas[0], beta2=self.betas[1], lr=self.lr,
                  weight_decay=group["weight_decay"], eps=self.eps)

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


def make_optimizer(model, weight_decay, betas=(0.9, 0.95)):
    """AdamW; matrices decay, norm weights do not. Built after wrap(), so that it sees the shards."""
    params = [(p, p.ndim >= 2 and "norm" not in name) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for p, matrix in params if matrix], "weight_decay": weight_decay},  # q_norm, k_norm: (H, D)
              {"params": [p for p, matrix in params if not matrix], "weight_decay": 0.0}]
    return AdamW([g for g in groups if g["params"]], betas)


def optimizer_step(model, optimizer, lr, max_norm):
    """Clips the global gradient norm, sets the learning rate, steps. Returns the norm before clipping; stops on NaN."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    if not math.isfinite(norm):
        die(f"the gradient norm is {norm}: nothing was updated; lower --lr, or look for a broken row in the data")
    optimizer.lr = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm


# ---------------------------------------------------------------------------------------------------------------------
# files: what is finished is never lost, and nothing half-written looks finished

def _fsync(path):
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
        _fsync(path.parent)
    except OSError as e:
        die(f"cannot write {path}: {e.strerror or e}; nothing that was finished before is lost: mend it and run again")
    finally:
        with contextlib.suppress(OSError):  # gone already, or nothing can be written there
            partial.unlink()


@contextlib.contextmanager
def atomic_dir(path):
    """
    A folder beside `path` to write into; renamed to `path` when the block ends without an error (an older `path` is
    replaced). A kill leaves at most a `.partial` folder, which the next run removes. Rank 0 writes, all ranks wait.
    """
    path = Path(path)
    partial, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    if is_main():
        shutil.rmtree(partial, ignore_errors=True)
        try:
            if old.exists() and not path.exists():
                os.rename(old, path)  # a kill came between the two renames below
            partial.mkdir(parents=True)
        except OSError as e:
            die(f"cannot write {path}: {e.strerror or e}")
    barrier()
    try:
        yield partial
        barrier()
        if is_main():
            for file in partial.rglob("*"):
                if file.is_file():
                    _fsync(file)
            _fsync(partial)
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                os.rename(path, old)  # a rename cannot replace a folder that holds files
            os.rename(partial, path)
            _fsync(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        barrier()
    except (OSError, RuntimeError, SafetensorError) as e:
        if isinstance(e, OSError) or "No space left" in str(e) or "os error" in str(e).lower():
            die(f"cannot write {path}: {getattr(e, 'strerror', None) or e}; what was finished before is intact")
        raise


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
    `step 0120/0300 | loss 0.512 | acc 0.78 | lr 5.0e-07 | 11.2k tok/s | 0.4 GB`. Rank 0 only.
    """

    def __init__(self, folder, cfg, device, max_steps, every=10, append=False):
        self.max_steps, self.every, self.tokens, self.last = max_steps, every, 0, time.time()
        self.file = open(Path(folder) / "log.jsonl", "a" if append else "w", encoding="utf-8") if is_main() else None
        self.write({"argv": sys.argv, "config": dataclasses.asdict(cfg), "commit": git_commit(), "torch":
                    torch.__version__, "python": platform.python_version(), "device": str(device),
                    "hardware": hardware(), "ranks": world(), "threads": torch.get_num_threads(),
                    "seed": getattr(cfg, "seed", None)})

    def write(self, row):
        if self.file:
            self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.file.flush()

    def step(self, step, tokens, **metrics):
        """step is 1-based; tokens: how many this step trained over all ranks; metrics: name -> number."""
        self.tokens += tokens
        self.write({"step": step, "tokens": tokens, **metrics})
        if self.file and (step % self.every == 0 or step in (1, self.max_steps)):
            rate, self.tokens, self.last = self.tokens / (time.time() - self.last + 1e-9), 0, time.time()
            shown = " | ".join(f"{k.split('/')[-1]} {v:.1e}" if k == "lr" else f"{k.split('/')[-1]} {v:.3f}"
                               for k, v in metrics.items())
            print(f"step {step:04d}/{self.max_steps:04d} | {shown} | {rate / 1e3:.1f}k tok/s | {memory_gb():.1f} GB",
                  flush=True)

    def close(self):
        if self.file:
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
