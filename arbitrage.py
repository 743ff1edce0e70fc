"""
Multilingual arbitrage (Odumakinde et al. 2024, https://arxiv.org/abs/2408.14960): no teacher is best in every language,
so a pool of teachers answers every prompt and a reward model, the Arbiter, keeps the best answer.

    completions.jsonl   what every teacher said, with rewards and the guards that it fails
    sft.jsonl           the routed completion of each prompt: what the student is fine-tuned on
    pairs.jsonl         best against worst of the pool, ties dropped: what offline DPO trains on; or, with --contrast, a
                        strong teacher's answer against one translated from English (arXiv 2407.02552)
    report.html         who answers what, the Arbiter's audit, routers compared; report.json: the same as numbers

Routers (routers.py): `reward` (the recipe's), `fixed`, `single`, `random`, `learned`. Pool, endpoints, translated answers:
teachers.py. What is never routed, whatever its reward: guards.py.

1. --audit: preference rows say whether the Arbiter can be trusted, language by language, before anything is asked.
2. The teachers answer: all of them every prompt (router reward), or all of them the first --scored prompts of a language,
   from which teachers are picked, and then only the picked one each other prompt. 3. The Arbiter scores. 4. Routing.

All of it can be stopped and killed at any time: the same command goes on, and nothing is asked or scored twice.

python arbitrage.py --prompts out/mini/data/arbitrage.jsonl --teachers out/mini/teacher-*/ --out out/my-arbitrage
python arbitrage.py --router learned --scored 30 --out out/my-learned
python arbitrage.py --completions out/mini/arbitrage/completions.jsonl --router random --out out/my-random
"""

import contextlib
import dataclasses
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import common
from chat import Chat
from common import atomic_file, die, parse_config, print0
from guards import GUARDS, REJECTED_GUARDS
from languages import LANGUAGES
from pool import Work, ask, gone, read_prompts, sample_of
from pool_page import page
from pool_report import completed, refused, samples_of, summary
from reward import best_against_worst, load_reward_model, preference_row, read_audit, reward_model_of, run_audit
from routers import ROUTERS, Picks, best_slot, make_table
from rows import RowsOnDisk
from teachers import fingerprint, identity, read_pool


@dataclass
class Config:
    prompts: str = "out/mini/data/arbitrage.jsonl"  # rows with id, language, prompt
    languages: list[str] = field(default_factory=list)  # only prompts in these languages (default: all)
    teachers: list[str] = field(default_factory=lambda: [f"out/mini/teacher-{c}" for c in (
        "western", "eastern", "mideast", "asian")])  # the pool: folders, hub names, URL#name or files of completions
    pool: str = ""  # file with one teacher a line, with settings of its own, instead of --teachers (teachers.py)
    reward_model: str = "out/mini/rm"  # the Arbiter
    judge: str = ""  # a second reward model: agreement in the audit, and win rates that are not the Arbiter's own
    audit: list[str] = field(default_factory=list)  # preference rows; untrusted languages are refused before anything is asked
    force: bool = False  # route languages in which the Arbiter is no better than chance all the same
    completions: list[str] = field(default_factory=list)  # route these, sampled and scored before; nobody is asked
    router: str = "reward"  # reward, fixed, single, random or learned
    fixed: list[str] = field(default_factory=list)  # router fixed: language=teacher ... (default: the sample's best)
    learned: str = ""  # router learned: router.safetensors of an earlier run; nothing is scored first
    scored: int = 50  # prompts per language that all teachers answer before fixed, single and learned pick one
    guards: list[str] = field(default_factory=lambda: list(GUARDS))  # what is never routed, and never the chosen side of a pair
    rejected_guards: list[str] = field(default_factory=lambda: list(REJECTED_GUARDS))  # what is not even the rejected side
    contrast: list[str] = field(default_factory=list)  # two teachers: pairs are the first's answers against the second's
    margin: float = 0.0  # rewards of a pair must be further apart than this
    out: str = "out/mini/arbitrage-run"  # folder to write
    samples: int = 1  # completions per teacher and prompt
    temperature: float = 0.0  # of the samples; 0: greedy
    top_p: float = 1.0  # keep the most likely tokens that hold this much probability
    min_p: float = 0.0  # drop tokens less likely than this share of the likeliest one's probability
    max_new_tokens: int = 48  # longest completion; one that is cut off is never routed
    batch_size: int = 256  # sequences in flight
    batch_tokens: int = 8192  # tokens per forward of the reward model, padding included
    completions_at_once: int = 4096  # asked or scored between two writes; a kill costs at most so many
    threads: int = 16  # endpoint: requests at once
    timeout: float = 600.0  # endpoint: seconds for a response
    retries: int = 6  # endpoint: further tries of a request that failed
    resume: str = "auto"  # auto: go on where the same command stopped; never: start over
    seed: int = 0  # of the draws


