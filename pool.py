"""
A pool at work: which prompts are asked, the folder of a run that is under way, answers and their rewards.

    OUT.unfinished/run.json                  what the run depends on
                  /TEACHER.ROUND.jsonl       its completions, in the order of the prompts
                  /TEACHER.ROUND.scored.jsonl   the same rows with flags, reward and judge_reward

Every file only grows, by parts that are on the disk before the next one is asked for: whatever stops a run, the same command
counts the rows that are there and goes on behind them.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import unicodedata
import zlib
from pathlib import Path

import numpy as np

import common
from common import atomic_file, die, print0, writing
from guards import all_flags
from reward import score
from routers import make_table
from rows import RowsOnDisk, RowWriter, check_row
from teachers import answer_all

# ---------------------------------------------------------------------------------------------------------------------
# prompts

def read_prompts(path, languages):
    """
    -> (RowsOnDisk, numbers of the rows to ask, how many repeat another one). A prompt that says the same as an earlier one
    of its language, up to case, spaces and Unicode form, is left out; an id that two prompts share is an error.
    """
    rows, kept, seen, ids, twins, n = RowsOnDisk(path), [], {}, {}, [], -1
    for n, (row, where) in enumerate(rows.scan()):
        check_row(row, "prompts", where)
        if not isinstance(row.get("english", ""), str):
            die(f"{where}: 'english', the prompt in English, must be a string")
        if languages and row["language"] not in languages:
            continue
        if row["id"] in ids:
            die(f"{where}: the id {row['id']!r} is that of row {ids[row['id']] + 1} as well: ids name prompts")
        ids[row["id"]] = n
        said = row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"], ensure_ascii=False)
        said = " ".join(unicodedata.normalize("NFC", said).casefold().split())
        digest = hashlib.sha256(f"{row['language']} {said}".encode("utf-8")).digest()[:16]
        if digest in seen:
            twins.append((where, seen[digest]))
        else:
            seen[digest] = n + 1
            kept.append(n)
    if n < 0:
        die(f"{path} holds no rows")
    if not kept:
        die(f"{path} holds no prompt in {' '.join(languages)}")
    if twins:
        print0(f"{path}: {len(twins)} prompts say what an earlier one says and are left out, the first at {twins[0][0]} "
               f"(row {twins[0][1]})")
    return rows, kept, len(twins)


def sample_of(languages, scored):
    """(P,) str -> (P,) bool: the first `scored` prompts of each language, at most half of them."""
    inside = np.zeros(len(languages), bool)
    for language in dict.fromkeys(languages.tolist()):
        at = np.flatnonzero(languages == language)
        inside[at[:min(scored, (len(at) + 1) // 2)]] = True
    return inside


# ---------------------------------------------------------------------------------------------------------------------
# the folder of a run that is under way

def gone(out):
    """Where OUT.unfinished is moved before it is removed: a kill between two of its files must not cost answers."""
    return Path(out).with_name(f".{Path(out).name}.unfinished.gone")


class Work:
    """
    OUT.unfinished: one run at a time works in it (`with`), and what it holds was asked with the same settings.
    """

    def __init__(self, cfg, settings):
        """settings: {what: its value}; "pool": {teacher: what it is}."""
        self.out, self.folder = cfg.out, Path(cfg.out).with_name(Path(cfg.out).name + ".unfinished")
        if cfg.resume not in ("auto", "never"):
            die(f"--resume is auto or never, got {cfg.resume!r}")
        with writing(self.folder):
            if common.is_main():
                shutil.rmtree(gone(cfg.out), ignore_errors=True)
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock = os.open(self.folder, os.O_RDONLY)
                try:
                    fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self.begin(self.folder / "run.json", cfg.resume, settings)
                except BlockingIOError:
                    die(f"another run works in {self.folder}: wait for it to end, or give another --out")
                except BaseException:
                    os.close(self.lock)
                    raise
        common.barrier()

    def begin(self, path, resume, settings):
        files = sorted(self.folder.iterdir(), key=lambda file: file == path)  # run.json, which is about the others, last
        for file in files if resume == "never" else ():
            file.unlink()
        if path.exists() and any(self.folder.glob("*.jsonl")):  # it has answers
            self.compare(json.loads(path.read_text(encoding="utf-8")), settings)
        with atomic_file(path) as f:
            json.dump(settings, f, ensure_ascii=False, indent=1)

    def compare(self, before, now):
        changed = [key for key in now | before if key != "pool" and before.get(key) != now.get(key)]
        old, new = before["pool"], now["pool"]
        # who has said nothing so far may be mended: a damaged folder, a wrong address
        changed += [f"teacher {name}" for name in new if name in old and old[name] != new[name] and any(
            path.stat().st_size for path in self.folder.glob(f"{self.stem(name)}.*.j*"))]
        if now["router"] != "reward" and not changed and old.keys() != new.keys():
            changed = ["pool"]  # picks depend on it; answers of all teachers to all prompts do not
        if changed:
            die(f"{self.folder} holds an unfinished run with another {', another '.join(changed)}: give again what it had to go "
                "on, another --out to begin another, or --resume never to throw it away")

    @staticmethod
    def stem(name):
        """How the names of a teacher's files begin."""
        return re.sub(r"[^A-Za-z0-9._-]", "_", name)[:60] + f"-{zlib.crc32(name.encode('utf-8')):08x}"

    def file(self, teacher, number):
        """Where a teacher's answers of round `number` are."""
        return self.folder / f"{self.stem(teacher.name)}.{number}.jsonl"

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if common.is_main():
            os.close(self.lock)

    def end(self):
        """Removes the folder: nobody can still answer what is missing."""
        with writing(self.folder):
            if common.is_main():
                os.rename(self.folder, gone(self.out))
                shutil.rmtree(gone(self.out), ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# answers and rewards

def score_file(path, models, cfg):
    """
    Adds flags and rewards to the completion rows of a file, part by part: -> RowsOnDisk of `path`.scored.jsonl, which may
    hold some from before. `models`: {"reward": (Arbiter, its Chat)} and perhaps "judge_reward". An empty text has no reward.
    """
    rows, writer = RowsOnDisk(path).scanned(), RowWriter(path.with_suffix(".scored.jsonl"))
    for begin in range(writer.rows, len(rows), cfg.completions_at_once):
        part = [rows[n] for n in range(begin, min(begin + cfg.completions_at_once, len(rows)))]
        said = [n for n, row in enumerate(part) if row["completion"].strip()]
        found = [row | {"flags": names} | dict.fromkeys(models) for row, names in zip(part, all_flags(part))]
        for name, (model, chat) in models.items():
            rewards = score(model, chat, [(part[n]["prompt"], part[n]["completion"]) for n in said], cfg.batch_tokens)
            for n, reward in zip(said, rewards):
                found[n][name] = reward
        writer.add(found)
    return RowsOnDisk(writer.path)


def kept_picks(work, ids, picks, names):
    """
    picks (n,): number in `names` of who answers each prompt (ids) of the second round, -1: nobody could; what an earlier
    run of the same command picked stays. A teacher that was given up then and answers now would change the picks, and so
    what the round's files hold.
    """
    def kept():
        path = work.folder / "picks.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        now = before | {i: names[t] for i, t in zip(ids, picks.tolist()) if t >= 0 and i not in before}
        with atomic_file(path) as f:
            json.dump(now, f, ensure_ascii=False)
        return now
    now = common.on_main(kept)
    return np.array([names.index(now[i]) if i in now else -1 for i in ids], dtype=int)


def ask(cfg, pool, picks, prompts, numbers, ids, languages, arbiters, work, device):
    """
    The teachers answer the prompts with these `numbers`, ids and languages, all of them or those that are picked, and the
    Arbiter scores -> ([RowsOnDisk] of scored rows, {teacher: why it was given up}, (P,) bool: the scored sample, which picks
    are fitted on).
    """
    languages = np.array(languages)
    able = np.array([[teacher.speaks(language) for teacher in pool] for language in languages])
    if lost := [language for language in dict.fromkeys(languages.tolist()) if not able[languages == language].any()]:
        die(f"no teacher of the pool answers in {' '.join(lost)}: add one, or leave them out with --languages")
    stopped, files = {}, []

    def round_of(number, wanted):
        """(P, T) bool: who answers what. Then everything is scored: no teacher is in memory beside a reward model."""
        paths = []
        for t, teacher in enumerate(pool):
            path, mine = work.file(teacher, number), [numbers[i] for i in np.flatnonzero(wanted[:, t])]
            if mine and (why := answer_all(teacher, prompts, mine, path, cfg, device)):
                stopped[teacher.name] = why
            paths += [path] if path.exists() and path.stat().st_size else []
        if not paths:
            reasons = "; ".join(f"{name} ({why})" for name, why in stopped.items())
            die(f"there is nothing to route, every teacher was given up: {reasons}")
        models = arbiters()
        files.extend(score_file(path, models, cfg) for path in paths)

    sample = sample_of(languages, cfg.scored)
    if cfg.router == "random" or cfg.learned or (cfg.router == "fixed" and set(languages.tolist()) <= picks.given.keys()):
        sample[:] = False  # nothing has to be known
    everybody = np.ones(len(numbers), bool) if cfg.router == "reward" else sample
    if everybody.any():
        round_of(1, able & everybody[:, None])
    if cfg.router != "reward":
        if sample.any():
            table, _ = make_table(files, cfg.guards, picks.teachers, ids, languages.tolist())
            picks.fit(table, sample, lambda i: prompts[numbers[i]]["prompt"])
        able = able & np.array([teacher.name not in stopped for teacher in pool])
        rest = np.flatnonzero(~sample)
        asked = [ids[i] for i in rest]
        chosen = picks.pick(cfg.router, asked, languages[rest].tolist(), able[rest],
                            lambda i: prompts[numbers[rest[i]]]["prompt"])
        if sample.any():  # else they depend on the command alone
            chosen = kept_picks(work, asked, chosen, picks.teachers)
        wanted = np.zeros(able.shape, bool)
        wanted[rest[chosen >= 0], chosen[chosen >= 0]] = True
        if wanted.any():
            round_of(2, wanted)
    return files, stopped, sample
