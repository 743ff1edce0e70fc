"""
A step of SFT and of DPO beside TRL and beside a plain transformers loop: time, memory, achieved FLOP/s, in one run on
the same config, weights, rows and threads; and a check that all of them train the same thing.

    python -m venv peer && peer/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.16.0
    python bench/train.py --peer peer/bin/python              # CPU, float32, 10 M parameters: hours, most are TRL's
    python bench/train.py --peer peer/bin/python --vocab 256000 --hidden 4096 --mlp 14336 --heads 32 --kv_heads 8 \\
        --layers 8 --tokens 2048 --logit_scale 0.125 --lr 1e-5 --steps 20       # a GPU of 80 GB: a quarter of Aya 8B

Ours is train_sft.py and train_dpo.py as a user runs them, TRL's are its SFTTrainer and DPOTrainer (bench/_trl.py). A
measurement is a process of its own. First every setting of every side runs once; then the best of each side whose
losses are right takes turns with the others', --repeats times. The first steps of a process are not counted. A step's
time is the median over the repeats of that step; the table has the mean over steps, since they differ where lengths do.

Compared for sameness: the losses of the first --checked steps, each but the first computed by updated weights. Rows
are words of a made-up language, each one token. SFT's follow Zipf's law; of a pair, the chosen side's do, and the
rejected side's follow it backwards: the loss falls within a few steps, and a wrong update shows. The reference's
log-probs are computed beforehand on every side, and their seconds stand apart.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import itertools
import json
import math
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import meter  # noqa: E402
from bench import _trl  # noqa: E402
from chat import CHAT_TEMPLATE, SPECIAL, Chat  # noqa: E402
from common import atomic_file, die, git_commit, hardware, parse_config, print0  # noqa: E402
from config import Config as ModelConfig  # noqa: E402
from data import read_items, write_rows  # noqa: E402
from model import Transformer, save  # noqa: E402
from run import Run  # noqa: E402

OURS, TRL, PLAIN = "nanoaya", "TRL", "transformers"
FRAME = 6  # tokens that the template puts around a prompt: BOS, two of the user's turn, its end, two of the answer's
SHORTEST = 32  # tokens of a row


@dataclass
class Config:
    peer: str = ""  # Python with transformers and TRL; without it only ours is timed
    work: str = "out/bench-train"  # where checkpoints, rows and runs go
    tasks: list[str] = field(default_factory=lambda: ["sft", "dpo"])  # what is timed
    mixes: list[str] = field(default_factory=lambda: ["equal", "mixed"])  # lengths: all the same, or log-uniform
    repeats: int = 3  # of the best setting of every side, behind the one run of every setting
    sides: list[str] = field(default_factory=lambda: [OURS, TRL, PLAIN])  # who is measured
    settings: list[str] = field(default_factory=list)  # try only these settings (default: all)
    steps: int = 8  # optimizer steps of a run
    warmup: int = 3  # how many of these are not counted: torch.compile compiles up to the third length
    checked: int = 5  # steps whose losses must agree
    threads: int = 1  # of every process
    dtype: str = ""  # float32 or bfloat16 (default: bfloat16 on a GPU)
    rows: int = 16  # rows of an SFT step
    pairs: int = 8  # pairs of a DPO step
    tokens: int = 256  # longest row, the template's tokens included
    vocab: int = 8192  # the model: words
    hidden: int = 256  # the model: width
    mlp: int = 1024  # the model: width of the MLP
    layers: int = 8  # the model: blocks
    heads: int = 8  # the model: heads
    kv_heads: int = 4  # the model: key/value heads
    logit_scale: float = 0.0625  # the model: of the logits
    lr: float = 1e-3  # learning rate, constant
    beta: float = 0.1  # of DPO
    results: str = "bench/results/train"  # .json and .md are written
    job: str = ""  # internal: one measurement of ours, described by this file


# ---------------------------------------------------------------------------------------------------------------------
# the same weights and rows for every side

def make_model(cfg):
    """A checkpoint folder of random weights, with a tokenizer whose words w0, w1, ... are one token each."""
    sizes = [cfg.vocab, cfg.hidden, cfg.mlp, cfg.layers, cfg.heads, cfg.kv_heads, cfg.logit_scale, cfg.tokens]
    folder = Path(cfg.work) / f"model-{hashlib.sha256(repr(sizes).encode()).hexdigest()[:8]}"
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    words = SPECIAL + [f"w{i}" for i in range(cfg.vocab - len(SPECIAL))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<UNK>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<BOS_TOKEN>", "pad_token": "<PAD>",
        "unk_token": "<UNK>", "eos_token": "<|END_OF_TURN_TOKEN|>", "chat_template": CHAT_TEMPLATE}), encoding="utf-8")
    chat, cuda = Chat(folder), torch.cuda.is_available()
    config = ModelConfig(
        model_type="cohere", vocab_size=cfg.vocab, hidden_size=cfg.hidden, intermediate_size=cfg.mlp,
        num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads,
        logit_scale=cfg.logit_scale, rope_theta=10000.0, max_position_embeddings=max(512, cfg.tokens),
        bos_token_id=chat.bos, eos_token_id=chat.end, pad_token_id=chat.pad, initializer_range=0.02)
    if cuda:  # init_weights draws on the CPU, the same for all machines: minutes for billions of weights
        torch.manual_seed(0)
        with torch.device("cuda"), torch.no_grad():
            model = Transformer(config).bfloat16()
            for p in model.parameters():
                if p.ndim >= 2:
                    p.normal_(0, config.initializer_range)
    else:
        model = Transformer(config).init_weights(0)
    save(model, folder, source=folder)
    return folder


def make_rows(cfg, task, mix):
    """
    A file of as many rows as the steps take, so each is trained once. equal: a quarter prompt, the rest completion;
    mixed: 32 to --tokens tokens in all, log-uniform, a third of them prompt (each side of a pair has a length of its
    own, and the prompt is a third of the shorter one).
    """
    rng, words = random.Random(f"{task} {mix}"), cfg.vocab - len(SPECIAL)
    zipf = list(itertools.accumulate(1 / (i + 1) for i in range(words)))
    drawn = lambda n: rng.choices(range(words), cum_weights=zipf, k=n)
    text = lambda n, backwards=False: " ".join(f"w{words - 1 - i if backwards else i}" for i in drawn(n))
    length = lambda: (cfg.tokens if mix == "equal" else
                      round(math.exp(rng.uniform(math.log(SHORTEST), math.log(cfg.tokens)))))
    rows = []
    for _ in range(cfg.steps * (cfg.rows if task == "sft" else cfg.pairs)):
        first, second = length(), length()
        prompt = (first if task == "sft" else min(first, second)) // (4 if mix == "equal" else 3)
        answer = text(first - prompt - 1)  # and its end of turn
        rows.append({"language": "en", "prompt": text(prompt - FRAME)} | (
            {"completion": answer} if task == "sft" else
            {"chosen": answer, "rejected": text(second - prompt - 1, backwards=True)}))
    path = Path(cfg.work) / f"{task}-{mix}.jsonl"
    write_rows(path, rows)
    return path, rows


# ---------------------------------------------------------------------------------------------------------------------
# measurements

def settings_of(cfg, task, mix, cuda):
    """side -> name -> what to try: flags of our scripts, arguments of TRL's trainers and of the plain loop."""
    whole, small = ["--micro_batch_tokens", str(10**9)], ["--micro_batch_tokens", "16384" if cuda else "1024"]
    ours = {"whole batch": whole, "whole batch, compile": [*whole, "--compile"],
            f"micro-batches of {small[1]} tokens": small}
    if cuda:
        ours |= {"whole batch, checkpointing": [*whole, "--activation_checkpointing"],
                 "whole batch, checkpointing, compile": [*whole, "--activation_checkpointing", "--compile"]}
    found = {OURS: ours} | ({TRL: _trl.variants(task, mix, cuda), PLAIN: _trl.PLAIN} if cfg.peer else {})
    return {side: {name: v for name, v in known.items() if not cfg.settings or name in cfg.settings}
            for side, known in found.items() if side in cfg.sides}


