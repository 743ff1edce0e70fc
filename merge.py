"""
Merging checkpoints, tensor by tensor, never holding a model. Aya Expanse merges at every stage: models of different
language clusters, and checkpoints of one run. Its choice is the weighted average (model soups, Wortsman et al. 2022,
arXiv 2203.05482). SLERP (Shoemake 1985), TIES (Yadav et al. 2023, arXiv 2306.01708) and DARE-TIES (Yu et al. 2023,
arXiv 2311.03099) are here to compare. OUT/merge_report.json says how far each model moved, and how much they agree.

python merge.py --models out/mini/sft-west out/mini/sft-east --weights 1 2 --out out/my-merged
python merge.py --method ties --models out/mini/sft-west out/mini/sft-east --base out/mini/base --density 0.2 --out out/my-ties
"""

import hashlib
import json
import math
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open

from checkpoint import Checkpoint, carry, finite, read_json, safetensors_header, write_index
from common import atomic_dir, die, git_commit, parse_config, progress

CHUNK = 1 << 17  # elements merged at once: they stay in the cache
OUTPUT = ("auto", "float16", "bfloat16", "float32", "float64")
USES = {"linear": ("weights", "normalize"), "slerp": ("t",), "ties": ("weights", "density", "lam", "normalize"),
        "dare_ties": ("weights", "density", "lam", "normalize", "seed")}


@dataclass
class Config:
    method: str = "linear"  # linear | slerp | ties | dare_ties
    models: list[str] = field(default_factory=list)  # checkpoint folders; the first gives config.json and the tokenizer
    weights: list[float] = field(default_factory=list)  # one per model; all equal if left out
    base: str = ""  # what the models were fine-tuned from: needed by ties and dare_ties, else only for the report
    density: float = 0.2  # ties: share of each delta kept, the largest; dare_ties: probability to keep, then rescaled
    lam: float = 1.0  # ties, dare_ties: how far to go from the base along the merged delta
    t: float = 0.5  # slerp: 0 is the first model, 1 the second
    seed: int = 0  # dare_ties: masks depend on this, the model's folder name and the tensor's name, on nothing else
    normalize: bool = True  # divide by the sum of weights (ties, dare_ties: of the models that agree on the sign)
    dtype: str = "auto"  # of the output: auto (the first model's) | float16 | bfloat16 | float32 | float64
    out: str = "out/mini/merged"  # folder to write; it appears when the merge is complete
    overwrite: bool = False  # replace --out if it is an earlier merge


# ---------------------------------------------------------------------------------------------------------------------
# the mathematics: tensors of one shape in, one out, computed in fp32 or wider and not rounded (the caller casts once).
# Masks are multiplied with: on a CPU that is several times as fast as torch.where, whose branches guess wrong.

