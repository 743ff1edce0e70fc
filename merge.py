"""
Merging checkpoints of any size in the memory of a few chunks. Aya Expanse merges at every stage: models of different
language clusters, and checkpoints of one run. Its choice is the weighted average; SLERP, TIES and DARE-TIES are here to
compare. The mathematics, with its papers, is in merge_methods.py, the streaming in merge_stream.py, the search for
weights in merge_search.py; this file refuses what cannot be averaged, writes the folder and says what a person wants to
know.

python merge.py --models out/mini/sft-west out/mini/sft-east --weights 1 2 --out out/my-merged
python merge.py --method ties --models out/mini/sft-west out/mini/sft-east --base out/mini/base --out out/my-ties
python merge.py --method slerp --models out/mini/sft-west out/mini/sft-east --t 0,0.5,1 --out out/my-slerp
python merge.py --models out/mini/sft-west out/mini/sft-east --weights search --base out/mini/base \
    --dev out/mini/data/merge_dev.jsonl --held_out out/mini/data/merge_held_out.jsonl --out out/my-search

A setting that may run over the depth (--weights, --t) takes numbers with commas: 0,0.5,1 is 0 in the first layer, 0.5
in the middle, 1 in the last, linear in between; what lies outside the layers gets the first number.
"""

import json
import math
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

import merge_stream
from checkpoint import Checkpoint, carry, find, read_json, safetensors_header, write_index
from common import atomic_dir, die, git_commit, parse_config, progress
from merge_stream import Plan

OUTPUT = ("auto", "float16", "bfloat16", "float32", "float64")
USES = {"linear": ("weights", "normalize", "lam"), "slerp": ("t",),
        "ties": ("weights", "density", "lam", "normalize", "trim"),
        "dare_ties": ("weights", "density", "lam", "normalize", "seed")}


@dataclass
class Config:
    method: str = "linear"  # linear | slerp | ties | dare_ties
    models: list[str] = field(default_factory=list)  # folders or hub names; the first gives config.json and tokenizer
    weights: list[str] = field(default_factory=list)  # one per model; all equal if left out; or the word: search
    base: str = ""  # what the models were fine-tuned from: needed by ties and dare_ties, tells more in the report
    density: float = 0.2  # ties: share of each delta kept, the largest; dare_ties: probability to keep, then rescaled
    trim: str = "tensor"  # ties: keep the largest of each tensor, or of the whole model, as published: tensor | model
    lam: float = 1.0  # with --base: how far to go from it, 0 is the base, 1 the merge
    t: str = "0.5"  # slerp: 0 is the first model, 1 the second
    seed: int = 0  # dare_ties: masks depend on this, the model's folder name and the tensor's name, on nothing else
    normalize: bool = True  # divide by the sum of weights (ties, dare_ties: of the models that agree on the sign)
    dtype: str = "auto"  # of the output: auto (the first model's) | float16 | bfloat16 | float32 | float64
    threads: int = 0  # 0: one for each core, at most 8
    out: str = "out/mini/merged"  # folder to write; it appears when the merge is complete
    overwrite: bool = False  # replace --out if it is an earlier merge
    dev: str = ""  # search: rows that choose; SFT rows, scored by log-prob a token, or prompts with --reward_model
    held_out: str = ""  # search: other rows, on which the choice is shown beside uniform weights and the best model
    reward_model: str = ""  # search: score greedy answers to the prompts by this reward model instead
    max_new_tokens: int = 48  # search with --reward_model: longest answer
    worst: float = 1.0  # search: what the worst language's change against uniform weights counts, beside the mean
    tries: int = 40  # search: merges to score at most, before the scan of lambda


# ---------------------------------------------------------------------------------------------------------------------
# refusals: what would make an average of weights meaningless

def numbers(flag, text):
    """"0,0.5,1" -> [0.0, 0.5, 1.0]: a setting at even distances over the depth; mostly one number."""
    try:
        values = [float(x) for x in str(text).split(",")]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        die(f"--{flag} takes finite numbers, or several with commas for a run over the depth, got {text!r}")
    return values


