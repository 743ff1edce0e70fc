"""
Reference log-probs for DPO, computed once: the reference model then needs no memory while the policy trains.

They are computed in the micro-batches in which the rows will be trained, by the same function, so that at the first step
policy and reference agree to the bit (margin 0, loss log 2). They are kept in a file named by the content that they depend
on: the weights, every token and mask of the rows, in order, and the dtype of the matmuls.
"""

import hashlib
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from common import all_sum, atomic_file, barrier, die, is_main, print0, progress, rank, world
from data import fingerprint, split_batch
from run import param_dtype, weights_fingerprint


def read(path, key, rows):
    """(rows, 2) float32 of a file, NaN where a row is missing; all NaN if there is no such file or it is damaged."""
    try:
        with safe_open(path, "pt") as f:
            logps, facts = f.get_tensor("logps"), f.metadata()
        if facts["key"] == key and facts["sha256"] == sha256(logps) and logps.shape == (rows, 2):
            return logps
        problem = "it was made from other weights or rows, or has changed"
    except FileNotFoundError:
        problem = ""
    except (SafetensorError, KeyError, TypeError, OSError) as e:
        problem = str(e)
    if problem:
        print0(f"{path} is not used ({problem}): computed anew")
    return torch.full((rows, 2), torch.nan)


def sha256(t):
    return hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()


@torch.no_grad()
def reference_logps(cfg, run, model, items, lengths, order, seq_logps):
    """
    items, and order: the batches that will be trained -> (rows, 2) float32 on the CPU, chosen and rejected, of `model` as
    it is now, for every row in `order` (NaN for others). seq_logps: items -> log-probs of chosen and rejected. What was
    computed is written every --save_minutes and when the run is told to stop; the rest is computed when it goes on.
    """
    key = run.facts.get("reference") if run.step else None  # in the middle of a round the weights have moved on
    if key is None:
        weights = run.identity["model"] if run.round == 1 else weights_fingerprint(model)
        parts = (weights, fingerprint(items), str(param_dtype(cfg)))
        key = hashlib.sha256(" ".join(parts).encode()).hexdigest()
    folder = Path(cfg.reference_cache or run.folder)
    path = folder / f"reference-{key[:16]}.safetensors"
    # one rank reads for all: another run may be writing the file, and ranks that see other rows would wait for each other
    known = all_sum(read(path, key, len(items)) if is_main() else torch.zeros(len(items), 2)).float()
    mine, seen = torch.zeros(len(items), 3, dtype=torch.float64), set(known.isfinite().all(1).nonzero().flatten().tolist())
    if run.step and not all(i in seen for batch in order for i in batch):
        die(f"{path} is missing or damaged, and the run goes on behind step {run.step}, where the weights that it was "
            "computed with are gone: put it back, or start over with --resume never")

    def write():
        """What all ranks have so far joins what the file holds."""
        together = all_sum(mine)
        logps = torch.where(together[:, 2:] > 0, together[:, :2] / together[:, 2:], known.double()).float()
        if is_main():
            with atomic_file(path, "wb") as f:
                f.write(save({"logps": logps}, {"key": key, "sha256": sha256(logps)}))
        barrier()
        return logps

    saved, new = time.perf_counter(), False
    for batch in progress(order, "reference"):
        if all(i in seen for i in batch):
            continue
        for rows in split_batch(lengths, batch, world(), cfg.micro_batch_tokens, cfg.micro_batch_size)[rank()]:
            both = torch.stack(seq_logps([items[i] for i in rows]), 1).double().cpu()  # (rows, 2)
            for i, (chosen, rejected) in zip(rows, both.tolist()):
                if i not in seen:
                    mine[i] = torch.tensor([chosen, rejected, 1.0], dtype=torch.float64)
        seen.update(batch)
        late = is_main() and time.perf_counter() - saved > 60 * cfg.save_minutes
        stop, late = all_sum(torch.tensor([float(run.stopping), float(late)])).tolist()
        new = True
        if stop or late:
            write()
            saved = time.perf_counter()
        if stop:
            run.stop()
    logps = write() if new else known
    if holes := [items[i].where for i in sorted(set().union(*order)) if not logps[i].isfinite().all()]:
        if is_main():
            path.unlink()
        die(f"the reference log-prob of {', '.join(holes[:8])} is not a number: mend or remove the row; or the checkpoint "
            "is broken")
    run.facts["reference"] = key
    return logps