# ---------------------------------------------------------------------------------------------------------------------
# what is written

def chosen_slots(cfg, table, picks, prompt_of):
    """(P,) the slot that the router keeps for each prompt; -1: none."""
    if cfg.router == "reward":
        return best_slot(table)
    return best_slot(table, picks.pick(cfg.router, table.ids, table.languages.tolist(), table.asked(), prompt_of))


def pair_of(cfg, rows):
    """
    (chosen, rejected) of a prompt's completion rows, or None: the best against the worst of the pool, or the best of one
    teacher against the worst of another. What the guards refuse may be rejected all the same (guards.REJECTED_GUARDS).
    """
    strong, weak = ([r for r in rows if not cfg.contrast or r["teacher"] == cfg.contrast[side]] for side in (0, 1))
    return best_against_worst(strong, weak, cfg.margin, cfg.guards, cfg.rejected_guards)


def write_data(cfg, folder, table, files, chosen):
    """
    completions.jsonl, sft.jsonl and pairs.jsonl, prompt by prompt -> (P,) bool: which have a pair. Texts come from the files
    that hold them, one prompt at a time.
    """
    fields, paired = ("id", "language", "prompt", "completion", "teacher", "reward"), np.zeros(len(table.ids), bool)
    with contextlib.ExitStack() as stack:
        completions, sft, pairs = (stack.enter_context(atomic_file(folder / f"{name}.jsonl"))
                                   for name in ("completions", "sft", "pairs"))
        write = lambda f, row: f.write(json.dumps(row, ensure_ascii=False) + "\n")
        for p in range(len(table.ids)):
            rows = {s: files[table.file[p, s]][table.row[p, s]] for s in np.flatnonzero(table.there[p])}
            for row in rows.values():
                write(completions, row)
            if chosen[p] >= 0:
                write(sft, {key: rows[chosen[p]][key] for key in fields})
            if found := pair_of(cfg, list(rows.values())):
                best, worst = found
                paired[p] = True
                write(pairs, preference_row(best, worst) | {"chosen_teacher": best["teacher"],
                                                            "rejected_teacher": worst["teacher"]})
    return paired


def audited(cfg, arbiters, asked, path=None):
    """
    The Arbiter's audit, and the languages of those `asked` for that are routed against its advice; ends if there are any,
    unless forced. `path`: a file that keeps the table while a run is under way, so that nothing is scored twice.
    """
    of = [cfg.languages, *map(fingerprint, cfg.audit)]
    kept = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
    if kept.get("of") == of:
        table = kept["table"]
    else:
        rows = [row for row in read_audit(cfg.audit) if not cfg.languages or row["language"] in cfg.languages]
        table = run_audit(rows, list(arbiters().values()), cfg.batch_tokens) if rows else {}
        if path and rows and common.is_main():
            with atomic_file(path) as f:
                json.dump({"of": of, "table": table}, f, ensure_ascii=False)
    untrusted = [language for language, t in table.items() if language in asked and not t["trusted"]]
    if untrusted and not cfg.force:
        die(f"the Arbiter is no better than chance in {' '.join(untrusted)} (its interval holds 0.5): take another "
            "reward model, more audit rows, leave them out with --languages, or --force")
    if cfg.audit and (unseen := sorted(set(asked) - table.keys())):
        print0(f"no audit rows in {' '.join(unseen)}: nothing says whether the Arbiter can be trusted there")
    return table, untrusted