def widen(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(tensors, weights, normalize=True):
    """sum_i w_i x_i / sum_i w_i (model soups); normalize off: no division. A model of weight 0 is not looked at."""
    terms = [(x, w) for x, w in zip(tensors, weights, strict=True) if w != 0] or [(tensors[0], 0.0)]
    out = widen(terms[0][0]) * terms[0][1]
    for x, w in terms[1:]:
        out.add_(widen(x), alpha=w)
    return out.div_(sum(weights)) if normalize else out  # one division at the end: w_i / sum(w) would round as well


def dots(a, b):
    """a.a, a.b, b.b as float64 (3,). Of a tensor: the sum over its chunks."""
    a, b = a.flatten().double(), b.flatten().double()
    return torch.stack([a @ a, a @ b, b @ b])


def slerp(a, b, t, sums=None):
    """
    sin((1-t) W) / sin(W) a + sin(t W) / sin(W) b, W the angle between a and b as flat vectors (Shoemake 1985, with the
    lengths left as they are). Nearly parallel, or a zero vector: (1-t) a + t b.
    sums: dots() of the whole tensors, where a and b are chunks.
    """
    aa, ab, bb = (dots(a, b) if sums is None else sums).tolist()
    cosine = ab / math.sqrt(aa) / math.sqrt(bb) if min(aa, bb) > 1e-16 else 1.0
    if not abs(cosine) <= 0.9995:  # NaN as well: the caller looks for it
        return linear([a, b], [1 - t, t], normalize=False)
    angle = math.acos(cosine)
    weights = [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
    return linear([a, b], weights, normalize=False)


def trim_threshold(chunks, density):
    """
    TIES step 1: the k-th largest |x|, k = max(1, int(density * n)), over the n elements of chunks(), which yields the
    tensors anew at each call. Exact without sorting: the bits of fp32 magnitudes order like the magnitudes, so count
    their upper 16 of 31 bits, then the lower 15 of those in the bin that holds the k-th.
    """
    def bits(x):
        return x.float().abs().flatten().view(torch.int32)

    def find(counts, k):  # the highest bin that has k elements in it and above, and what is left of k inside it
        above = counts.flip(0).cumsum(0).flip(0)
        b = int((above >= k).sum()) - 1
        return b, k - int(above[b] - counts[b])

    counts = sum((torch.bincount(bits(x) >> 15, minlength=1 << 16) for x in chunks()), torch.zeros(1 << 16).long())
    if not counts.any():
        return 0.0  # an empty tensor
    high, k = find(counts, max(1, int(density * int(counts.sum()))))
    low, _ = find(sum(torch.bincount(b[b >> 15 == high] & 0x7FFF, minlength=1 << 15) for b in map(bits, chunks())), k)
    return torch.tensor(high << 15 | low, dtype=torch.int32).view(torch.float32).item()


def elect_and_merge(base, deltas, weights, lam=1.0, normalize=True):
    """
    TIES steps 2 and 3: elect the sign of sum_i w_i d_i per element (0 counts as +); tau = sum w_i d_i / sum w_i over
    the models whose w_i d_i has that sign, zeros never counting (normalize off: no division); theta_0 + lambda tau.
    With equal weights this is the paper's rule. Where nothing moved the base stays bit for bit, its -0.0 included.
    """
    plus, minus, plus_weight, minus_weight = (torch.zeros_like(base) for _ in range(4))
    for d, w in zip(deltas, weights, strict=True):
        term = d * w
        plus += term.clamp(min=0)
        minus += term.clamp(max=0)
        plus_weight.add_(term.sign().clamp(min=0), alpha=w)
        minus_weight.sub_(term.sign().clamp(max=0), alpha=w)
    elected = (plus + minus >= 0).to(base.dtype)
    tau = elected * plus + (1 - elected) * minus
    if normalize:
        divisor = elected * plus_weight + (1 - elected) * minus_weight
        tau /= divisor + (divisor == 0)
    return base - (0.0 - lam * tau)  # 0.0 - 0.0 is +0.0, which leaves a base of -0.0 alone where an addition would not


def ties(base, tensors, weights, density, lam=1.0, normalize=True, thresholds=None):
    """
    TIES (algorithm 1): keep each delta's largest `density` share, all ties included, then elect and merge.
    thresholds: trim_threshold() of each model's whole delta, where base and tensors are chunks.
    """
    base, trimmed = widen(base), []
    for i, x in enumerate(tensors):
        d = widen(x) - base
        least = thresholds[i] if thresholds else trim_threshold(lambda: [d], density)
        trimmed.append(d * (d.float().abs() >= least).to(d.dtype))
    return elect_and_merge(base, trimmed, weights, lam, normalize)


def dare(delta, density, generator):
    """DARE (1 - density is the paper's p): keep each element with probability density, times 1 / density. Unbiased."""
    kept = torch.empty(delta.shape).uniform_(generator=generator) < density  # fp32 draws, the same however chunked
    return widen(delta) * kept.to(torch.float32) / density


def dare_ties(base, tensors, weights, density, generators, lam=1.0, normalize=True):
    """DARE on each delta, then TIES' election and mean without a second trim. base and tensors may be chunks."""
    base = widen(base)
    deltas = [dare(widen(x) - base, density, g) for x, g in zip(tensors, generators, strict=True)]
    return elect_and_merge(base, deltas, weights, lam, normalize)


def mask_generator(seed, model, tensor):
    """Keyed by a hash, as raw seeds would repeat draws that made the weights. torch's CPU generator takes 32 bits."""
    return torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(f"{seed}\n{model}\n{tensor}".encode()).digest()[:4], "little"))


# ---------------------------------------------------------------------------------------------------------------------
# one tensor, chunk by chunk