def settings(cfg):
    """Refuses what no checkpoint could mend. Returns weights (None: to be searched) and t, as lists over the depth."""
    K, search = len(cfg.models), [str(w) for w in cfg.weights] == ["search"]
    weights = None if search else [numbers("weights", w) for w in cfg.weights or [1.0] * K]
    for wrong, message in (
            (cfg.method not in USES, f"--method {cfg.method!r} is unknown; one of: {' '.join(USES)}"),
            (cfg.dtype not in OUTPUT, f"--dtype {cfg.dtype!r} is unknown; one of: {' '.join(OUTPUT)}"),
            (cfg.trim not in ("tensor", "model"), f"--trim {cfg.trim!r} is unknown; one of: tensor model"),
            (K < 1, "--models needs at least one checkpoint folder"),
            (cfg.method == "slerp" and K != 2, f"--method slerp takes two --models, not {K}: merge two at a time"),
            (weights and len(weights) != K, f"--weights has {len(weights or ())} values for {K} --models: one for each, "
                                            "or none"),
            (not math.isfinite(cfg.lam), "--lam takes a finite number"),
            (cfg.threads < 0, "--threads takes a number of threads, or 0 for one a core"),
            (cfg.method == "slerp" and (search or any(w != weights[0] for w in weights)),
             "--method slerp mixes by --t; for weights a b: b / (a + b)"),
            (not 0 < cfg.density <= 1, f"--density {cfg.density} is outside (0, 1]: it is the share that is kept"),
            ("ties" in cfg.method and not cfg.base, f"--method {cfg.method} merges what training changed: give --base, "
                                                    "the folder that all models were fine-tuned from"),
            (cfg.method == "linear" and cfg.lam != 1 and not cfg.base, "--lam goes from the base: give --base"),
            (search and (cfg.method != "linear" or not cfg.normalize or not cfg.dev or not cfg.held_out),
             "--weights search chooses the weights of a normalised linear merge on --dev rows and shows the result on "
             "--held_out rows: give both files")):
        if wrong:
            die(message)
    return weights, numbers("t", cfg.t)


def check_sums(plan, given):
    """Weights that sum to zero leave nothing to divide by, at any depth."""
    for layer in (None, *range(plan.layers)) if plan.normalize and plan.method != "slerp" else ():
        w, _ = plan.at(layer)
        if abs(math.fsum(w)) <= 1e-9 * max(map(abs, w)):
            place = "" if layer is None else f" in layer {layer}"
            die(f"--weights {' '.join(map(str, given))} sum to zero{place}, nothing to divide by: change one, or "
                "--no-normalize")


def check_tensors(tables, who):
    """tables: per model a dict name -> (shape, torch.dtype). Names and shapes must be the first one's."""
    for table, model in zip(tables, who):
        for name in sorted(differ := tables[0].keys() ^ table.keys()):
            has, lacks = (who[0], model) if name in tables[0] else (model, who[0])
            die(f"{lacks}: tensor {name} is missing, {has} has it (in all, {len(differ)} names are in one only): merge "
                "only models of one architecture")
        for name, (shape, dtype) in tables[0].items():
            if table[name][0] != shape or table[name][1].is_floating_point != dtype.is_floating_point:
                die(f"tensor {name} is {dtype} {list(shape)} in {who[0]}, {table[name][1]} {list(table[name][0])} in "
                    f"{model}: merge only models of one architecture and vocabulary")


# keys of config.json that leave what the weights compute as it is
NEUTRAL = set("_name_or_path transformers_version torch_dtype dtype use_cache cache_implementation initializer_range "
              "attention_dropout max_position_embeddings bos_token_id eos_token_id pad_token_id".split())
# keys that are compared even if one file lacks them: what is absent is a default, and defaults differ between versions
NEEDED = set("model_type architectures hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
             "intermediate_size vocab_size logit_scale layer_norm_eps rms_norm_eps rope_parameters tie_word_embeddings "
             "use_qk_norm attention_bias sliding_window".split())