def check(cfg):
    """Ends with one line if flags make no sense."""
    for name in ("scored", "completions_at_once"):
        if getattr(cfg, name) < 1:
            die(f"--{name} is at least 1, got {getattr(cfg, name)}")
    if cfg.router not in ROUTERS:
        die(f"--router {cfg.router}: known are {', '.join(ROUTERS)}")
    if unknown := [name for name in cfg.guards + cfg.rejected_guards if name not in GUARDS]:
        die(f"a guard {unknown[0]!r}: known are {', '.join(GUARDS)}")
    if cfg.judge and cfg.judge == cfg.reward_model:
        die("--judge is another reward model than --reward_model, or none")
    if (cfg.fixed and cfg.router != "fixed") or (cfg.learned and cfg.router != "learned"):
        die(f"--fixed and --learned are for the routers of these names, not for {cfg.router}")


def given_teachers(cfg, names):
    """--fixed de=a fr=b -> {language: number of the teacher}"""
    given = {}
    for pair in cfg.fixed:
        language, _, name = pair.partition("=")
        if language not in LANGUAGES or name not in names:
            die(f"--fixed {pair}: give language=teacher, one of {', '.join(names)}")
        given[language] = names.index(name)
    if len(cfg.contrast) not in (0, 2) or not set(cfg.contrast) <= set(names):
        die(f"--contrast {' '.join(cfg.contrast)}: give two teachers, the strong one first, of {', '.join(names)}")
    return given


def is_finished(cfg, settings):
    """Has the same command made cfg.out already? Ends if it would be paid for again to be written in another way."""
    path, unfinished = Path(cfg.out) / "run.json", Path(cfg.out).with_name(Path(cfg.out).name + ".unfinished")
    if cfg.resume == "never" or unfinished.exists() or not path.exists():
        return False
    shutil.rmtree(gone(cfg.out), ignore_errors=True)
    before, written = json.loads(path.read_text(encoding="utf-8")), ("margin", "contrast", "guards", "rejected_guards")
    if before["settings"] != settings:
        return False
    hint = f"--completions {cfg.out}/completions.jsonl routes its answers in other ways, --resume never asks for all again"
    if any(before["config"][name] != getattr(cfg, name) for name in written):
        die(f"{cfg.out} holds these answers already, written with other flags: {hint}")
    print0(f"{cfg.out} is finished: {hint}")
    return True


def say(cfg, report):
    """The report in a few lines."""
    print(f"router {cfg.router}: {report['routed']} of {report['prompts']} prompts routed, {report['pairs']} pairs, "
          f"{report['unusable']} of {sum(t['completions'] for t in report['teachers'].values())} completions refused by the "
          f"guards -> {cfg.out}")
    if "routers" in report:
        print(f"routers compared on {report['compared']['prompts']} other prompts; win rate against "
              f"{report['compared']['baseline']} by {report['compared']['judged_by']}")
    for name, r in report.get("routers", {}).items():
        reward = "      -" if r["reward"] is None else f"{r['reward']:7.3f}"
        print(f"{name:<28} reward {reward} | win rate {100 * r['win_rate'][0]:5.1f} % | {r['completions']} completions"
              + ("" if r["tokens"] is None else f", {r['tokens']} tokens"))
    for name, t in report["teachers"].items():
        if t.get("stopped"):
            print(f"{name} was given up ({t['stopped']}): the same command asks only for what is missing")


def main(cfg):
    with contextlib.ExitStack() as at_end:
        arbitrate(cfg, at_end)


