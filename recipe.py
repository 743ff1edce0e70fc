"""
The Aya Expanse recipe, whole, as a visible list of commands (https://arxiv.org/abs/2412.04261):

    base -> one teacher per language cluster -> reward model (the Arbiter) -> arbitrage -> SFT per cluster, merged
         -> offline DPO per cluster, merged -> three online DPO rounds, each per cluster and merged -> evaluation

python recipe.py                        # the miniature: two CPU cores, minutes; writes out/mini and its report.html
python recipe.py --until sft            # stop after a stage; run again to go on: finished stages are skipped
python recipe.py --preset 8b            # prints the plan for aya-expanse-8b on 8 GPUs; 32b likewise

Every command is an ordinary script of this repository: copy a line and run it by hand. A stage counts as finished when
its stamp in OUT/stages is written, which happens after all its files are complete; a kill costs at most one stage.
"""

import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from common import atomic_file, die, parse_config
from data import CLUSTERS

HERE = Path(__file__).resolve().parent
PYTHON = "python"  # shown in the commands; run with this interpreter


@dataclass
class Config:
    preset: str = "mini"  # mini | smoke (the same in seconds, for tests) | 8b | 32b (print the plan only)
    out: str = ""  # folder to write; default out/<preset>
    seed: int = 0  # of everything: weights, order of data, samples
    until: str = ""  # last stage to run
    dry_run: bool = False  # print the commands, run nothing
    ranks: int = 1  # processes per training command (torchrun); the mini runs two commands side by side instead
    controls: bool = False  # also train the control that skips the offline stage (about a minute)
    merge: str = "models"  # models (one a cluster) | checkpoints (and earlier ones of their runs) | search (for weights)
    jobs: int = 2  # commands of one stage that run side by side; each gets cores / jobs threads


# ---------------------------------------------------------------------------------------------------------------------
# the plan: stages in order; a stage is a list of steps; the commands of one step do not depend on each other

# The miniature's sizes and rates are ours, tuned on its own prompts; the papers publish no hyperparameters.
MINI = {
    "prepare": "", "model": "--hidden_size 128 --layers 4 --heads 4 --kv_heads 2 --intermediate_size 384",
    "base": "--max_steps 300 --lr 4e-3 --warmup_steps 20", "teacher": "--max_steps 150 --lr 2e-3",
    "arbiter": "--max_steps 250 --lr 3e-3", "rm": "--max_steps 200 --lr 1e-3", "arbitrage": "",
    "sft": "--epochs 3 --lr 1e-3", "offline": "--epochs 1 --lr 1e-4 --beta 1",
    "online": "--samples 8 --temperature 0.5 --epochs 3 --lr 2e-4 --beta 1 --watch 96", "rounds": 3, "limit": " --limit 30",
    "groups": {"west": ["western", "eastern"], "east": ["mideast", "asian"]}}
SMOKE = MINI | {
    "prepare": "--items 12 --languages en es fr de ar zh --vocab_size 512",
    "model": "--hidden_size 32 --layers 2 --heads 2 --kv_heads 1 --intermediate_size 64",
    "base": "--max_steps 80 --lr 4e-3", "teacher": "--max_steps 10 --lr 2e-3", "arbiter": "--max_steps 4 --lr 2e-3",
    "rm": "--max_steps 4", "arbitrage": " --force", "sft": "--max_steps 4 --lr 1e-3",
    "offline": "--max_steps 2 --lr 5e-5 --batch_size 16",
    "online": "--samples 4 --max_new_tokens 8 --max_steps 2 --batch_size 16 --lr 1e-4 --watch 8", "rounds": 1, "limit": "",
    "groups": {"west": ["western"], "east": ["asian"]}}


KEPT = (50, 75)  # percents of a run at which --merge checkpoints keeps one: early ones of a cosine schedule are far off


def keep_flag(how):
    return f" --keep {' '.join(map(str, KEPT))}" if how == "checkpoints" else ""