class Stats:
    """Sums over a group of tensors. x: K models' (n,); origin (n,): the base's, or without a base the result's."""

    def __init__(self, K):
        self.n, self.size, self.moved, self.same = 0, 0.0, torch.zeros(K).double(), torch.zeros(K).double()
        self.gram = torch.zeros(K, K).double()  # inner products of the deltas; without a base, of the weights

    def add(self, x, origin, has_base):
        deltas = [v - origin for v in x]
        rows, K = deltas if has_base else x, len(x)
        self.n, self.size = self.n + origin.numel(), self.size + (origin @ origin).item()
        self.moved += torch.stack([d @ d for d in deltas])
        self.same += origin.numel() - torch.stack([d.count_nonzero() for d in deltas])
        self.gram += torch.stack([rows[min(i, j)] @ rows[max(i, j)] for i in range(K) for j in range(K)]).view(K, K)

    def as_dict(self):
        lengths = self.gram.diag().sqrt()
        cosine = (self.gram / torch.outer(lengths, lengths)).tolist()  # 0 / 0 for a model that did not move: null
        return {"parameters": self.n, "norm": math.sqrt(self.size), "delta_norm": self.moved.sqrt().tolist(),
                "unchanged": (self.same / max(1, self.n)).tolist(),  # share of elements: bf16 swallows small updates
                "cosine": [[c if math.isfinite(c) else None for c in row] for row in cosine]}


def merge_tensor(name, tensors, base, cfg, keys, dtype, stats=None):
    """
    Yields the merged tensor as 1-D chunks of `dtype`. tensors: K of one shape, of any floating dtypes (integers must be
    equal and are copied); base: one more, or None; keys: K names for DARE's masks. Arithmetic in fp32 for 16-bit
    inputs, in fp64 where one is wider, so that the cast at the end is the one rounding that shows.
    Raises SystemExit on NaN, infinity, overflow of `dtype`, and integers that differ.
    """
    K, weights, who = len(tensors), cfg.weights or [1.0] * len(tensors), cfg.models + [cfg.base]
    flat = [x.reshape(-1) for x in [*tensors, *([] if base is None else [base])]]
    if not flat[0].is_floating_point():
        for x, model in zip(flat, who):
            if not torch.equal(x, flat[0]):
                die(f"{model}: tensor {name} holds integers unlike {who[0]}'s: make them equal, they have no average")
        yield flat[0]
        return
    work = torch.float32 if all(x.dtype.itemsize == 2 for x in flat) else torch.float64
    chunks = [slice(i, i + CHUNK) for i in range(0, flat[0].numel(), CHUNK)]
    if cfg.method == "slerp":  # what needs the whole tensor
        sums = sum((dots(flat[0][c], flat[1][c]) for c in chunks), torch.zeros(3).double())
    elif cfg.method == "ties":
        thresholds = [trim_threshold(lambda: (x[c].to(work) - flat[K][c].to(work) for c in chunks), cfg.density)
                      for x in flat[:K]]
    elif cfg.method == "dare_ties":
        generators = [mask_generator(cfg.seed, key, name) for key in keys]
    for c in chunks:
        inputs = [x[c].to(work) for x in flat]
        x, origin = inputs[:K], None if base is None else inputs[K]
        for values, model in zip(inputs, who):
            if not finite(values):
                die(f"{model}: tensor {name} holds NaN or infinity: the checkpoint is broken; leave it out")
        if cfg.method == "linear":
            y = linear(x, weights, cfg.normalize)
        elif cfg.method == "slerp":
            y = slerp(*x, cfg.t, sums)
        elif cfg.method == "ties":
            y = ties(origin, x, weights, cfg.density, cfg.lam, cfg.normalize, thresholds)
        else:
            y = dare_ties(origin, x, weights, cfg.density, generators, cfg.lam, cfg.normalize)
        if cfg.method == "slerp" or cfg.method == "linear" and cfg.normalize:  # equal parents come back bit for bit
            y = x[0] if all(torch.equal(v.view(torch.uint8), x[0].view(torch.uint8)) for v in x) else y
        if not finite(out := y.to(dtype)):
            die(f"tensor {name}: merged values overflow {dtype}; choose smaller --weights or --lam, or --dtype float32")
        if stats:
            stats.add(x, y if base is None else origin, base is not None)
        yield out