def arbitrate(cfg, at_end):
    begin, device, stopped, work = time.time(), common.init_distributed(), {}, None
    check(cfg)

    def arbiters():
        """The reward models; nobody keeps them while teachers answer."""
        paths = {"reward": cfg.reward_model} | ({"judge_reward": cfg.judge} if cfg.judge else {})
        return {name: (load_reward_model(path, device=device), Chat(path)) for name, path in paths.items()}

    if cfg.completions:
        files, pool, duplicates = [RowsOnDisk(path) for path in cfg.completions], [], 0
        table, counts = make_table(files, cfg.guards)
        picks = Picks(table.teachers, given_teachers(cfg, table.teachers), cfg.seed, cfg.learned)
        sample = sample_of(table.languages, cfg.scored)
        audit, untrusted = audited(cfg, arbiters, set(table.languages.tolist()))
    else:
        # 1) what is asked, and whom; an unfinished run of the same goes on
        pool = read_pool(cfg)
        names = [teacher.name for teacher in pool]
        picks = Picks(names, given_teachers(cfg, names), cfg.seed, cfg.learned)
        prompts, numbers, duplicates = read_prompts(cfg.prompts, cfg.languages)
        settings = {"prompts": fingerprint(cfg.prompts), "languages": cfg.languages, "seed": cfg.seed, "router": cfg.router,
                    "reward model": fingerprint(cfg.reward_model), "judge": cfg.judge and fingerprint(cfg.judge),
                    "pool": {teacher.name: identity(teacher) for teacher in pool}}
        if cfg.router != "reward":  # what picks depend on
            settings |= {"scored": cfg.scored, "fixed": cfg.fixed, "guards": cfg.guards,
                         "learned": cfg.learned and fingerprint(cfg.learned)}
        if is_finished(cfg, settings):
            return
        for path in filter(None, (cfg.reward_model, cfg.judge)):
            reward_model_of(path)  # ends before anything is paid for if it is none
        work = at_end.enter_context(Work(cfg, settings))

        # 2) can the Arbiter be trusted? before anything is paid for
        ids, languages = zip(*((row["id"], row["language"]) for row in map(prompts.__getitem__, numbers)))
        audit, untrusted = audited(cfg, arbiters, set(languages), work.folder / "audit.json")

        # 3) answers and rewards
        files, stopped, sample = ask(cfg, pool, picks, prompts, numbers, ids, languages, arbiters, work, device)
        table, counts = make_table(files, cfg.guards, names, ids, languages)

    # 4) routing
    def prompt_of(p):
        if not cfg.completions:  # where nobody has answered it as well
            return prompts[numbers[p]]["prompt"]
        s = int(table.there[p].argmax())
        return files[table.file[p, s]][table.row[p, s]]["prompt"]

    counted = refused(counts)
    if not table.may.any():
        die("there is nothing to route, the guards refuse every completion: " + "; ".join(
            f"{name} " + ", ".join(f"{guard} {n}" for guard, n in sorted(of["all"].items()) if guard not in ("n", "dropped"))
            for name, of in counted.items()) + " (truncated: raise --max_new_tokens; --guards names what is refused)")
    known = cfg.learned or (cfg.router == "fixed" and set(table.languages.tolist()) <= picks.given.keys())
    if cfg.completions and cfg.router in ("fixed", "single", "learned") and not known:
        done = completed(table)
        picks.fit(table, next(rows for rows in (sample & done, done, sample | True) if rows.any()), prompt_of)
    chosen = chosen_slots(cfg, table, picks, prompt_of)

    # 5) files and report
    with common.atomic_dir(cfg.out) as folder:
        if common.is_main():
            paired = write_data(cfg, folder, table, files, chosen)
            report = summary(cfg, table, counts, picks, sample, chosen, paired, prompt_of) | {
                "duplicates": duplicates, "audit": audit or None, "forced": untrusted, "seed": cfg.seed,
                "seconds": round(time.time() - begin, 1), "commit": common.git_commit(), "hardware": common.hardware()}
            for teacher in pool:
                report["teachers"][teacher.name] |= {"model": teacher.model, "stopped": stopped.get(teacher.name, "")}
            with atomic_file(folder / "report.json") as f:
                json.dump(report, f, ensure_ascii=False, indent=1)
            if cfg.router == "learned":
                picks.learned.save(folder / "router.safetensors")
            shown = samples_of(table, files, chosen, lambda rows: pair_of(cfg, rows))
            with atomic_file(folder / "report.html", "wb") as f:
                f.write(page(report, shown).encode("utf-8", "replace"))
            if work:
                with atomic_file(folder / "run.json") as f:
                    json.dump({"settings": settings, "config": dataclasses.asdict(cfg)}, f, ensure_ascii=False, indent=1)
    if work and not stopped:
        work.end()
    if common.is_main():
        say(cfg, report)


if __name__ == "__main__":
    main(parse_config(Config))