def merge_command(out, name, parts, base, data, how):
    """The merge of a stage: uniform weights over the models of `parts`, or over all their kept checkpoints; or searched."""
    if how == "checkpoints":
        parts = [f"{part}{at}" for part in parts for at in (*(f"/at-{percent}" for percent in KEPT), "")]
    searched = (f"--base {base} --weights search --dev {data}/merge_dev.jsonl --held_out {data}/merge_held_out.jsonl "
                if how == "search" else "")
    return (f"{PYTHON} merge.py --models {' '.join(f'{out}/{p}' for p in parts)} {searched}--out {out}/{name} "
            "--overwrite")


def mini_plan(out, seed, sizes, ranks, preset, controls, how="models"):
    """[(stage, [[command, ...], ...])] for the miniature; `ranks` > 1 trains under torchrun. how: Config.merge."""
    train = f"torchrun --standalone --nproc_per_node={ranks}" if ranks > 1 else PYTHON
    clusters = {c: CLUSTERS[c] for members in sizes["groups"].values() for c in members}
    groups = {g: " ".join(dict.fromkeys(l for c in members for l in CLUSTERS[c]))
              for g, members in sizes["groups"].items()}
    rounds = range(1, sizes["rounds"] + 1)
    data, teachers, keep = f"{out}/data", [f"teacher-{c}" for c in clusters], keep_flag(how)
    pool = " ".join(f"{out}/{t}" for t in teachers)
    rm_samples = " ".join(f"{out}/rm-samples/{m}.jsonl" for m in ["base", *clusters])

    def merge(name, start):
        """The models of the groups, all of which were trained from `start`."""
        return merge_command(out, name, [f"{name}-{g}" for g in groups], f"{out}/{start}", data, how)

    def evaluate(models, limit=""):
        return (f"{PYTHON} eval.py --model {' '.join(f'{out}/{m}' for m in models)} --tasks mini --data {data} "
                f"--reward_model {out}/rm --out {out}/eval{limit}")

    stages = [
        ("data", [[f"{PYTHON} -m mini.prepare --out {out} --seed {seed} --rounds {sizes['rounds']} "
                   f"{sizes['prepare']}"]]),
        ("base", [[f"{train} train_sft.py --model new --tokenizer {out}/tokenizer --data {data}/base.jsonl "
                   f"--out {out}/base --seed {seed} {sizes['model']} {sizes['base']}"]]),
        ("teachers", [[f"{train} train_sft.py --model {out}/base --data {data}/base.jsonl "
                       f"--languages {' '.join(languages)} --out {out}/teacher-{cluster} "
                       f"--seed {seed} {sizes['teacher']}" for cluster, languages in clusters.items()]]),
        # the Arbiter must know more than the policy: its backbone is the base trained longer, on all languages
        ("rm", [[f"{train} train_sft.py --model {out}/base --data {data}/base.jsonl --out {out}/rm-base "
                 f"--seed {seed + 1} {sizes['arbiter']}",
                 *(f"{PYTHON} generate.py --model {out}/teacher-{cluster} --prompts {data}/rm_prompts.jsonl "
                   f"--languages {' '.join(languages)} --samples 3 --temperature 1.0 --max_new_tokens 24 "
                   f"--seed {seed} --out {out}/rm-samples/{cluster}.jsonl" for cluster, languages in clusters.items()),
                 f"{PYTHON} generate.py --model {out}/base --prompts {data}/rm_prompts.jsonl "
                 f"--samples 1 --temperature 1.0 --max_new_tokens 24 "
                 f"--seed {seed} --out {out}/rm-samples/base.jsonl"],
                [f"{PYTHON} -m mini.pairs --rows {data}/rm_rows.jsonl --samples {rm_samples} "
                 f"--out {out}/rm-pairs --seed {seed}"],
                [f"{train} train_rm.py --model {out}/rm-base --pairs {out}/rm-pairs/pairs.jsonl --out {out}/rm "
                 f"--seed {seed} {sizes['rm']}"],
                [f"{PYTHON} reward.py --model {out}/rm --rows {out}/rm-pairs/audit.jsonl --audit "
                 f"--out {out}/rm-audit.json"]]),
        ("arbitrage", [[f"{train} arbitrage.py --prompts {data}/arbitrage.jsonl --teachers {pool} "
                        f"--reward_model {out}/rm --audit {out}/rm-pairs/audit.jsonl --router reward --out {out}/arbitrage "
                        f"--seed {seed}{sizes['arbitrage']}"],
                       [f"{PYTHON} arbitrage.py --completions {out}/arbitrage/completions.jsonl --router {router} "
                        f"--out {out}/arbitrage-{router} --seed {seed}" for router in ("single", "fixed", "learned")]]),
    ]
    for name, folder in (("sft", "arbitrage"), ("sft-single", "arbitrage-single")):
        stages.append((name, [
            [f"{train} train_sft.py --model {out}/base --data {out}/{folder}/sft.jsonl --languages {languages} "
             f"--out {out}/{name}-{group} --seed {seed} {sizes['sft']}{keep}" for group, languages in groups.items()],
            [merge(name, "base")]]))
    stages.append(("offline-dpo", [
        [f"{train} train_dpo.py --model {out}/sft --pairs {out}/arbitrage/pairs.jsonl --languages {languages} "
         f"--out {out}/offline-dpo-{group} --seed {seed} {sizes['offline']}{keep}"
         for group, languages in groups.items()],
        [merge("offline-dpo", "sft")]]))
    policy = "offline-dpo"
    for number in rounds:
        name = f"online-{number}"
        completions = " ".join(f"{out}/{name}-{g}/completions-1.jsonl" for g in groups)
        stages.append((name, [
            [f"{train} train_dpo.py --model {out}/{policy} --prompts {data}/online-{number}.jsonl "
             f"--languages {languages} --reward_model {out}/rm --sft {out}/sft --out {out}/{name}-{group} "
             f"--seed {seed + number} {sizes['online']}{keep}" for group, languages in groups.items()],
            [merge(name, policy)],
            [f"{PYTHON} -m mini.best_of_k --completions {completions} --references {data}/references.jsonl "
             f"--out {out}/{name}-best-of-k.json"]]))
        policy = name
    if controls:  # is offline DPO needed before online DPO?
        stages.append(("online-only", [
            [f"{train} train_dpo.py --model {out}/sft --prompts {data}/online.jsonl --languages {languages} "
             f"--reward_model {out}/rm --sft {out}/sft --rounds {sizes['rounds']} --out {out}/online-only-{group} "
             f"--seed {seed + 1} {sizes['online']}{keep}" for group, languages in groups.items()],
            [merge("online-only", "sft")]]))
    online = [f"online-{n}" for n in rounds]
    parts = [f"{stage}-{g}" for stage in ("sft", "offline-dpo", *online) for g in groups]
    main = ["base", "sft-single", "sft", "offline-dpo", *online, *(["online-only"] if controls else [])]
    halves = lambda names, limit="": [evaluate(names[::2], limit), evaluate(names[1::2], limit)]
    side = [*teachers, *parts]
    stages.append(("eval", [halves(main) + halves(side, sizes["limit"]) if sizes["limit"] else halves(main + side)]))
    stages.append(("report", [[f"{PYTHON} -m mini.summary --run {out} --preset {preset} --seed {seed}"],
                              [f"{PYTHON} report.py --run {out}"]]))
    return stages