# ---------------------------------------------------------------------------------------------------------------------
# refusals: what would make an average of weights meaningless

def check_settings(cfg):
    K, w = len(cfg.models), cfg.weights or [1.0]
    for wrong, message in (
            (cfg.method not in USES, f"--method {cfg.method!r} is unknown; one of: {' '.join(USES)}"),
            (cfg.dtype not in OUTPUT, f"--dtype {cfg.dtype!r} is unknown; one of: {' '.join(OUTPUT)}"),
            (K < 1, "--models needs at least one checkpoint folder"),
            (cfg.method == "slerp" and K != 2, f"--method slerp takes two --models, not {K}: merge two at a time"),
            (cfg.weights and len(w) != K, f"--weights has {len(w)} values for {K} --models: one for each, or none"),
            (not all(map(math.isfinite, [*w, cfg.t, cfg.lam])), "--weights, --t and --lam take finite numbers"),
            (cfg.method == "slerp" and len(set(w)) > 1, "--method slerp mixes by --t; for weights a b: b / (a + b)"),
            (cfg.normalize and abs(math.fsum(w)) <= 1e-9 * max(map(abs, w)),
             f"--weights {' '.join(map(str, w))} sum to zero, nothing to divide by: change one, or --no-normalize"),
            (not 0 < cfg.density <= 1, f"--density {cfg.density} is outside (0, 1]: it is the share that is kept"),
            ("ties" in cfg.method and not cfg.base, f"--method {cfg.method} merges what training changed: give --base, "
                                                    "the folder that all models were fine-tuned from")):
        if wrong:
            die(message)


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


def functional(config):
    """The part of a config.json that changes what the weights compute, in one spelling for transformers 4 and 5."""
    c = {k: v for k, v in config.items() if v is not None and k not in NEUTRAL}
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
        merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model.get("merges") or []]
        return {**{k: v for k, v in t.items() if k not in ("padding", "truncation")}, **model, "merges": merges}

    paths = [p for f in folders if (p := Path(f) / "tokenizer.json").exists()]
    for path in paths[1:]:
        if path.read_bytes() != paths[0].read_bytes() and (a := parts(paths[0])) != (b := parts(path)):
            what = ", ".join(sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k)))
            die(f"{paths[0]} and {path} differ in: {what}; merge only models of one tokenizer")


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints on disk

def parent(folder):
    """A model's Checkpoint, without the second copy of a tied head that some folders hold: the merge has none."""
    stored, head, embedding = Checkpoint(folder), "lm_head.weight", "model.embed_tokens.weight"
    if functional(stored.config)["tie_word_embeddings"] and {head, embedding} <= stored.table.keys():
        if not stored.same(head, embedding):
            die(f"{folder}: tensor {head} differs from {embedding}, though config.json ties them; correct one")
        del stored.table[head]
    return stored


def read(stored, name):
    """A tensor, mapped: the system may drop its pages, and opened anew, so that they leave this process with it."""
    with safe_open(stored.folder / stored.file[name], framework="pt") as f:
        return f.get_tensor(name)


def output_dtype(cfg, first):
    return first if cfg.dtype == "auto" or not first.is_floating_point else getattr(torch, cfg.dtype)


def mask_names(folders):
    """Keys of DARE's masks: the folder's name; where two share it, with as many parents as tell them apart."""
    parts = [Path(os.path.abspath(f)).parts for f in folders]
    n = next(n for n in range(1, 1000) if len({p[-n:] for p in parts}) == len(set(parts)))
    return ["/".join(p[-n:]) for p in parts]


def group_of(name):
    groups = ("embed", "embedding"), ("attn", "attention"), ("mlp", "mlp"), ("norm", "norm"), ("head", "head")
    return next((group for part, group in groups if part in name), "other")


# ---------------------------------------------------------------------------------------------------------------------