def functional(config, where="config.json"):
    """The part of a config.json that changes what the weights compute, in one spelling for transformers 4 and 5."""
    c = {k: v for k, v in config.items() if v is not None and k not in NEUTRAL}
    for key, kind in (("rope_scaling", dict), ("rope_parameters", dict), ("model_type", str), ("hidden_size", int),
                      ("num_attention_heads", int)):
        if key in c and not isinstance(c[key], kind):
            die(f"{where}: {key} {c[key]!r} is no {kind.__name__}: it is damaged; copy it again")
    rope = {"rope_theta": c.pop("rope_theta", None), **c.pop("rope_scaling", {}), **c.pop("rope_parameters", {})}
    rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default"))
    tied = c.get("model_type", "").startswith(("cohere", "gemma"))
    return {"tie_word_embeddings": tied, "use_qk_norm": False, "attention_bias": False, "rope_parameters": rope,
            "num_key_value_heads": c.get("num_attention_heads"),
            "head_dim": c.get("hidden_size", 0) // (c.get("num_attention_heads") or 1), **c}


def check_configs(configs, who):
    first, *others = map(functional, configs)
    for other, model in zip(others, who[1:]):
        for key in sorted(first.keys() & other.keys() | NEEDED, key=lambda key: (key == "head_dim", key)):
            if first.get(key) != other.get(key):
                die(f"config.json: {key} is {first.get(key, 'absent')} in {who[0]}, {other.get(key, 'absent')} in "
                    f"{model}: the same weights compute different things there, so they cannot be averaged")


def check_tokenizers(folders):
    """Token ids must mean the same. Layout of the file, padding, truncation and the spelling of merges do not count."""
    def parts(path):
        t = read_json(path)
        model = t.pop("model", None) or {}
        if not isinstance(model, dict) or not isinstance(model.get("merges") or [], list):
            die(f"{path}: its model is no JSON object with a list of merges: it is damaged; copy it again")
        merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model.get("merges") or []]
        return {**{k: v for k, v in t.items() if k not in ("padding", "truncation")}, **model, "merges": merges}

    paths = [p for f in folders if (p := Path(f) / "tokenizer.json").exists()]
    for path in paths[1:]:
        if path.read_bytes() != paths[0].read_bytes() and (a := parts(paths[0])) != (b := parts(path)):
            what = ", ".join(sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k)))
            die(f"{paths[0]} and {path} differ in: {what}; merge only models of one tokenizer")


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints on disk

def parent(name):
    """A model's Checkpoint, without the second copy of a tied head that some folders hold: the merge has none."""
    stored, head, embedding = Checkpoint(find(name)), "lm_head.weight", "model.embed_tokens.weight"
    tied = functional(stored.config, stored.folder / "config.json")["tie_word_embeddings"]
    if tied and {head, embedding} <= stored.table.keys():
        if not stored.same(head, embedding):
            die(f"{stored.folder}: tensor {head} differs from {embedding}, though config.json ties them; correct one")
        del stored.table[head]
    return stored


def mask_names(folders):
    """Keys of DARE's masks: the folder's name; where two share it, with as many parents as tell them apart."""
    parts = [Path(os.path.abspath(f)).parts for f in folders]
    n = next(n for n in range(1, 1000) if len({p[-n:] for p in parts}) == len(set(parts)))
    return ["/".join(p[-n:]) for p in parts]


class Output:
    """
    The safetensors files of a merge: each opens with its whole header, then chunks arrive in any order and from any
    thread. A file gets its name when all its bytes are on the disk: none ever looks whole and is not.
    """

    def __init__(self, folder, layout):
        """layout: file name -> {tensor: (shape, dtype)}, in the order of the data."""
        self.place, self.left, self.open, self.finished = {}, {}, {}, []
        self.lock, self.finisher = threading.Lock(), ThreadPoolExecutor(1)
        for file, part in layout.items():
            path, header = folder / file, safetensors_header(part)
            fd = self.open[path] = os.open(f"{path}.unfinished", os.O_WRONLY | os.O_CREAT, 0o666)
            self.pwrite(fd, header, 0)
            at = len(header)
            for name, (shape, dtype) in part.items():
                self.place[name] = path, fd, at
                at += math.prod(shape) * dtype.itemsize
            os.truncate(fd, at)
            self.left[path] = at - len(header)
            if at == len(header):
                self.finish(path)

    def pwrite(self, fd, data, at):
        view = memoryview(data)
        while view:
            n = os.pwrite(fd, view, at)
            view, at = view[n:], at + n

    def __call__(self, name, begin, chunk):
        path, fd, at = self.place[name]
        self.pwrite(fd, chunk.view(torch.uint8).numpy(), at + begin * chunk.dtype.itemsize)
        with self.lock:
            self.left[path] -= chunk.nbytes
            last = not self.left[path]
        if last:
            self.finished.append(self.finisher.submit(self.finish, path))  # while the next files are merged

    def finish(self, path):
        os.fsync(self.open[path])
        os.close(self.open.pop(path))
        os.rename(f"{path}.unfinished", path)

    def __enter__(self):
        return self

    def __exit__(self, failed, *_):
        """Waits until every file has its name."""
        self.finisher.shutdown()
        while self.open and failed:
            os.close(self.open.popitem()[1])
        for future in self.finished if not failed else ():
            future.result()
        if self.open:
            raise RuntimeError(f"not all of {', '.join(map(str, self.open))} was written: a mistake in merge_stream.py")


