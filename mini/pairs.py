"""
Preference pairs for the miniature's reward model: the reference against wrong answers, mostly near misses.

A reward model that only knows gross errors (another language, cut off) routes between teachers well and is at chance
between a policy's own samples, where one digit or one plural is wrong. So the rejected side is (a) what models really
say: samples of the base and the teachers on this split that differ from the reference, and (b) answers made from the
table: neighbours, swapped digits, wrong plural, direction and unit, and a few gross ones.

python -m mini.pairs --rows out/mini/data/rm_rows.jsonl --samples out/mini/rm/samples-*.jsonl --out out/mini/rm
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

from common import atomic_dir, die, parse_config, print0
from data import read_jsonl, read_rows, write_rows
from mini.items import WrongAnswers, load_items
from tasks.mini import item_of, normal

NEAR = ("one_digit_off", "digits_swapped", "wrong_plural", "wrong_direction", "wrong_unit")


@dataclass
class Config:
    rows: str = "out/mini/data/rm_rows.jsonl"  # prompts of the split `rm` with references
    samples: list[str] = field(default_factory=list)  # completion files on the same prompts
    out: str = "out/mini/rm-pairs"  # folder to write pairs.jsonl and audit.jsonl into
    near: int = 2  # near misses from the table, per prompt
    gross: float = 0.5  # gross errors from the table, per prompt
    sampled: int = 3  # distinct wrong samples, per prompt
    audit_share: float = 0.1  # share of the items that is held out to audit the reward model
    seed: int = 0


def main(cfg):
    wrong, rng = WrongAnswers(load_items()), random.Random(cfg.seed)
    rows = read_rows(cfg.rows, "prompts")
    said = {}  # id -> distinct wrong samples
    references = {r["id"]: normal(r["reference"]) for r in rows}
    for path in cfg.samples:
        for row, where in read_jsonl(path):
            if row["id"] not in references:
                die(f"{where}: {row['id']!r} is not a prompt of {cfg.rows}")
            if row["ended"] and row["completion"].strip() and normal(row["completion"]) != references[row["id"]]:
                said.setdefault(row["id"], {})[row["completion"].strip()] = None
    items = sorted({item_of(r) for r in rows})
    rng.shuffle(items)
    held_out = set(items[:round(cfg.audit_share * len(items))])
    pairs, audit = [], []
    for row in rows:
        table = wrong(row["task"], item_of(row).split(" ", 1)[1], row["language"], rng)
        near = [(why, text) for why, text in table if why in NEAR]
        gross = [(why, text) for why, text in table if why not in NEAR]
        sampled = [("sampled", text) for text in said.get(row["id"], {})]
        chosen = rng.sample(near, min(cfg.near, len(near))) + rng.sample(sampled, min(cfg.sampled, len(sampled)))
        if gross and rng.random() < cfg.gross:
            chosen.append(rng.choice(gross))
        for why, text in chosen:
            (audit if item_of(row) in held_out else pairs).append({
                "id": row["id"], "language": row["language"], "prompt": row["prompt"], "chosen": row["reference"],
                "rejected": text, "why": why})
    rng.shuffle(pairs)
    with atomic_dir(cfg.out) as folder:
        write_rows(Path(folder) / "pairs.jsonl", pairs)
        write_rows(Path(folder) / "audit.jsonl", audit)
    print0(f"{len(pairs)} pairs and {len(audit)} held out for the audit -> {cfg.out}")


if __name__ == "__main__":
    main(parse_config(Config))
