"""
A training run's state on disk: saved whole or not at all, checked before it is used, and continued bit for bit.

    RUN/resume/step-00000400/
        __0_0.distcp ... .metadata     weights and AdamW's averages, every rank its shards, by torch.distributed.checkpoint:
                                       they load on another number of ranks as well
        random-00000.safetensors ...   the random generators of every rank
        state.json                     where the run stands
        manifest.json                  size and SHA-256 of every file above, written last

A state is written into a hidden folder, synced, and renamed when its manifest is there; the last two are kept. Torch's
format has no checksums, a flipped bit would load in silence: before a state is used every byte is read and compared, and
a damaged one is refused, by name, in favour of the one before it. The folder must be one that all machines share.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common import all_sum, atomic_file, backend, barrier, die, fsync, gather_list, is_main, print0, rank, world

KEPT = 2  # never one: the last may be the one that breaks


def tensors_of(models, optimizer):
    """{"policy weights NAME": tensor, "mean NAME": ..., ...}: what a state holds. models: {"policy": model, ...}."""
    found = {f"{kind} weights {name}": p.detach() for kind, model in models.items()
             for name, p in model.named_parameters()}
    for name, p in next(iter(models.values())).named_parameters():  # the first is the one that is trained
        if p in optimizer.state:
            for kind, t in zip(("mean", "square", "count"), optimizer.state[p]):
                found[f"{kind} {name}"] = t
    return found


def random_state():
    """This rank's generators, as tensors of bytes."""
    python = json.dumps(random.getstate()).encode()
    found = {"torch": torch.get_rng_state(), "python": torch.frombuffer(bytearray(python), dtype=torch.uint8)}
    return found | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(found):
    version, internal, gauss = json.loads(bytes(found["python"].tolist()))
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(found["torch"])
    if torch.cuda.is_available() and "cuda" in found:
        torch.cuda.set_rng_state(found["cuda"])


def digest(path):
    """[bytes, SHA-256] of a file."""
    with open(path, "rb") as f:
        return [os.fstat(f.fileno()).st_size, hashlib.file_digest(f, "sha256").hexdigest()]


def damage(folder):
    """What is wrong with a state folder: "" or a sentence. Ranks share the reading; every rank gets the answer."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files = sorted(manifest.items())
        if "state.json" not in manifest:
            raise ValueError
    except (OSError, ValueError, AttributeError):
        files, manifest = [], None
    found = [] if manifest else ["manifest.json is missing or damaged"]
    for name, expected in files[rank()::world()]:
        try:
            size, sha = digest(folder / name)
            if size != expected[0]:
                found.append(f"{name} has {size} bytes, it had {expected[0]}")
            elif sha != expected[1]:
                found.append(f"{name} has changed (its SHA-256 differs)")
        except OSError:
            found.append(f"{name} is missing")
    return "; ".join(dict.fromkeys(gather_list(found)))


@contextlib.contextmanager
def quiet():
    """Torch warns that one process without a group is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


