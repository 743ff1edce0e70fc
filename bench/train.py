"""
A step of SFT and of DPO beside TRL and beside a plain transformers loop: time, memory, achieved FLOP/s, in one run on the
same config, weights, rows and threads; and a check that all of them train the same thing.

    python -m venv peer && peer/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.16.0
    python bench/train.py --peer peer/bin/python                           # CPU, float32, 10 M parameters: an hour
    python bench/train.py --peer peer/bin/python --vocab 256000 --hidden 4096 --mlp 14336 --heads 32 --kv_heads 8 \\
        --layers 8 --tokens 2048 --logit_scale 0.125 --steps 20            # one GPU of 80 GB: aya-expanse-8b, 8 of 32 layers

Ours is train_sft.py and train_dpo.py as a user runs them; TRL's are its SFTTrainer and DPOTrainer (bench/_trl.py). Each
measurement is a process of its own. First every setting of every side runs once; then the best of each, whose losses are
right, takes turns with the others' best, --repeats times. The first steps of a process are not counted. A step's time is
the median over the repeats of that step; the table has the mean over steps, since steps differ where lengths do.

Compared for sameness: the losses of the first --checked steps, before which the optimizer has made as many updates less
one. Rows are words of a made-up language, each one token. SFT's follow Zipf's law; of a pair, the chosen side's do, and
the rejected side's follow it backwards, so that the loss falls within a few steps and a wrong update shows.
The reference's log-probs are computed beforehand on every side, and their seconds stand apart.
"""

import dataclasses
import hashlib
import importlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
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
    settings: list[str] = field(default_factory=list)  # only these settings of ours and of TRL (default: all)
    steps: int = 9  # optimizer steps of a run
    warmup: int = 3  # of these, how many are not counted: torch.compile compiles up to the third length
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
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<BOS_TOKEN>", "pad_token": "<PAD>", "unk_token": "<UNK>",
        "eos_token": "<|END_OF_TURN_TOKEN|>", "chat_template": CHAT_TEMPLATE}), encoding="utf-8")
    chat = Chat(folder)
    model = Transformer(ModelConfig(
        model_type="cohere", vocab_size=cfg.vocab, hidden_size=cfg.hidden, intermediate_size=cfg.mlp,
        num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads,
        logit_scale=cfg.logit_scale, rope_theta=10000.0, max_position_embeddings=max(512, cfg.tokens),
        bos_token_id=chat.bos, eos_token_id=chat.end, pad_token_id=chat.pad, initializer_range=0.02)).init_weights(0)
    save(model, folder, source=folder)
    return folder


def make_rows(cfg, task, mix):
    """
    A file of as many rows as the steps take, so each is trained once. equal: a quarter prompt, the rest completion; mixed:
    32 to --tokens tokens in all, log-uniform, a third of them prompt (of pairs: of the shorter side, and each side has its
    own length).
    """
    rng, words = random.Random(f"{task} {mix}"), cfg.vocab - len(SPECIAL)
    weights = [1 / (i + 1) for i in range(words)]
    text = lambda n, backwards=False: " ".join(
        f"w{words - 1 - i if backwards else i}" for i in rng.choices(range(words), weights, k=n))
    drawn = lambda: (cfg.tokens if mix == "equal" else
                     round(math.exp(rng.uniform(math.log(SHORTEST), math.log(cfg.tokens)))))
    rows = []
    for _ in range(cfg.steps * (cfg.rows if task == "sft" else cfg.pairs)):
        first, second = drawn(), drawn()
        prompt = (first if task == "sft" else min(first, second)) // (4 if mix == "equal" else 3)
        row = {"language": "en", "prompt": text(prompt - FRAME)}
        row |= ({"completion": text(first - prompt - 1)} if task == "sft" else  # and its end of turn
                {"chosen": text(first - prompt - 1), "rejected": text(second - prompt - 1, backwards=True)})
        rows.append(row)
    path = Path(cfg.work) / f"{task}-{mix}.jsonl"
    write_rows(path, rows)
    return path, rows


# ---------------------------------------------------------------------------------------------------------------------
# measurements

def ours_variants(cuda):
    """name -> flags of our scripts"""
    small = ["--micro_batch_tokens", "1024"]
    return {"whole batch": [], "compile": ["--compile"]} | (
        {"checkpointing": ["--activation_checkpointing"], "compile, checkpointing": ["--compile", "--activation_checkpointing"]}
        if cuda else {"micro-batches of 1024 tokens": small, "micro-batches of 1024 tokens, compile": [*small, "--compile"]})


