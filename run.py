"""
The life of a training run on disk, the same for all three training scripts: where it writes while it runs, what it saves
to go on from, how it stops, and how its result takes the place of an older one.

    OUT.unfinished/            while it runs: log.jsonl, what is kept on the way, resume/ (state.py)
    OUT/                       when it has ended: a checkpoint, read back and compared before anything old goes

The same command again goes on where the last state was saved (--resume auto), bit for bit on as many ranks as before.
"""

import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import meter
from checkpoint import Checkpoint
from common import (Log, all_sum, atomic_file, barrier, die, fsync, gather_list, is_main, memory_gb, print0, rank,
                    recover_dir, replace_dir, world, writing)
from data import split_batch
from model import write_checkpoint
from sharding import first_row, local, wrap
from state import States, tensors_of

CHUNK = 1 << 26  # bytes hashed at once


@dataclass
class RunConfig:
    micro_batch_tokens: int = 16384  # tokens per forward on one rank, rows packed without padding (at least one row)
    micro_batch_size: int = 0  # most rows per forward on one rank (0: as many as --micro_batch_tokens holds)
    param_dtype: str = ""  # float32 or bfloat16, of the matmuls; weights are float32 (default: bfloat16 on a GPU)
    save_dtype: str = ""  # of the checkpoint that is written (default: that of --model)
    activation_checkpointing: bool = False  # compute a block's inside again in the backward pass instead of keeping it
    compile: bool = False  # torch.compile, block by block
    cpu_offload: bool = False  # keep weights, gradients and optimizer state in the CPU's memory
    reduce_every: bool = False  # sum gradients over ranks after every micro-batch: slower, no whole gradients held
    resume: str = "auto"  # auto: go on where the same command stopped; never: start over
    save_every: int = 0  # steps between saved states (0: by the clock alone)
    save_minutes: float = 15.0  # minutes between saved states
    async_save: bool = False  # write states while training goes on (costs a copy in the CPU's memory)
    keep: list[int] = field(default_factory=list)  # percents of the (last round's) steps: also keep OUT/at-50 ...
    log_every: int = 20  # steps between lines on the console


# what may change when a run goes on; every other flag changes what is trained
FREE = {"micro_batch_tokens", "micro_batch_size", "param_dtype", "save_dtype", "activation_checkpointing", "compile",
        "cpu_offload", "reduce_every", "resume", "save_every", "save_minutes", "async_save", "log_every", "keep", "lr",
        "min_lr", "warmup_steps", "weight_decay", "clip", "out", "reference_cache"}


def param_dtype(cfg):
    """The dtype of the matmuls."""
    name = cfg.param_dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    if name not in ("float32", "bfloat16") or cfg.save_dtype not in ("", "float32", "bfloat16", "float16"):
        die(f"--param_dtype is float32 or bfloat16, --save_dtype those or float16; got {name!r}, {cfg.save_dtype!r}")
    return getattr(torch, name)


def save_dtype(cfg, model):
    """The dtype of the checkpoint that is written."""
    return getattr(torch, cfg.save_dtype) if cfg.save_dtype else model.stored


def prepared(cfg):
    """Checks the flags -> their way to shard a model, for model.load(wrap=...)."""
    for name in ("micro_batch_tokens", "batch_size", "log_every", "samples", "rounds", "prompts_at_once", "max_tokens"):
        if getattr(cfg, name, 1) < 1:
            die(f"--{name} is at least 1, got {getattr(cfg, name)}")
    for name in ("micro_batch_size", "batch_tokens", "save_every", "max_steps", "epochs", "clip", "warmup_steps",
                 "watch"):
        if getattr(cfg, name, 0) < 0:
            die(f"--{name} is at least 0, got {getattr(cfg, name)}")
    def shard(model):
        model.recompute = cfg.activation_checkpointing
        return wrap(model, param_dtype(cfg), cfg.cpu_offload, cfg.compile)
    return shard


def files_fingerprint(folder):
    """Hex digest of a checkpoint's config and weights, whatever the number of ranks; they share the reading."""
    stored = Checkpoint(folder)
    files = [stored.folder / "config.json", *(stored.folder / f for f in sorted(set(stored.file.values())))]
    pieces = [(path, at) for path in files for at in range(0, path.stat().st_size, CHUNK)]
    found = []
    for n in range(rank(), len(pieces), world()):
        with open(pieces[n][0], "rb") as f:
            f.seek(pieces[n][1])
            found.append((n, hashlib.sha256(f.read(CHUNK)).hexdigest()))
    return hashlib.sha256("".join(sha for _, sha in sorted(gather_list(found))).encode()).hexdigest()


