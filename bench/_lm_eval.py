"""
The peer's half of bench/eval.py, run by the peer's interpreter: lm-evaluation-harness's hf backend on pairs of texts. Nothing
of nanoaya is imported here.

    PEER_PYTHON bench/_lm_eval.py JOB.json      # eval.py writes the job; the measurement goes where the job says
"""

import json
import sys
import time
from pathlib import Path


def peak():
    """GB: the most that this process ever held resident, libraries included."""
    with open("/proc/self/status", encoding="utf-8") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) * 1024 / 1e9


def main(job):
    import lm_eval
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    torch.set_num_threads(job["threads"])
    model = HFLM(pretrained=job["model"], device="cpu", dtype="float32", batch_size=job["batch_size"])
    tokens, plain = [0], model._model_call

    def counted(ids, *other, **more):
        tokens[0] += ids.numel()
        return plain(ids, *other, **more)

    model._model_call = counted
    pairs = [json.loads(line) for line in Path(job["pairs"]).read_text(encoding="utf-8").splitlines()]
    requests = [Instance(request_type="loglikelihood", doc={}, arguments=tuple(pair), idx=0) for pair in pairs]
    before, cpu, wall = peak(), time.process_time(), time.perf_counter()
    found = model.loglikelihood(requests, disable_tqdm=True)
    measured = {"version": lm_eval.__version__, "tokens": tokens[0], "cpu_s": time.process_time() - cpu,
                "wall_s": time.perf_counter() - wall, "before_gb": before, "peak_gb": peak(),
                "scores": [[float(a), bool(b)] for a, b in found]}
    Path(job["to"]).write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
