"""
Writes the files that the miniature's recipe reads, from the embedded dataset (mini/items.py), and trains its tokenizer.

    tokenizer/               byte-level BPE on teacher prompts, answers and UDHR articles 0-24
    data/base.jsonl          SFT rows, split `teacher`, all languages: the base model and, by language, the teachers
    data/udhr.jsonl          text rows: UDHR articles 0-24, for the base model
    data/rm_prompts.jsonl    prompts of the split `rm` on which base and teachers are sampled for near misses
    data/rm_rows.jsonl       the same prompts with their references: what the reward model's pairs are made of
    data/merge_dev.jsonl, data/merge_held_out.jsonl   their two halves, item by item: what merge.py's search for weights
                             scores merges on; no policy is trained on them
    data/arbitrage.jsonl     prompts of the split `prefer` for the pool of teachers: no references
    data/online-N.jsonl      fresh prompts of the split `prefer` for each online round: no references
    data/online.jsonl        the rounds' prompts in one file, for the control without the offline stage
    data/references.jsonl    references of those prompts: read by reports only, never by training
    data/test.jsonl          held-out prompts with references

python -m mini.prepare --out out/mini
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

from chat import train_tokenizer
from common import atomic_dir, parse_config, print0
from data import LANGUAGES, write_rows
from mini.items import load_udhr, rows
from tasks.mini import item_of


@dataclass
class Config:
    out: str = "out/mini"  # run folder: data/ and tokenizer/ are written into it
    tasks: list[str] = field(default_factory=lambda: ["spell", "relative", "unit"])  # also: date list translate
    languages: list[str] = field(default_factory=lambda: list(LANGUAGES))  # a subset makes everything faster
    vocab_size: int = 4096  # of the tokenizer
    arbitrage_share: float = 0.5  # share of `prefer` items that the teachers answer; the rest is for the online rounds
    rounds: int = 3  # online rounds to cut fresh prompts for
    items: int = 0  # per split at most this many items (0: all); for smoke tests
    seed: int = 0  # of the order of items


def split_rows(cfg, made, split):
    """Rows of a split, item by item in a shuffled order, so that a prefix holds the same items in every language."""
    items = {}
    for row in made:
        if row["split"] == split:
            items.setdefault(item_of(row), []).append(row)
    names = sorted(items)
    random.Random(f"{cfg.seed} {split}").shuffle(names)
    return [row for name in (names[:cfg.items] if cfg.items else names) for row in items[name]]


def main(cfg):
    out = Path(cfg.out)
    made = rows(tasks=tuple(cfg.tasks), languages=tuple(cfg.languages))
    teacher, rm, prefer, test = (split_rows(cfg, made, s) for s in ("teacher", "rm", "prefer", "test"))
    udhr = [r for r in load_udhr(range(0, 25)) if r["language"] in cfg.languages]

    def sft(made):
        return [{"id": r["id"], "language": r["language"], "prompt": r["prompt"], "completion": r["reference"]}
                for r in made]

    def prompts(made):
        return [{"id": r["id"], "language": r["language"], "prompt": r["prompt"]} for r in made]

    # arbitrage and the online rounds get different items: each round asks what no earlier stage has seen
    names = list(dict.fromkeys(item_of(r) for r in prefer))
    cut = round(len(names) * cfg.arbitrage_share)
    parts = [set(names[:cut])] + [set(names[cut:][r::cfg.rounds]) for r in range(cfg.rounds)]
    items = list(dict.fromkeys(item_of(r) for r in rm))
    dev = set(items[::2])
    with atomic_dir(out / "data") as data:
        write_rows(data / "base.jsonl", sft(teacher))
        write_rows(data / "udhr.jsonl", [{"language": r["language"], "text": r["text"]} for r in udhr])
        write_rows(data / "rm_prompts.jsonl", prompts(rm))
        write_rows(data / "rm_rows.jsonl", rm)
        write_rows(data / "merge_dev.jsonl", sft(r for r in rm if item_of(r) in dev))
        write_rows(data / "merge_held_out.jsonl", sft(r for r in rm if item_of(r) not in dev))
        write_rows(data / "references.jsonl", prefer)
        write_rows(data / "test.jsonl", test)
        for number, part in enumerate(parts):
            name = f"online-{number}.jsonl" if number else "arbitrage.jsonl"
            write_rows(data / name, prompts(r for r in prefer if item_of(r) in part))
        write_rows(data / "online.jsonl", prompts(r for r in prefer if item_of(r) not in parts[0]))
    with atomic_dir(out / "tokenizer") as folder:
        texts = [r["prompt"] for r in teacher] + [r["reference"] for r in teacher] + [r["text"] for r in udhr]
        train_tokenizer(texts, cfg.vocab_size, folder)
    print0(f"{len(teacher)} teacher, {len(rm)} reward-model, {len(prefer)} preference and {len(test)} test rows, "
           f"{len(cfg.languages)} languages -> {out / 'data'}")


if __name__ == "__main__":
    main(parse_config(Config))