def ours(job):
    """Runs train_sft.py or train_dpo.py here, with a clock behind Run.end_step."""
    script, task, out = importlib.import_module(f"train_{job['task']}"), job["task"], job["result"] + ".run"
    flags = {"model": job["model"], "data" if task == "sft" else "pairs": job["data"], "out": out, "resume": "never",
             "batch_size": job["batch"], "max_steps": job["steps"], "max_tokens": job["max_tokens"], "lr": job["lr"],
             "warmup_steps": 0, "min_lr": 1.0, "weight_decay": 0.0, "clip": 1.0, "param_dtype": job["dtype"],
             "save_dtype": "float32", "log_every": 10**6} | ({"beta": job["beta"]} if task == "dpo" else {})
    clock, order, reference, end_step = _trl.Clock(job["warmup"]), [], [], Run.end_step

    def ticks(self, models, optimizer, max_steps, items, *rest, **more):
        end_step(self, models, optimizer, max_steps, items, *rest, **more)
        clock.tick()
        order.append([int(item.where.rpartition(":")[2]) - 1 for item in items])
    Run.end_step = ticks
    if task == "dpo":
        compute = script.reference_logps

        def timed(*args):
            begin = _trl.Clock(1)
            begin.tick()
            found = compute(*args)
            begin.tick()
            reference[:] = begin.wall[1] - begin.wall[0], begin.cpu[1] - begin.cpu[0]
            return found
        script.reference_logps = timed
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    script.main(parse_config(script.Config, words + job["variant"]))
    log = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in log if "step" in row]
    found = clock.found() | {"loss": [row["loss"] for row in steps], "tokens": [row["tokens"] for row in steps],
                             "order": order, "reference_s": reference}
    Path(job["result"]).write_text(json.dumps(found), encoding="utf-8")