def real_plan(preset, how="models"):
    """
    The same pipeline for aya-expanse on GPUs, with the data a user brings: 8b on one machine of 8, 32b on four. Rates are
    ours: none are published. Between stages checkpoints are float32, since bfloat16 would swallow much of what DPO moves;
    the last merge is bfloat16. Safety (Aakanksha et al. 2024, arXiv 2406.18682): 15 % of the student's rows in SFT and
    offline DPO are safety data.
    """
    base = f"checkpoints/aya-expanse-{preset}"
    rates = {"8b": ("2e-5", "5e-7"), "32b": ("1e-5", "3e-7")}[preset]
    out, train = f"out/{preset}", "torchrun --standalone --nproc_per_node=8"
    if preset == "32b":  # the same line on each of the four machines, which share a file system
        train = "torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=$HEAD:29500"
    clusters = {c: " ".join(languages) for c, languages in CLUSTERS.items()}
    memory = "--micro_batch_tokens 16384 --max_tokens 4096 --activation_checkpointing --save_minutes 30 --async_save" + (
        " --reduce_every" if preset == "32b" else "")
    sft = f"--batch_size 256 {memory} --lr {rates[0]} --weight_decay 0 --epochs 1"
    dpo = f"--batch_size 128 {memory} --lr {rates[1]} --beta 0.1 --save_dtype float32"
    safe = lambda data, safety: f"{data}:0.85 data/{safety}.jsonl:0.15"

    def per_cluster(stage, start, command, dtype=""):
        merged = merge_command(out, stage, [f"{stage}-{c}" for c in clusters], start, "data", how)
        return [(stage, [[f"{train} {command(c)} --languages {languages} --out {out}/{stage}-{c}{keep_flag(how)}"
                          for c, languages in clusters.items()], [merged + dtype]])]

    stages = per_cluster("teacher", base, lambda c: f"train_sft.py --model {base} --data data/teacher.jsonl {sft}")
    stages += [("rm", [[f"{train} train_rm.py --model {out}/teacher --pairs data/rm_pairs.jsonl --out {out}/rm "
                        f"--batch_size 128 {memory} --lr 5e-6 --weight_decay 0"],
                       [f"python reward.py --model {out}/rm --rows data/m_rewardbench.jsonl --audit "
                        f"--out {out}/rm-audit.json"]]),
               ("arbitrage", [[f"{train} arbitrage.py --prompts data/prompts.jsonl --teachers "
                               f"{' '.join(f'{out}/teacher-{c}' for c in clusters)} --reward_model {out}/rm "
                               f"--audit data/m_rewardbench.jsonl --temperature 0.7 --max_new_tokens 1024 --out {out}/arbitrage"]])]
    stages += per_cluster("sft", base, lambda c: (
        f"train_sft.py --model {base} --data {safe(f'{out}/arbitrage/sft.jsonl', 'safety_sft')} {sft} "
        "--save_dtype float32"))
    stages += per_cluster("offline-dpo", f"{out}/sft", lambda c: (
        f"train_dpo.py --model {out}/sft --pairs {safe(f'{out}/arbitrage/pairs.jsonl', 'safety_pairs')} {dpo}"))
    policy = "offline-dpo"
    for number in (1, 2, 3):
        start = policy
        stages += per_cluster(f"online-{number}", f"{out}/{start}", lambda c: (
            f"train_dpo.py --model {out}/{start} --prompts data/online-{number}.jsonl --reward_model {out}/rm "
            f"--sft {out}/sft --rounds 1 --samples 8 --temperature 1.0 --max_new_tokens 1024 {dpo}"),
            " --dtype bfloat16" if number == 3 else "")
        policy = f"online-{number}"
    return stages + [("eval", [[f"{train} eval.py --model {out}/{policy} --tasks mini --data data/eval "
                                f"--out {out}/eval"]])]