def main(cfg):
    # 1) refuse before any data is read: settings, configs, tokenizers, names and shapes
    begin, out, folders = time.time(), Path(cfg.out), cfg.models + ([cfg.base] if cfg.base else [])
    check_settings(cfg)
    torch.set_num_threads(1)  # chunks are too small to share between threads
    if any(out.resolve() in [Path(m).resolve(), *Path(m).resolve().parents] for m in folders):
        die(f"--out {out} is, or holds, one of the models; give another folder")
    if out.exists() and not (cfg.overwrite and (out / "merge_report.json").exists()):
        die(f"--out {out} exists; give another folder, or --overwrite if it is an earlier merge")
    parents = [parent(folder) for folder in folders]
    check_configs([p.config for p in parents], folders)
    check_tokenizers(folders)
    check_tensors([p.table for p in parents], folders)
    for flag in ("weights", "density", "lam", "normalize", "t", "seed"):
        if flag not in USES[cfg.method] and getattr(cfg, flag) != getattr(Config(), flag):
            print(f"note: --{flag} has no effect on --method {cfg.method}")
    cfg.weights = cfg.weights or [1.0] * len(cfg.models)

    # 2) layout: the first model's files; in each the widest dtype first, so that every tensor is aligned
    first, K, layout = parents[0], len(cfg.models), {}
    table = {name: (shape, output_dtype(cfg, dtype)) for name, (shape, dtype) in first.table.items()}
    for name in sorted(table, key=lambda name: -table[name][1].itemsize):
        layout.setdefault(first.file[name], {})[name] = table[name]
    total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in table.values())
    disk = next(p for p in out.absolute().parents if p.exists())
    if total > (free := shutil.disk_usage(disk).free):
        die(f"--out {out} needs {total / 1e9:.2f} GB, but {disk} has {free / 1e9:.2f} GB left")

    # 3) stream: a file's header, then the chunks of each tensor as they are made
    stats, keys, bar = {}, mask_names(cfg.models), progress(None, "merging", total)
    bar.unit, bar.unit_scale = "B", True
    with atomic_dir(out) as folder:
        try:
            for file, part in sorted(layout.items()):
                with open(folder / file, "wb") as f:
                    f.write(safetensors_header(part))
                    for name, (_, dtype) in part.items():
                        tensors, group = [read(p, name) for p in parents], stats.setdefault(group_of(name), Stats(K))
                        base = tensors.pop() if cfg.base else None
                        for chunk in merge_tensor(name, tensors, base, cfg, keys, dtype, group):
                            f.write(chunk.view(torch.uint8).numpy())
                            bar.update(chunk.nbytes)

            # 4) last what makes the folder a checkpoint: index, tokenizer, config.json; then the report
            if list(layout) != ["model.safetensors"]:
                write_index(folder, table, first.file)
            carry(first.folder, folder)
            shutil.copyfile(first.folder / "config.json", folder / "config.json")
            if cfg.dtype != "auto":
                stored = {key: cfg.dtype for key in ("dtype", "torch_dtype") if key in first.config}
                config = {**first.config, **(stored or {"torch_dtype": cfg.dtype})}
                (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
            groups = {group: s.as_dict() for group, s in sorted(stats.items()) if s.n}
            report = {"method": cfg.method, "models": cfg.models, "base": cfg.base or None, "dtype": cfg.dtype,
                      "settings": {flag: getattr(cfg, flag) for flag in USES[cfg.method]}, "mask_names": keys,
                      "delta_to": "base" if cfg.base else "result", "cosine_of": "deltas" if cfg.base else "weights",
                      "groups": groups, "bytes": total, "seconds": time.time() - begin, "commit": git_commit()}
            (folder / "merge_report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        except BaseException:  # refused halfway or interrupted: nothing stays
            shutil.rmtree(folder, ignore_errors=True)
            raise

    # 5) what a person wants to know before trusting it
    print(f"{'group':<10} {'parameters':>13} | |delta| / |{report['delta_to']}| | cosines of {report['cosine_of']}")
    for group, g in groups.items():
        moved = " ".join(f"{d / (g['norm'] or 1):.2e}" for d in g["delta_norm"])
        pairs = [g["cosine"][i][j] for i in range(K) for j in range(i + 1, K)]
        cosines = " ".join("-" if c is None else f"{c:.4f}" for c in pairs)
        print(f"{group:<10} {g['parameters']:>13,} | {moved} | {cosines}")
    print(f"{out}: {cfg.method} of {K} models, {total / 1e9:.2f} GB in {time.time() - begin:.1f} s")


if __name__ == "__main__":
    main(parse_config(Config))