class StepsDone(Exception):
    """Raised behind the last step that is measured."""


def ours(job):
    """Runs train_sft.py or train_dpo.py here, with a clock behind Run.end_step, up to its last step."""
    script, task, out = importlib.import_module(f"train_{job['task']}"), job["task"], job["result"] + ".run"
    flags = {"model": job["model"], "data" if task == "sft" else "pairs": job["data"], "out": out, "resume": "never",
             "batch_size": job["batch"], "max_steps": job["steps"], "max_tokens": job["max_tokens"], "lr": job["lr"],
             "warmup_steps": 0, "min_lr": 1.0, "weight_decay": 0.0, "clip": 1.0, "param_dtype": job["dtype"],
             "log_every": 10**6} | ({"beta": job["beta"]} if task == "dpo" else {})
    clock, order, reference, end_step = _trl.Clock(job["warmup"]), [], [], Run.end_step

    def ticks(self, models, optimizer, max_steps, items, *rest, **more):
        end_step(self, models, optimizer, max_steps, items, *rest, **more)
        clock.tick()
        order.append([int(item.where.rpartition(":")[2]) - 1 for item in items])
        if len(order) == job["steps"]:
            raise StepsDone  # the checkpoint is not written: gigabytes, and TRL is not asked for one
    Run.end_step = ticks
    if task == "dpo":
        compute = script.reference_logps

        def timed(*args):
            begin = time.perf_counter(), time.process_time()
            found = compute(*args)
            reference[:] = time.perf_counter() - begin[0], time.process_time() - begin[1]
            return found
        script.reference_logps = timed
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with contextlib.suppress(StepsDone):
        script.main(parse_config(script.Config, words + job["variant"]))
    log = [json.loads(line) for line in Path(out + ".unfinished/log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in log if "step" in row]
    found = clock.found() | {"loss": [row["loss"] for row in steps], "tokens": [row["tokens"] for row in steps],
                             "order": order, "reference_s": reference}
    Path(job["result"]).write_text(json.dumps(found), encoding="utf-8")


def measure(cfg, job):
    """One process -> what it found, or {"failed": the last line it said}."""
    path = Path(cfg.work).resolve() / "job.json"
    job |= {"result": str(path.with_suffix(".found"))}
    path.write_text(json.dumps(job), encoding="utf-8")
    Path(job["result"]).unlink(missing_ok=True)
    command = ([sys.executable, os.path.abspath(__file__), "--job", str(path)] if job["side"] == OURS else
               [os.path.abspath(cfg.peer), str(Path(__file__).resolve().with_name("_trl.py")), str(path)])
    env = os.environ | {"OMP_NUM_THREADS": str(cfg.threads), "MKL_NUM_THREADS": str(cfg.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cfg.work)
    if done.returncode or not Path(job["result"]).exists():
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {"failed": said[-1] if said else f"exit status {done.returncode}"}
    return json.loads(Path(job["result"]).read_text(encoding="utf-8"))


def difference(ours, theirs, task, steps):
    """Of the losses of the first steps, the largest: SFT absolute, DPO relative."""
    return max(abs(a - b) / (1 if task == "sft" else abs(a)) for a, b in zip(ours["loss"][:steps], theirs["loss"]))


def per_token(run, key, warmup):
    """Seconds a token (padding not counted): the median over the steps that count."""
    return statistics.median(seconds / tokens for seconds, tokens in zip(run[key], run["tokens"][warmup:]))


def compare(cfg, task, mix, about):
    """Everything about one task and mix of lengths."""
    cuda = about["device"] == "cuda"
    folder, (path, rows) = make_model(cfg), make_rows(cfg, task, mix)
    batch, ordered = cfg.rows if task == "sft" else cfg.pairs, path.with_suffix(".ordered.jsonl")
    job = {"task": task, "model": str(folder.resolve()), "steps": cfg.steps, "batch": batch, "warmup": cfg.warmup,
           "lr": cfg.lr, "beta": cfg.beta, "dtype": about["dtype"], "max_tokens": cfg.tokens}
    tried = settings_of(cfg, task, mix, cuda)
    runs, gaps, best, first = {side: {name: [] for name in known} for side, known in tried.items()}, {}, {}, None

    def go(side, name):
        found = measure(cfg, job | {"side": side, "variant": tried[side][name],
                                    "data": str((path if side == OURS else ordered).resolve())})
        runs[side][name].append(found)
        print0(task, mix, side, name, found.get("failed") or f"{statistics.median(found['cpu_s']):.2f} CPU s, "
               f"{statistics.median(found['wall_s']):.2f} s, {found['peak_gb']:.2f} GB, loss {found['loss'][0]:.4f} "
               f"to {found['loss'][-1]:.4f}")
        return found

    # 1) every setting once; the first of ours says in which order the rows are trained
    for side, known in tried.items():
        seconds, gaps[side] = {}, {}
        for name in known:
            found = go(side, name)
            if "failed" in found:
                continue
            if first is None:
                first = found
                write_rows(ordered, [rows[i] for step in found["order"] for i in step])
            own_order = name.endswith("order")
            gaps[side][name] = None if own_order else difference(first, found, task, cfg.checked)
            if own_order or gaps[side][name] <= about["tolerance"][task]:
                seconds[name] = per_token(found, "wall_s" if cuda else "cpu_s", cfg.warmup)
        if first is None:
            die(f"{task}, {mix}: none of our settings ran: {runs[OURS]}")
        best[side] = min(seconds, key=seconds.get) if seconds else None

    # 2) the best of each, in turns
    for turn in range(cfg.repeats):
        for side in list(tried)[::1 if turn % 2 else -1]:
            if best[side]:
                go(side, best[side])
    items = read_items([str(ordered)], "sft" if task == "sft" else "preferences", Chat(folder), cfg.tokens, 0)
    counted, sides = cfg.steps - cfg.warmup, [side for item in items[cfg.warmup * batch:] for side in item.sides]
    trained, lengths = sum(int(side.mask.sum()) for side in sides), [len(side.ids) for side in sides]
    return {"batch": f"{cfg.rows} rows" if task == "sft" else f"{cfg.pairs} pairs", "tokens": sum(lengths) / counted,
            "flops": meter.training_flops(config_of(folder), lengths, trained) / counted, "best": best, "gaps": gaps,
            "runs": runs}


def config_of(folder):
    path = folder / "config.json"
    return ModelConfig.from_dict(json.loads(path.read_text(encoding="utf-8")), path)


# ---------------------------------------------------------------------------------------------------------------------
# tables

def step(runs, key):
    """Mean over steps of the median over the repeats (the run that tried the setting is one of them)."""
    return statistics.fmean(statistics.median(values) for values in zip(*(run[key] for run in runs)))


def result_rows(cfg, about, what, found):
    """The lines of one task and mix in the first table."""
    cuda, base = about["device"] == "cuda", None
    for side, name in found["best"].items():
        if name is None:
            yield f"| {what} | {side} | none was right | " + " | " * 10
            continue
        runs = [run for run in found["runs"][side][name] if "failed" not in run]
        share = statistics.fmean(runs[0]["tokens"][cfg.warmup:]) / found["tokens"]  # 1, but where the order is its own
        wall, cpu = step(runs, "wall_s") / share, step(runs, "cpu_s") / share
        base = base or (wall, cpu)
        rate = found["flops"] / (wall if cuda else cpu)
        peak = about["peak"] if cuda else 1e9 * statistics.median(run["matmul_gflops"] for run in runs)
        before = [run["reference_s"][0 if cuda else 1] / cfg.steps for run in runs if what.startswith("dpo")]
        gap = found["gaps"][side][name]
        cells = [f"{what}: {found['batch']}, {found['tokens']:.0f} tokens", side, name, f"{wall:.3f}", f"{cpu:.3f}",
                 f"{wall / base[0]:.2f}", f"{cpu / base[1]:.2f}", f"{found['tokens'] / (wall if cuda else cpu):.0f}",
                 f"{rate / (1e12 if cuda else 1e9):.1f}", f"{100 * rate / peak:.0f} %" if peak else "-",
                 f"{statistics.median(run['peak_gb'] for run in runs):.2f}",
                 f"{statistics.median(before):.2f}" if before else "-",
                 "-" if side == OURS else "another order" if gap is None else f"{gap:.0e}"]
        yield f"| {' | '.join(cells)} |"


def tried_rows(cfg, about, what, found):
    """The lines of one task and mix in the second table."""
    for side, known in found["runs"].items():
        for name, (run, *_) in known.items():
            if "failed" in run:
                yield f"| {what} | {side} | {name} | failed: {run['failed'][:90]} | | |"
                continue
            seconds = per_token(run, "wall_s" if about["device"] == "cuda" else "cpu_s", cfg.warmup) * found["tokens"]
            gap = found["gaps"][side][name]
            yield (f"| {what} | {side} | {name} | {seconds:.3f} | {run['peak_gb']:.2f} | "
                   f"{'another order' if gap is None else f'{gap:.0e}'} |")


def tables(cfg, about, results):
    cuda, unit = about["device"] == "cuda", "s" if about["device"] == "cuda" else "CPU s"
    return [
        f"{about['parameters'] / 1e6:.2f} M parameters (Cohere: {cfg.vocab} words, width {cfg.hidden}, MLP {cfg.mlp}, "
        f"{cfg.layers} blocks, {cfg.heads} heads, {cfg.kv_heads} key/value heads), {about['dtype']}; "
        f"{about['hardware']}, threads: {cfg.threads}; {about['versions']}; commit {about['commit']}; "
        f"{cfg.repeats + 1} runs of {cfg.steps - cfg.warmup} counted steps; `{about['command']}`", "",
        f"| step | side | best setting | s | CPU s | times ours: s | CPU s | tokens a {unit} | "
        + ("TFLOP/s | MFU |" if cuda else "GFLOP a CPU s | of a matmul's |")
        + f" peak, GB | reference, {unit} | losses differ by |", "|---" * 13 + "|",
        *[line for key, found in results.items() for line in result_rows(cfg, about, key, found)], "",
        f"Losses: SFT's absolute, DPO's relative difference from ours in the first {cfg.checked} steps; above "
        f"{about['tolerance']['sft']:.0e}, {about['tolerance']['dpo']:.0e} a setting is not right. FLOP: the model's, "
        "without what is padding, masked or computed twice. "
        f"Reference: {unit} that a step's pairs take beforehand. Peak: " + (
            "allocated on the GPU in the counted steps." if cuda else
            "the most that the process ever held resident, libraries and loading included."), "",
        "Every setting, one run:", "",
        f"| step | side | setting | {unit} for a step's tokens | peak, GB | losses differ by |",
        "|---" * 6 + "|", *[line for key, found in results.items() for line in tried_rows(cfg, about, key, found)]]


def main(cfg):
    if cfg.job:
        return ours(json.loads(Path(cfg.job).read_text(encoding="utf-8")))
    cuda = torch.cuda.is_available()
    dtype = cfg.dtype or ("bfloat16" if cuda else "float32")
    model = config_of(make_model(cfg))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Transformer(model).parameters())
    given = [word for name, value in dataclasses.asdict(cfg).items()
             if value != getattr(Config(), name) and name not in ("peer", "work", "results")
             for word in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))]
    about = {"device": "cuda" if cuda else "cpu", "dtype": dtype, "hardware": hardware(), "commit": git_commit(),
             "parameters": parameters, "python": sys.version.split()[0], "peak": meter.peak_flops(),
             "tolerance": {"sft": 1e-5, "dpo": 1e-4} if dtype == "float32" else {"sft": 2e-2, "dpo": 2e-2},
             "command": shlex.join(["python", "bench/train.py", "--peer", "PYTHON", *given])}
    results = {f"{task}, {mix}": compare(cfg, task, mix, about) for task in cfg.tasks for mix in cfg.mixes}
    seen = [run["versions"] for found in results.values() for known in found["runs"].values() for runs in known.values()
            for run in runs if "versions" in run] or [{"torch": torch.__version__}]
    about["versions"] = ", ".join(f"{name} {version}" for name, version in seen[0].items())
    lines = tables(cfg, about, results)
    print0("\n".join(lines))
    with atomic_file(f"{cfg.results}.json") as f:
        json.dump(about | {"results": results}, f)
    with atomic_file(f"{cfg.results}.md") as f:
        f.write("\n".join(lines) + "\n")
    if wrong := [f"{key}, {side}" for key, found in results.items() for side, name in found["best"].items()
                 if name is None]:
        die(f"no setting gave our losses: {'; '.join(wrong)}")


if __name__ == "__main__":
    main(parse_config(Config))