# ---------------------------------------------------------------------------------------------------------------------
# running it

def lock(out):
    """
    One run at a time in a folder. The file descriptor is handed to every command, so the lock outlives a killed
    recipe.py until its last command has ended: two runs never write the same files.
    """
    out.mkdir(parents=True, exist_ok=True)
    fd = os.open(out / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another run, or a command that a killed run left behind, works in {out}: waiting for it to end",
              flush=True)
        fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def run_command(command, log, threads, fd):
    """Runs one command, output into `log`: -> (seconds, its last line); dies with the end of the log if it fails."""
    words = shlex.split(command)
    if words[0] == PYTHON:
        words[0] = sys.executable
    elif words[0] == "torchrun":
        words[:1] = [sys.executable, "-m", "torch.distributed.run"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE",
                                "TOKENIZERS_PARALLELISM": "false"}
    begin = time.time()
    with open(log, "w", encoding="utf-8") as f:
        code = subprocess.run(words, cwd=HERE, stdout=f, stderr=subprocess.STDOUT, env=environment,
                              pass_fds=(fd,)).returncode
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if code:
        die(f"`{command}` failed with exit status {code}:\n  " + "\n  ".join(lines[-12:])
            + f"\nits whole output is in {log}")
    return time.time() - begin, lines[-1] if lines else ""