def measure(cfg, side, variant, job):
    """One process -> what it found, or {"failed": its last line}."""
    path = Path(cfg.work).resolve() / "job.json"
    job |= {"side": side, "variant": variant, "result": str(path.with_suffix(".found"))}
    path.write_text(json.dumps(job), encoding="utf-8")
    Path(job["result"]).unlink(missing_ok=True)
    command = ([sys.executable, __file__, "--job", str(path)] if side == OURS else
               [os.path.abspath(cfg.peer), str(Path(__file__).with_name("_trl.py")), str(path)])
    env = os.environ | {"OMP_NUM_THREADS": str(cfg.threads), "MKL_NUM_THREADS": str(cfg.threads), "HF_HUB_OFFLINE": "1",
                        "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cfg.work)
    if done.returncode or not Path(job["result"]).exists():
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {"failed": said[-1] if said else f"exit status {done.returncode}"}
    return json.loads(Path(job["result"]).read_text(encoding="utf-8"))


def difference(ours, theirs, task, steps):
    """Largest of the first steps: SFT absolute, DPO relative."""
    return max(abs(a - b) / (1 if task == "sft" else abs(a)) for a, b in zip(ours["loss"][:steps], theirs["loss"]))


def per_token(run, key, warmup):
    """Seconds a token (padding not counted): the median over the steps that count."""
    return statistics.median(seconds / tokens for seconds, tokens in zip(run[key], run["tokens"][warmup:]))


def best(runs, right, key, warmup):
    """The setting that took least of those whose losses are right."""
    fine = [name for name, (run, *_) in runs.items() if "failed" not in run and right(name, run)]
    return min(fine, key=lambda name: per_token(runs[name][0], key, warmup)) if fine else None


def compare(cfg, task, mix, device, about):
    """Everything about one task and mix -> {"runs": side -> setting -> [measurement], "best": ...}"""
    cuda, key = device == "cuda", "wall_s" if device == "cuda" else "cpu_s"
    folder = make_model(cfg)
    path, rows = make_rows(cfg, task, mix)
    batch = cfg.rows if task == "sft" else cfg.pairs
    job = {"task": task, "model": str(folder.resolve()), "data": str(path.resolve()), "steps": cfg.steps, "batch": batch,
           "warmup": cfg.warmup, "lr": cfg.lr, "beta": cfg.beta, "dtype": about["dtype"], "max_tokens": cfg.tokens}
    tried = {OURS: ours_variants(cuda), TRL: _trl.variants(task, mix, cuda), PLAIN: _trl.PLAIN}
    tried = {side: {name: v for name, v in found.items() if not cfg.settings or name in cfg.settings}
             for side, found in tried.items() if side == OURS or cfg.peer}
    runs = {side: {name: [] for name in found} for side, found in tried.items()}

    def go(side, name):
        found = measure(cfg, side, tried[side][name], job | ({} if side == OURS else {"data": str(ordered.resolve())}))
        runs[side][name].append(found)
        print0(task, mix, side, name, found.get("failed") or f"{statistics.median(found['cpu_s']):.2f} CPU s, "
               f"{statistics.median(found['wall_s']):.2f} s, {found['peak_gb']:.2f} GB, loss {found['loss'][0]:.4f} to "
               f"{found['loss'][-1]:.4f}")
        return found

    # 1) every setting once; the first of ours says in which order the rows are trained
    ordered = path.with_suffix(".ordered.jsonl")
    first = None
    for name in tried[OURS]:
        found = go(OURS, name)
        if first is None:
            if "failed" in found:
                die(f"{task}, {mix}: {found['failed']}")
            first = found
            write_rows(ordered, [rows[i] for step in found["order"] for i in step])
    for side in [side for side in tried if side != OURS]:
        for name in tried[side]:
            go(side, name)
    gap = lambda run: difference(first, run, task, cfg.checked)
    right = lambda name, run: name.endswith("order") or gap(run) <= about["tolerance"]
    chosen = {side: best(runs[side], right, key, cfg.warmup) for side in tried}

    # 2) the best of each, in turns
    for turn in range(cfg.repeats):
        for side in list(tried)[::1 if turn % 2 else -1]:
            if chosen[side]:
                go(side, chosen[side])
    items = read_items([str(ordered if cfg.peer else path)], "sft" if task == "sft" else "preferences", Chat(folder),
                       cfg.tokens, 0)
    model = ModelConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")), folder)
    sides = [s for item in items[cfg.warmup * batch:] for s in item.sides]
    flops = meter.training_flops(model, [len(s.ids) for s in sides], sum(int(s.mask.sum()) for s in sides))
    return {"runs": runs, "best": chosen, "flops": flops / (cfg.steps - cfg.warmup),
            "tokens": sum(len(s.ids) for s in sides) / (cfg.steps - cfg.warmup),
            "gaps": {side: {name: None if "failed" in r[0] or name.endswith("order") else gap(r[0])
                            for name, r in found.items()} for side, found in runs.items()}}


# ---------------------------------------------------------------------------------------------------------------------
# tables

def step(runs, key):
    """Mean over steps of the median over the repeats (the run of the search is one of them)."""
    return statistics.fmean(statistics.median(values) for values in zip(*(run[key] for run in runs)))


def tables(cfg, about, results):
    cuda = about["device"] == "cuda"
    lines = [f"{about['parameters'] / 1e6:.2f} M parameters (Cohere: {cfg.vocab} words, width {cfg.hidden}, MLP {cfg.mlp}, "
             f"{cfg.layers} blocks, {cfg.heads} heads, {cfg.kv_heads} key/value heads), {about['dtype']}; {about['hardware']}, "
             f"threads: {cfg.threads}; {about['versions']}; commit {about['commit']}; {cfg.repeats + 1} runs of "
             f"{cfg.steps - cfg.warmup} counted steps; `{about['command']}`", "",
             "| step | side | setting | s | CPU s | times ours: s | CPU s | tokens a CPU s | "
             + ("TFLOP/s | MFU |" if cuda else "GFLOP a CPU s | of matmul |") + " peak, GB | reference, s | losses differ by |",
             "|---" * 13 + "|"]
    for (task, mix), found in results.items():
        batch = f"{cfg.rows} rows" if task == "sft" else f"{cfg.pairs} pairs"
        base = {}
        for side, name in found["best"].items():
            if name is None:
                lines.append(f"| {task}, {mix} | {side} | none was right | " + " | " * 10)
                continue
            runs = [run for run in found["runs"][side][name] if "failed" not in run]
            wall, cpu = step(runs, "wall_s"), step(runs, "cpu_s")
            own = statistics.fmean(runs[0]["tokens"][cfg.warmup:]) / found["tokens"]  # another order: other rows counted
            wall, cpu = wall / own, cpu / own
            base = base or {"wall": wall, "cpu": cpu}
            rate = found["flops"] / (wall if cuda else cpu)
            peak = about["peak"] if cuda else statistics.median(run["matmul_gflops"] for run in runs) * 1e9
            reference = statistics.median(run["reference_s"][1 - cuda] for run in runs) / cfg.steps if task == "dpo" else 0
            gap = found["gaps"][side][name]
            lines.append(
                f"| {task}, {mix}: {batch}, {found['tokens']:.0f} tokens | {side} | {name} | {wall:.3f} | {cpu:.3f} | "
                f"{wall / base['wall']:.2f} | {cpu / base['cpu']:.2f} | {found['tokens'] / cpu:.0f} | "
                f"{rate / (1e12 if cuda else 1e9):.1f} | {f'{100 * rate / peak:.0f} %' if peak else '-'} | "
                f"{statistics.median(run['peak_gb'] for run in runs):.2f} | {f'{reference:.2f}' if reference else '-'} | "
                f"{'-' if side == OURS else 'another order' if gap is None else f'{gap:.0e}'} |")
    lines += ["", f"Losses: SFT the absolute, DPO the relative difference from ours in the first {cfg.checked} steps (at most "
              f"{about['tolerance']:.0e}). FLOP: of the model, without what is padding, masked or computed twice. Reference: "
              + ("seconds" if cuda else "CPU seconds") + " a step's pairs take beforehand. Peak: "
              + ("allocated on the GPU, counted steps only." if cuda else "the most that the process ever held resident, "
                 "libraries and loading included."), "", "Every setting, one run:", "",
              "| step | side | setting | " + ("" if cuda else "CPU ") + "s a step's tokens | peak, GB | losses differ by |",
              "|---" * 6 + "|"]
    for (task, mix), found in results.items():
        for side, settings in found["runs"].items():
            for name, (run, *_) in settings.items():
                if "failed" in run:
                    lines.append(f"| {task}, {mix} | {side} | {name} | failed: {run['failed'][:90]} | | |")
                    continue
                gap = found["gaps"][side][name]
                spent = per_token(run, "wall_s" if cuda else "cpu_s", cfg.warmup) * found["tokens"]
                lines.append(f"| {task}, {mix} | {side} | {name} | {spent:.3f} | {run['peak_gb']:.2f} | "
                             f"{'another order' if gap is None else f'{gap:.0e}'} |")
    return lines


def main(cfg):
    if cfg.job:
        return ours(json.loads(Path(cfg.job).read_text(encoding="utf-8")))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(cfg.threads)
    dtype = cfg.dtype or ("bfloat16" if device == "cuda" else "float32")
    model = json.loads((make_model(cfg) / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Transformer(ModelConfig.from_dict(model, "config.json")).parameters())
    words = [f"--{f.name} {value}" for f in dataclasses.fields(Config) if f.name not in ("peer", "work", "results", "job")
             and (value := getattr(cfg, f.name)) != (f.default_factory() if f.default is dataclasses.MISSING else f.default)]
    about = {"device": device, "dtype": dtype, "hardware": hardware(), "commit": git_commit(), "parameters": parameters,
             "python": sys.version.split()[0], "peak": meter.peak_flops(), "tolerance": 1e-4 if dtype == "float32" else 2e-2,
             "command": " ".join(["python bench/train.py --peer PYTHON", *words]), "config": dataclasses.asdict(cfg) | {
                 "peer": "", "work": "", "results": ""}}
    results = {(task, mix): compare(cfg, task, mix, device, about) for task in cfg.tasks for mix in cfg.mixes}
    seen = [run["versions"] for found in results.values() for side in (TRL, PLAIN) for name in found["runs"].get(side, {})
            for run in found["runs"][side][name] if "versions" in run]
    about["versions"] = ", ".join(f"{k} {v}" for k, v in (seen[0] if seen else {"torch": torch.__version__}).items())
    lines = tables(cfg, about, results)
    print0("\n".join(lines))
    with atomic_file(f"{cfg.results}.json") as f:
        json.dump(about | {"results": {" ".join(key): value for key, value in results.items()}}, f, indent=1)
    with atomic_file(f"{cfg.results}.md") as f:
        f.write("\n".join(lines) + "\n")
    if wrong := [f"{task} {mix} {side}" for (task, mix), found in results.items() for side, name in found["best"].items()
                 if name is None]:
        die(f"no setting gave our losses: {', '.join(wrong)}")


if __name__ == "__main__":
    main(parse_config(Config))
