"""
What the tests share: a checkpoint of 16 thousand parameters with its tokenizer, files of rows, and scripts run as a
user runs them. As a program it runs scripts one after another, on 1, 2 or 4 ranks, without starting Python anew for
each rank and script (most of the time of a tiny run): it forks after the imports, with the variables of torchrun.

    python tests/tiny.py jobs.json      # [[ranks, [[grads file or "", "train_sft.py", "--model", ...], ...]], ...]
"""

import contextlib
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # `python -m pytest` has put it there, torchrun has not
    sys.path.insert(0, str(ROOT))

import pytest
import torch
from safetensors.torch import save_file

import common
import optim
from chat import Chat, train_tokenizer
from data import write_rows
from model import Config, Transformer, save

TEXTS = ["Write the number 347 in words.", "three hundred forty-seven", "Écris le nombre en toutes lettres.",
         "trois cent quarante-sept", "اكتب العدد بالحروف.", "ثلاثمائة وسبعة وأربعون", "347を漢数字で書いてください。", "三百四十七"]


@pytest.fixture(scope="module", autouse=True)
def cpu():
    """A file that says `cpu = tiny.cpu` runs main() on the CPU where there is a GPU too: it compares with subprocesses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def make_checkpoint(folder, seed=0, tokenizer=True, **sizes):
    """A folder that load() and Chat() read; weights so large that no two answers are alike."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    if tokenizer:
        train_tokenizer(TEXTS * 2, 300, folder)
    chat = Chat(folder)
    cfg = Config(**{"vocab_size": chat.vocab_size, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "intermediate_size": 36, "logit_scale": 1.0, "initializer_range": 0.2,
                    "bos_token_id": chat.bos, "eos_token_id": chat.end, "pad_token_id": chat.pad} | sizes)
    model = Transformer(cfg).init_weights(seed)
    save(model, folder, source=folder)  # atomic_dir moves the old folder away, write_checkpoint has read its tokenizer
    return model


@contextlib.contextmanager
def largest_file(limit):
    """No file of this process may grow past `limit` bytes: the write fails as on a full disk, with another errno."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def outputs(model, ids):
    """{"layer_0": ..., "norm": ..., "logits": ...}: what fixtures/make_cohere.py and make_families.py recorded."""
    seen = {}
    parts = {f"layer_{i}": layer for i, layer in enumerate(model.model.layers)} | {"norm": model.model.norm}
    hooks = [part.register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(name, out))
             for name, part in parts.items()]
    with torch.no_grad():
        seen["logits"] = model(ids)
    for hook in hooks:
        hook.remove()
    return seen


def write(path, rows):
    write_rows(path, rows)
    return str(path)


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def environment():
    """No GPU, one thread (two ranks on two cores) and none of the variables of torchrun or conftest.py."""
    gone = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET")
    return {k: v for k, v in os.environ.items() if k not in gone} | {
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}


def script(*words, ranks=1, cwd=ROOT, check=True):
    """Runs `script.py --flags` from the repository root under this Python, or torchrun; -> CompletedProcess (text)."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*(launcher if ranks > 1 else [sys.executable]), *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=600)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def jobs(path, todo):
    """{ranks: [[grads file or "", script, *flags], ...]}: every list one after another on that many processes."""
    todo = [[ranks, [[str(w) for w in words] for words in commands]] for ranks, commands in todo.items()]
    Path(path).write_text(json.dumps(todo), encoding="utf-8")
    return script(ROOT / "tests" / "tiny.py", path)


def keep_gradients(path):
    """From now on optimizer_step() writes the whole gradients that it is given: path.1, path.2, ... ("" : none)."""
    plain, count = getattr(optim.optimizer_step, "plain", optim.optimizer_step), [0]

    def step(model, optimizer, lr, max_norm, items=()):
        count[0] += 1
        grads = {name: p.grad for name, p in model.named_parameters()}
        grads = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}
        if path and common.is_main():
            save_file({n: g.clone() for n, g in grads.items()}, f"{path}.{count[0]}")
        return plain(model, optimizer, lr, max_norm, items)

    step.plain, optim.optimizer_step = plain, step


def run_scripts(commands):
    for grads, name, *flags in commands:
        keep_gradients(grads)
        sys.argv[:] = [name, *flags]
        runpy.run_path(str(ROOT / name), run_name="__main__")


def fork(ranks, commands):
    """Runs the commands on this many forked processes; if one fails, the others are ended and this one exits."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(ranks):
        sys.stdout.flush()
        children.append(os.fork())
        if not children[-1]:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            signal.alarm(500)  # ranks that wait for each other for ever end before script() gives up on their parent
            code = 1
            try:
                run_scripts(commands)
                if torch.distributed.is_initialized():
                    torch.distributed.destroy_process_group()
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
    while children:
        pid, status = os.wait()
        children.remove(pid)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            raise SystemExit(f"a rank of {ranks} failed")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for ranks, commands in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        fork(ranks, commands)