def weights_fingerprint(model):
    """Hex digest of the weights as they are now; another number of ranks gives another one."""
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(local(p.detach()).contiguous().view(-1).view(torch.uint8).cpu().numpy())
    return hashlib.sha256("".join(gather_list([digest.hexdigest()])).encode()).hexdigest()


def verify(folder, model, dtype):
    """
    Reads back what was written, every rank its rows, from the disk rather than from the page cache, and compares it with
    the weights; ends with the tensor's name.
    """
    for path in sorted(folder.glob("*.safetensors")) if is_main() else []:
        with open(path, "rb") as f:
            os.fsync(f.fileno())
            if hasattr(os, "posix_fadvise"):  # not on macOS
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    barrier()
    stored = Checkpoint(folder)
    for name, p in model.named_parameters():
        part = local(p.detach()).to(dtype)
        back = torch.empty_like(part, device="cpu")
        if part.numel():
            stored.read_into(name, back, first_row(p))
        if not torch.equal(back, part.cpu()):
            die(f"{folder}: tensor {name} is not what was written: disk or memory are at fault; the checkpoint that was "
                "there before is intact, and so is the saved state")


class Run:
    """
    `with Run(cfg, device, source, identity) as run:` opens the folder, or the one that the same command left unfinished;
    then `run.round` and `run.step` say how far it had come (steps done in this round). `source`: checkpoint folder with
    the tokenizer. `identity`: name -> digest of what else the run depends on (model, data); an unfinished run whose
    identity or settings differ is refused, with the differences. `config`: what the checkpoint's config.json adds.
    """

    def __init__(self, cfg, device, source, identity, **config):
        self.cfg, self.source, self.identity, self.config, self.out = cfg, source, identity, config, Path(cfg.out)
        self.folder = self.out.with_name(self.out.name + ".unfinished")
        self.round, self.step, self.total, self.facts = 1, 0, 0, {}  # total: steps of all rounds
        self.meter, self.stopping = meter.Meter(), False
        self.peak = meter.peak_flops() if param_dtype(cfg) == torch.bfloat16 else None
        self.states, self.found = States(self.folder / "resume", cfg.async_save), None
        if cfg.resume not in ("auto", "never"):
            die(f"--resume is auto or never, got {cfg.resume!r}")
        for percent in cfg.keep:
            if not 0 < percent < 100:
                die(f"--keep {percent}: a percent of the steps, 1 to 99; the last step is kept anyway")
        settings = {"config": dataclasses.asdict(cfg), "identity": identity}
        ended = cfg.resume == "auto" and not self.folder.exists() and self.settings_in(self.out) == settings
        barrier()  # every rank has looked
        if ended:
            self.clean()
            print0(f"{self.out} is finished, what the run needed while it ran is now gone")
            raise SystemExit(0)
        self.lock()
        try:
            self.open(device, settings)
        except BaseException:
            self.unlock()
            raise

    def open(self, device, settings):
        """Goes on with the folder, or empties it."""
        cfg = self.cfg
        before = self.settings_in(self.folder) if cfg.resume == "auto" else None
        if cfg.resume == "auto" and not before and self.states.all():
            die(f"{self.folder / 'run.json'} is missing, which says whose the states beside it are: put it back, or "
                "start over with --resume never")
        if before:
            self.found = self.states.newest()
            if self.found or any(self.folder.glob("completions-*")) or any(self.folder.glob("watch-*")):
                self.compare(before)
            else:
                self.begin_again("reference-*")  # nothing else could be lost, and these are named by what they hold
        else:
            self.begin_again("reference-*" if cfg.resume == "auto" else "")
        if self.found:
            path, self.facts = self.found
            self.round, self.step, self.total = (self.facts[key] for key in ("round", "step", "total"))
            self.meter.languages = self.facts.pop("languages") if is_main() else {}
            print0(f"going on from {path}: {self.total} steps done")
        barrier()
        if is_main():
            for partial in self.folder.glob(".*.partial-*"):  # of atomic_file, in a run that was killed
                partial.unlink()
            with atomic_file(self.folder / "run.json") as f:
                json.dump(settings, f, ensure_ascii=False, indent=1)
        self.log = Log(self.folder, cfg, device, cfg.log_every, self.logged())

    def __enter__(self):
        self.before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopping", True))
        self.saved = self.stepped = time.perf_counter()
        return self

    def __exit__(self, kind, error, trace):
        signal.signal(signal.SIGTERM, self.before)
        self.log.close()
        self.unlock()

    @staticmethod
    def settings_in(folder):
        """What a run has written into its run.json; None if there is none."""
        try:
            return json.loads((folder / "run.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            die(f"{folder / 'run.json'} is damaged: put it back, or start over with --resume never")

    def lock(self):
        """One run at a time: two would delete each other's files. The kernel ends the lock with the process."""
        with writing(self.out):
            if is_main():
                recover_dir(self.out)
                self.folder.mkdir(parents=True, exist_ok=True)
                self.locked = os.open(self.folder, os.O_RDONLY)
                try:
                    fcntl.flock(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    die(f"another run works in {self.folder}: wait for it to end, or give another --out")
            barrier()

    def unlock(self):
        if is_main():
            os.close(self.locked)

    def begin_again(self, keep):
        """Empties the folder, but for the files of this pattern."""
        with writing(self.out):
            barrier()  # nobody looks at what is removed now
            kept = set(self.folder.glob(keep)) if keep else set()
            for path in set(self.folder.iterdir()) - kept if is_main() else ():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            barrier()

    def compare(self, before):
        """Lists what has changed since the run began; ends if that changes what is trained."""
        now = dataclasses.asdict(self.cfg)
        changed = {f"--{k}": (before["config"][k], v) for k, v in now.items() if before["config"].get(k, v) != v}
        for key in self.identity:
            if before["identity"].get(key) != self.identity[key]:
                changed[f"the content of the {key}"] = ("what it was", "another")
        said = "; ".join(f"{k} was {a!r}, is {b!r}" for k, (a, b) in changed.items())
        if any(k.removeprefix("--") not in FREE for k in changed):
            die(f"{self.folder} holds an unfinished run with other settings ({said}): give those again to go on, another "
                "--out to begin another, or --resume never to throw it away")
        if changed:
            print0(f"changed since the run began: {said}")
        if self.found and self.found[1]["ranks"] != world():
            print0(f"{world()} ranks, the state was saved on {self.found[1]['ranks']}: it goes on equal to rounding, not "
                   "bit for bit")

    def logged(self):
        """The rows of log.jsonl up to the state that the run goes on from."""
        if not self.found:
            return ()
        rows, steps, path = [], 0, self.folder / "log.jsonl"
        text = path.read_text(encoding="utf-8", errors="replace") if is_main() and path.exists() else ""
        for line in text.split("\n"):
            try:
                row = json.loads(line)
            except ValueError:
                break  # the last line of a killed run
            steps += "step" in row
            if steps > self.total:
                break
            # what is said between two steps, of a round, is said again
            if steps < self.total or "step" in row or "round" not in row:
                rows.append(row)
        return rows

    # --- the loop asks ---

    def restore(self, models, optimizer):
        """Gives models and optimizer the saved state, if the run goes on from one."""
        if self.found:
            self.states.load(*self.found, models, optimizer)

    def batches(self, order, lengths):
        """
        The rest of the batches of `order` (lists of row numbers): yields (batch, this rank's micro-batches). Row i has
        lengths[i] tokens.
        """
        self.stepped, self.log.last = time.perf_counter(), time.time()  # what came before is no training speed
        for batch in itertools.islice(order, self.step, None):
            split = split_batch(lengths, batch, world(), self.cfg.micro_batch_tokens, self.cfg.micro_batch_size)
            self.loads = [[sum(lengths[i] for i in micro) for micro in micros] for micros in split]
            yield batch, split[rank()]

    def should_stop(self):
        """Has any rank been told to stop (SIGTERM)? Every rank gets the same answer."""
        return all_sum(float(self.stopping)) > 0

    def stop(self):
        self.states.end_pending(wait=True)
        if is_main():
            print(f"stopped by SIGTERM after {self.total} steps: nothing finished is lost, the same command goes on", flush=True)
        raise SystemExit(128 + signal.SIGTERM)

    def end_step(self, models, optimizer, max_steps, items, norm, lr, keep=True):
        """
        Behind the optimizer step: counts, logs, keeps, saves if it is time, stops if told to. models: name -> model, the
        trained one first. items: of the whole batch, all ranks.
        """
        self.step, self.total = self.step + 1, self.total + 1
        now, model = time.perf_counter(), next(iter(models.values()))
        means = self.meter.means()
        speed = meter.speed(model.cfg, items, self.loads, now - self.stepped, self.peak) | {"peak_gb": memory_gb()}
        rounds = {"round": self.round} if getattr(self.cfg, "prompts", "") else {}
        self.log.step(self.step, max_steps, sum(map(len, items)), means | {"grad_norm": norm, "lr": lr}, **rounds,
                      speed=speed)
        if self.step % self.cfg.log_every == 0 or self.step == max_steps:
            self.log.write({"languages": self.meter.per_language()})
        if keep:
            self.keep(max_steps, model)
        late = is_main() and now - self.saved > 60 * self.cfg.save_minutes
        stop, late = all_sum(torch.tensor([float(self.stopping), float(late)])).tolist()
        self.states.end_pending()
        if stop or late or (self.cfg.save_every and self.total % self.cfg.save_every == 0):
            if self.step < max_steps or stop:
                self.save(models, optimizer)
        if stop:
            self.stop()
        self.stepped = time.perf_counter()  # what was logged and saved is not the next step's time

    def save(self, models, optimizer, **facts):
        """A state of the run as it is now."""
        self.facts |= facts
        between = "-next" if self.step == 0 else ""  # the last step may have a state of its own: both stay
        self.states.save(f"step-{self.total:08d}{between}", tensors_of(models, optimizer), self.facts | {
            "round": self.round, "step": self.step, "total": self.total, "ranks": world(),
            "languages": self.meter.sums()})
        self.saved = time.perf_counter()

    def next_round(self, models, optimizer):
        """Behind the last step of a round that is not the last: the next one samples from these weights."""
        self.round, self.step, optimizer.state = self.round + 1, 0, {}
        self.save(models, optimizer)
        self.states.end_pending(wait=True)  # sampling is long, and nobody would look whether it is written

    # --- the result ---

    def keep(self, max_steps, model):
        """
        After a step, for each percent of the steps in --keep that is now reached: OUT/at-P, a checkpoint. What merge.py
        averages with the last one: checkpoints of one run.
        """
        for percent in self.cfg.keep:
            if self.step == max(1, round(max_steps * percent / 100)):
                self.put_aside(model, self.folder / f"at-{percent}")

    def put_aside(self, model, path):
        """A checkpoint in the run's folder, on the disk when this returns."""
        with writing(path):
            if is_main():
                shutil.rmtree(path, ignore_errors=True)  # of a run that was killed behind this step
                path.mkdir(parents=True)
            barrier()
            write_checkpoint(path, model, self.source, save_dtype(self.cfg, model), **self.config)
            for file in [*path.rglob("*"), path] if is_main() else []:
                fsync(file)  # a state that comes behind this step must not be on the disk before it
            barrier()

    def finish(self, model):
        """Writes the checkpoint, reads it back, and only then does it take the place of what was there before."""
        self.states.end_pending(wait=True)
        self.log.close()
        with writing(self.out):
            dtype = save_dtype(self.cfg, model)
            for old in self.folder.glob("model*.safetensors*") if is_main() else ():
                old.unlink()  # of a run that was killed here, perhaps with other file names
            barrier()
            write_checkpoint(self.folder, model, self.source, dtype, **self.config)
            barrier()
            verify(self.folder, model, dtype)
            barrier()
            if is_main():
                replace_dir(self.folder, self.out)
            self.clean()

    def clean(self):
        """Only now does what the run needed leave OUT: killed before, it goes on, or is seen to have ended."""
        barrier()
        if is_main():
            shutil.rmtree(self.out.with_name(f".{self.out.name}.old"), ignore_errors=True)
            shutil.rmtree(self.out / self.states.folder.name, ignore_errors=True)
            (self.out / "run.json").unlink()
        barrier()