class States:
    """
    The states of one run, in `folder`. Every method is called on all ranks. asynchronous: the tensors are copied and
    training goes on while a thread writes them; the state appears when end_pending() finds it written.
    """

    def __init__(self, folder, asynchronous=False):
        self.folder, self.pending, self.group, self.asynchronous = Path(folder), None, None, asynchronous
        if asynchronous:
            self.thread = ThreadPoolExecutor(1)
            if not dist.is_initialized():
                dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1)
            self.group = dist.new_group(backend="gloo")  # on the training's own group it would race its collectives

    def all(self):
        """Folders, the newest first. Only whole ones have this name."""
        found = (p for p in self.folder.glob("step-*") if re.fullmatch(r"step-\d{8}(-next)?", p.name))
        return sorted(found, reverse=True)

    def newest(self):
        """(folder, what its state.json says) of the newest undamaged state; None if there is no state at all."""
        barrier()
        states = self.all()
        for path in states:
            if not (problem := damage(path)):
                return path, json.loads((path / "state.json").read_text(encoding="utf-8"))
            print0(f"{path} is refused: {problem}")
        if states:
            die(f"no saved state in {self.folder} is whole; copy it again, or start over with --resume never")

    def save(self, name, tensors, facts):
        """tensors: name -> tensor or shard; facts: JSON. name: step-00000400, or step-00000400-next behind it."""
        import torch.distributed.checkpoint as dcp
        self.end_pending(wait=True)
        path = self.folder / name
        partial = self.folder / f".{path.name}.partial"
        try:
            if is_main():
                self.folder.mkdir(parents=True, exist_ok=True)
                for old in self.folder.glob(".step-*.partial"):
                    shutil.rmtree(old)
                partial.mkdir()
            barrier()
            if not partial.is_dir():
                die(f"{self.folder} is not the same folder on all machines; --out must lie where all of them see it")
            save_file(random_state(), partial / f"random-{rank():05d}.safetensors")
            if is_main():
                (partial / "state.json").write_text(json.dumps(facts | {"tensors": sorted(tensors)}), encoding="utf-8")
            if self.asynchronous:
                future = dcp.async_save(tensors, checkpoint_id=partial, process_group=self.group)
                self.pending = path, partial, self.thread.submit(lambda: (future.result(), self.sync(partial))[1])
            else:
                with quiet():
                    dcp.save(tensors, checkpoint_id=partial, no_dist=not dist.is_initialized())
                self.seal(path, partial, self.sync(partial))
        except (OSError, RuntimeError, SafetensorError, dcp.CheckpointException) as e:  # the last is no Exception
            self.failed(path, e)

    def failed(self, path, e):
        reason = next((line for line in reversed(str(e).strip().splitlines()) if line.strip()), type(e).__name__)
        die(f"cannot save the state {path}: {reason.strip()}; the states before it are whole: mend it (is the disk full?) "
            "and run the same command again")

    def sync(self, partial):
        """The files of this rank, on the disk: [(name, [bytes, SHA-256])]."""
        own = [*partial.glob(f"__{rank()}_*.distcp"), partial / f"random-{rank():05d}.safetensors"]
        own += [partial / ".metadata", partial / "state.json"] if is_main() else []
        for path in own:
            fsync(path)
        return [(path.name, digest(path)) for path in own]

    def seal(self, path, partial, own):
        """Manifest, rename, and the states that are too many go."""
        files = gather_list(own)
        if is_main():
            with atomic_file(partial / "manifest.json") as f:
                json.dump(dict(files), f, indent=1)
            if path.exists():  # a state of this step: it goes when the new one has its name
                os.rename(path, self.folder / f".{path.name}.old.partial")
            os.rename(partial, path)
            fsync(self.folder)
            states = self.all()
            at = states.index(path)
            # of the states ahead one was refused, and the run went on from before it
            for old in [*states[:at], *states[at + KEPT:], *self.folder.glob(".step-*.partial")]:
                shutil.rmtree(old)
        barrier()

    def end_pending(self, wait=False):
        """Gives an asynchronous save its name if every rank has written its part; wait: until they have."""
        if self.pending:
            path, partial, written = self.pending
            if wait or all_sum(float(written.done())) == world():
                from torch.distributed.checkpoint import CheckpointException
                try:
                    own = written.result()
                    self.pending = None
                    self.seal(path, partial, own)
                except (OSError, RuntimeError, CheckpointException) as e:
                    self.failed(path, e)

    @staticmethod
    def load(path, facts, models, optimizer):
        """Fills models and optimizer from a state, and this rank's random generators if it had this many ranks."""
        import torch.distributed.checkpoint as dcp
        named = dict(next(iter(models.values())).named_parameters())
        for name in facts["tensors"]:
            kind, _, name = name.partition(" ")
            if kind == "mean":
                optimizer.averages(named[name])
        tensors = tensors_of(models, optimizer)
        try:
            if sorted(tensors) != facts["tensors"]:
                die(f"{path} holds other tensors than this model: {sorted(set(tensors) ^ set(facts['tensors']))[:4]}")
            with quiet():
                dcp.load(tensors, checkpoint_id=path, no_dist=not dist.is_initialized())
        except (OSError, RuntimeError, ValueError, dcp.CheckpointException) as e:
            die(f"{path} cannot be loaded: {str(e).strip().splitlines()[-1]}; start over with --resume never")
        if facts["ranks"] == world():
            set_random_state(load_file(path / f"random-{rank():05d}.safetensors"))