def run_stage(name, steps, out, jobs, fd):
    """The steps of a stage one after another, the commands of a step side by side; then the stage's stamp."""
    logs, begin = out / "logs", time.time()
    logs.mkdir(parents=True, exist_ok=True)
    timed = []
    for number, commands in enumerate(steps):
        for command in commands:
            print(f"  $ {command}", flush=True)
        threads = max(1, (os.cpu_count() or 1) // min(jobs, len(commands)))
        with ThreadPoolExecutor(jobs) as pool:
            work = [pool.submit(run_command, c, logs / f"{name}-{number}-{i}.log", threads, fd)
                    for i, c in enumerate(commands)]
            for command, done in zip(commands, work):
                seconds, last = done.result()
                timed.append([command, round(seconds, 1)])
                print(f"  {seconds:6.1f} s  {last}", flush=True)
    with atomic_file(out / "stages" / f"{name}.json") as f:
        json.dump({"stage": name, "seconds": round(time.time() - begin, 1), "commands": timed}, f, indent=1)
    print(f"  stage {name}: {time.time() - begin:.1f} s", flush=True)


def main(cfg):
    real = cfg.preset in ("8b", "32b")
    if not real and cfg.preset not in ("mini", "smoke"):
        die(f"unknown preset {cfg.preset!r}; known: mini smoke 8b 32b")
    if cfg.merge not in ("models", "checkpoints", "search"):
        die(f"unknown --merge {cfg.merge!r}; known: models checkpoints search")
    out = Path(cfg.out or f"out/{cfg.preset}")
    sizes = MINI if cfg.preset == "mini" else SMOKE
    stages = (real_plan(cfg.preset, cfg.merge) if real else
              mini_plan(str(out), cfg.seed, sizes, cfg.ranks, cfg.preset, cfg.controls, cfg.merge))
    names = [name for name, _ in stages]
    if cfg.until and cfg.until not in names:
        die(f"unknown stage {cfg.until!r}; the stages are {' '.join(names)}")
    if cfg.until:
        stages = stages[:names.index(cfg.until) + 1]
    if real or cfg.dry_run:
        for name, steps in stages:
            print(f"# {name}")
            print("\n".join(command for commands in steps for command in commands) + "\n")
        if real:
            print("# This preset prints its plan; run the lines one by one. "
                  f"data/ holds your own files (formats: README.md), checkpoints/aya-expanse-{cfg.preset} "
                  f"the files of CohereLabs/aya-expanse-{cfg.preset}.")
        return
    os.chdir(HERE)
    fd = lock(out)
    for number, (name, steps) in enumerate(stages, 1):
        stamp = out / "stages" / f"{name}.json"
        if stamp.exists():
            done = json.loads(stamp.read_text(encoding="utf-8"))
            if [c for c, _ in done["commands"]] != [c for commands in steps for c in commands]:
                die(f"{out} was made with other commands (stage {name}): "
                    f"give another --out, or remove {out} to start over")
            print(f"[{number}/{len(stages)}] {name}: finished earlier in {done['seconds']} s", flush=True)
            continue
        print(f"[{number}/{len(stages)}] {name}", flush=True)
        run_stage(name, steps, out, cfg.jobs, fd)
    if stages[-1][0] == "report":
        last = f"online-{sizes['rounds']}"
        if not (out / "final").is_symlink():
            os.symlink(last, out / "final")  # the recipe's result under one name: out/mini/final
        print((out / "table.md").read_text(encoding="utf-8"))
        print(f"the picture: {out / 'report.html'}")


if __name__ == "__main__":
    main(parse_config(Config))