# ---------------------------------------------------------------------------------------------------------------------
# what a person wants to know before trusting it

def table_of(report):
    """The statistics of a report as a markdown table."""
    names, first = report["names"], next(iter(report["groups"].values()))
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    show = lambda x: "-" if x is None else format(x, ".4f")

    def cosines(table):
        found = [table[i][j] for i, j in pairs]
        if len(found) > 6 and None not in found:
            return f"{show(min(found))} to {show(max(found))}"
        return " ".join(map(show, found))

    head = ["tensors", "parameters", f"norm of each delta / norm of the {report['delta_to']}",
            f"cosines of {report['cosine_of']}" if pairs else ""]
    if "sign_conflicts" in first:
        head += ["sign conflicts", "unchanged in training", "lost to rounding"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for group, g in report["groups"].items():
        cells = [group, f"{g['parameters']:,}", " ".join(f"{d / (g['norm'] or 1):.2e}" for d in g["delta_norm"]),
                 cosines(g["cosine"])]
        if "sign_conflicts" in first:
            cells += [f"{g['sign_conflicts']:.1%}", " ".join(f"{u:.1%}" for u in g["unchanged"]),
                      f"{g['rounded_away']:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def card(report, title):
    """README.md of the folder, as the hub expects a model card: metadata in YAML, then text."""
    hub = [m for m in [*report["models"], *([report["base"]] if report["base"] else [])] if not Path(m).exists()]
    yaml = ["library_name: transformers", "tags:", "- merge", "- nanoaya"]
    if hub:  # the hub refuses names that are not its own
        yaml = ["base_model:", *(f"- {json.dumps(m)}" for m in hub), "base_model_relation: merge", *yaml]
    weights = report["settings"].get("weights", ["-"] * len(report["names"]))
    shown = {k: v for k, v in report["settings"].items() if k != "weights"}
    return "\n".join(["---", *yaml, "---", f"# {title}", "",
                      f"A `{report['method']}` merge of {len(report['names'])} models, made with nanoaya's merge.py "
                      f"(commit {report['commit']}).", "", "| model | weight |", "|---|---|",
                      *(f"| {name} | {w} |" for name, w in zip(report["names"], weights)),
                      *([f"| {report['base_name']} | base |"] if report["base"] else []), "",
                      f"Settings: {', '.join(f'{k} {v}' for k, v in [*shown.items(), ('dtype', report['dtype'])])}.",
                      "", table_of(report), "", f"(Measured on {report['measured_on']}.)", ""])


# ---------------------------------------------------------------------------------------------------------------------

def main(cfg):
    # 1) refuse before any data is read: settings, configs, tokenizers, names and shapes
    begin, out, folders = time.time(), Path(cfg.out), cfg.models + ([cfg.base] if cfg.base else [])
    weights, t = settings(cfg)
    if any(out.resolve() in [Path(m).resolve(), *Path(m).resolve().parents] for m in folders):
        die(f"--out {out} is, or holds, one of the models; give another folder")
    if out.exists() and not (cfg.overwrite and (out / "merge_report.json").exists()):
        die(f"--out {out} exists; give another folder, or --overwrite if it is an earlier merge")
    parents = [parent(name) for name in folders]
    check_configs([p.config for p in parents], folders)
    check_tokenizers([p.folder for p in parents])
    check_tensors([p.table for p in parents], folders)
    for flag in ("weights", "density", "lam", "normalize", "t", "seed", "trim"):
        if flag not in USES[cfg.method] and getattr(cfg, flag) != getattr(Config(), flag):
            print(f"note: --{flag} has no effect on --method {cfg.method}")
    K, first = len(cfg.models), parents[0]
    plan = Plan(cfg.method, parents[:K], weights or [[1.0]] * K, mask_names(cfg.models), t=t, density=cfg.density,
                base=parents[K] if cfg.base else None, lam=cfg.lam, seed=cfg.seed, normalize=cfg.normalize,
                trim=cfg.trim, dtype=None if cfg.dtype == "auto" else getattr(torch, cfg.dtype))
    check_sums(plan, cfg.weights)

    # 2) layout: the first model's files; in each the widest dtype first, so that every tensor is aligned
    table, layout = plan.table(), {}
    for name in sorted(table, key=lambda name: -table[name][1].itemsize):
        layout.setdefault(first.file[name], {})[name] = table[name]
    total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in table.values())
    disk = next(p for p in out.absolute().parents if p.exists())
    if total > (free := shutil.disk_usage(disk).free):
        die(f"--out {out} needs {total / 1e9:.2f} GB, but {disk} has {free / 1e9:.2f} GB left")

    # 3) --weights search: which weights, by scores on rows of every language
    searched = None
    if weights is None:
        import merge_search  # here: it brings the model, sampling and the reward model, which no other merge needs
        searched = merge_search.search(plan, cfg)
        plan.weights, plan.lam = [[w] for w in searched["weights"]], searched["lam"]

    # 4) stream
    streaming, bar = time.time(), progress(None, "merging", total)
    bar.unit, bar.unit_scale = "B", True
    with atomic_dir(out) as folder:
        try:
            with Output(folder, layout) as files:
                stats = merge_stream.merge(plan, files, cfg.threads, bar=bar)
            bar.close()
            seconds = time.time() - streaming

            # 5) last what makes the folder a checkpoint: index, tokenizer, config.json; then the report
            if list(layout) != ["model.safetensors"]:
                write_index(folder, table, first.file)
            carry(first.folder, folder)
            used = {"weights": [w if len(w) > 1 else w[0] for w in plan.weights], "t": t if len(t) > 1 else t[0],
                    "lam": plan.lam}
            report = {"method": cfg.method, "models": cfg.models, "names": plan.keys, "base": cfg.base or None,
                      "base_name": Path(cfg.base).name, "dtype": cfg.dtype,
                      "settings": {flag: used.get(flag, getattr(cfg, flag)) for flag in USES[cfg.method]},
                      "delta_to": "base" if cfg.base else "merge", "cosine_of": "deltas" if cfg.base else "weights",
                      "groups": {group: s.as_dict() for group, s in sorted(stats.items())}, "search": searched,
                      "measured_on": f"all elements of small tensors, a million of every {merge_stream.LOOK} million of large ones",
                      "bytes": total, "seconds": time.time() - begin, "streaming_seconds": seconds, "argv": sys.argv,
                      "commit": git_commit()}
            text = json.dumps(report, indent=1, ensure_ascii=False)
            (folder / "merge_report.json").write_text(text, encoding="utf-8")
            if report["groups"]:
                (folder / "README.md").write_text(card(report, out.name), encoding="utf-8")
            config = first.config
            if cfg.dtype != "auto":
                stored = {key: cfg.dtype for key in ("dtype", "torch_dtype") if key in config}
                config = {**config, **(stored or {"torch_dtype": cfg.dtype})}
            if config == first.config:
                shutil.copyfile(first.folder / "config.json", folder / "config.json")  # byte for byte
            else:
                (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
        except BaseException:  # refused halfway or interrupted: nothing stays
            shutil.rmtree(folder, ignore_errors=True)
            raise

    # 6) what a person wants to know before trusting it
    print(table_of(report).replace("|---", "|-") if report["groups"] else "no tensor of numbers")
    read = sum(math.prod(shape) * dtype.itemsize for p in parents for shape, dtype in p.table.values())
    print(f"{out}: {cfg.method} of {K} models, {read / 1e9:.2f} GB of weights, {total / 1e9:.2f} GB written in "
          f"{seconds:.1f} s ({(read + total) / 1e9 / max(seconds, 1e-3):.2f} GB/s)")


if __name__ == "__main__":
    main(parse_config(Config))
