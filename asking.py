"""
Many asks of one endpoint: at once, again after a failure, and no answer twice.

Threads send the requests of endpoint.py, each over a connection of its own. What may succeed later is tried again after
a wait with full jitter; an ask that still has no answer fails alone, with its reason. Every answer is on the disk, in a
journal beside the output, before its thread asks again: a run that was stopped, in whatever way, asks for nothing again
that it has. What is asked does not depend on the number of threads: an ask holds its seed.

    found = answers(Endpoint("http://localhost:8000/v1#judge"), [Ask("q1", messages, max_tokens=16)], "out/x.journal")
"""

import contextlib
import hashlib
import json
import math
import os
import queue
import random
import sys
import threading
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import common
from common import die, writing
from data import append_rows, read_finished, read_rows, write_rows
from endpoint import LONGEST_WAIT, Answer, Ask, Connection, Endpoint, Failure

FIRST_WAIT = 1.0  # seconds, at most, before the second try; then twice as long each time
GIVE_UP = 50  # asks that failed in a row: the server is not going to recover


class Gone(SystemExit):
    """The server answers nothing (more): one line as die() writes it, for who has other servers to go on with."""


jitter = random.Random()  # from the system's randomness: no seeded draw moves when a server is slow


def digest(endpoint, ask):
    """Hex name of all that an answer depends on: a journal of another model or of other settings answers nothing."""
    content = json.dumps([endpoint.url, endpoint.model, asdict(ask)], sort_keys=True)
    return hashlib.sha256(content.encode("ascii")).hexdigest()


class Journal:
    """A file of answers by digest, one JSON line each. Failures are noted for a reader, and asked for again."""

    def __init__(self, path):
        self.path, self.lock = Path(path), threading.Lock()
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_finished(self.path)
        append_rows(self.path, [], len(rows))  # the line that a kill cut off goes
        self.kept = {r["digest"]: Answer(**r["answer"]) for r in rows if r["answer"]["text"] is not None}
        with writing(self.path):
            common.fsync(self.path.parent)
            self.file = open(self.path, "ab")

    def add(self, name, ask, answer):
        """On the disk when it returns. Any thread."""
        line = json.dumps({"digest": name, "key": ask.key, "answer": asdict(answer)}, ensure_ascii=False) + "\n"
        with self.lock, writing(self.path):
            if not self.file.closed:  # nobody waits for this answer any more
                self.file.write(line.encode("utf-8"))
                self.file.flush()
                os.fsync(self.file.fileno())

    def close(self):
        with self.lock, contextlib.suppress(OSError):  # of a line that did not fit on the disk, which has been said
            self.file.close()


def pause(stop, seconds):
    """Waits, unless the event `stop` comes first. The tests put a clock of their own here."""
    stop.wait(seconds)


def persist(connection, ask, retries, stop, events, alive):
    """Tries until there is an Answer -> it, or the last try's Failure. alive(): has the server answered anything?"""
    for n in range(retries + 1):
        try:
            return connection.answer(ask)
        except Failure as failure:
            connection.close()
            if n == retries or not failure.again or stop.is_set() or (failure.everyone and not alive()):
                return failure
            events.put((None, failure))
            # full jitter (Brooker 2015): threads that failed at once do not come back at once
            wait = jitter.uniform(0, min(LONGEST_WAIT, FIRST_WAIT * 2**n))
            pause(stop, wait if failure.wait is None else failure.wait + jitter.uniform(0, FIRST_WAIT))


def answers(endpoint, asks, journal, threads=16, timeout=600.0, retries=6):
    """
    [Ask] -> [Answer], in order; one that still failed after so many `retries` has no text but a failure. `journal`:
    path of a file; what it holds is not asked again. `timeout`: seconds for a response. Raises Gone if nothing succeeds
    at all, or nothing does any more; ends with one line after Ctrl-C. What was answered stays in the journal.
    """
    if threads < 1 or timeout <= 0 or retries < 0:
        die(f"an endpoint needs threads >= 1, timeout > 0 and retries >= 0; got {threads}, {timeout} and {retries}")
    journal = Journal(journal)
    names = [digest(endpoint, ask) for ask in asks]
    found = {name: journal.kept[name] for name in names if name in journal.kept}
    waiting = {name: ask for name, ask in zip(names, asks) if name not in found}
    todo, events = queue.SimpleQueue(), queue.SimpleQueue()  # events: (digest or None: will be tried again, what came)
    for item in waiting.items():
        todo.put(item)
    stop, succeeded, in_a_row, told = threading.Event(), 0, 0, 0

    def work():
        connection, name = Connection(endpoint, timeout), ""
        try:
            while not stop.is_set():
                name, ask = todo.get_nowait()
                result = persist(connection, ask, retries, stop, events, lambda: succeeded)
                journal.add(name, ask, Answer(failure=str(result)) if isinstance(result, Failure) else result)
                events.put((name, result))
        except queue.Empty:
            pass  # nothing is left to ask
        except BaseException as e:  # a full disk, a bug: the main thread raises it
            events.put((name, e))
        finally:
            connection.close()

    kept = lambda: sum(answer.text is not None for answer in found.values())
    try:
        for _ in range(min(threads, len(waiting))):  # daemons: Ctrl-C does not wait for what a server says
            threading.Thread(target=work, daemon=True).start()
        for _ in common.progress(range(len(waiting)), endpoint.model):
            name, result = events.get()
            while name is None:
                told += 1
                if told <= 3:
                    print(f"{endpoint.url}: {result}; trying again", file=sys.stderr)
                name, result = events.get()
            if isinstance(result, Answer):
                found[name], succeeded, in_a_row = result, succeeded + 1, 0
            elif isinstance(result, Failure):
                found[name] = Answer(failure=str(result))
                # once something has succeeded, now or before, a refusal of one prompt says nothing about the others
                in_a_row += result.everyone or result.again or not (succeeded or journal.kept)
                gone = result.everyone and (not succeeded or (result.again and len(found) == len(set(names))))
                if in_a_row >= GIVE_UP or gone:  # gone: no server for the last ask, so there was none for others
                    raise Gone(f"error: {endpoint.url}: {result}" + f" (and {in_a_row - 1} before it failed)" * (in_a_row > 1)
                               + (f"; {kept()} answers are kept in {journal.path}" if kept() else ""))
            else:
                raise result
    except KeyboardInterrupt:
        die(f"stopped; {kept()} of {len(set(names))} answers are kept in {journal.path}: the same command asks only "
            "for the others")
    finally:
        stop.set()
        journal.close()
        if not journal.kept and not succeeded:
            journal.path.unlink(missing_ok=True)
    return [found[name] for name in names]


# ---------------------------------------------------------------------------------------------------------------------
# completions

def journal_of(out):
    """Where the answers for a file or folder `out` wait until it is whole."""
    return Path(out).with_name(Path(out).name + ".journal")


def draw_seed(*parts):
    """A number for the server's draws, 0 to 2^31 - 1, that depends on the parts alone, on any machine and any day."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode("ascii")).digest()[:4], "big") >> 1


def check_sampling(temperature, top_p, min_p, samples, max_new_tokens, batch_size=1):
    """Ends with one line if a setting makes no sense."""
    if not (0 <= temperature < math.inf and 0 < top_p <= 1 and 0 <= min_p < 1
            and min(samples, max_new_tokens, batch_size) >= 1):  # not a number is refused as well
        die("sampling needs temperature >= 0, 0 < top_p <= 1, 0 <= min_p < 1, samples >= 1, max_new_tokens >= 1 and "
            f"batch_size >= 1; got {temperature}, {top_p}, {min_p}, {samples}, {max_new_tokens} and {batch_size}")


def try_to_complete(url, rows, journal, max_new_tokens, temperature=0.0, top_p=1.0, samples=1, seed=0, min_p=0.0, stop=(),
                    **sending):
    """
    Rows with id, language, prompt -> the completion rows that generate.complete() makes of them (teacher: the model's
    name; tokens: as the server counts them, or None). An ask without an answer is a row with an empty completion that has
    not `ended`, and a `failure`. `sending`: threads, timeout, retries of answers(), which also says what is raised.
    """
    check_sampling(temperature, top_p, min_p, samples, max_new_tokens)
    endpoint, asks, seen = Endpoint(url), [], Counter()
    for row in rows:
        # a prompt is named by its id, and by its place among rows with that id: without a row the others are the same
        place, prompt = f"{row['id']}/{seen[row['id']]}", row["prompt"]
        seen[row["id"]] += 1
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [
            {"role": m["role"], "content": m["content"]} for m in prompt]
        asks += [Ask(f"{place}/{k}", messages, max_new_tokens, temperature, top_p, draw_seed(seed, place, k),
                     min_p, tuple(stop))
                 for k in range(samples)]
    found = answers(endpoint, asks, journal, **sending)
    return [{"id": row["id"], "language": row["language"], "prompt": row["prompt"], "completion": answer.text or "",
             "teacher": endpoint.model, "sample": k, "ended": answer.ended, "tokens": answer.completion_tokens}
            | ({} if answer.text is not None else {"failure": answer.failure})
            for (row, k), answer in zip(((row, k) for row in rows for k in range(samples)), found)]


def complete(url, rows, journal, *settings, **more):
    """try_to_complete(); if some asks have no answer: how many, why, and exit status 1."""
    found = try_to_complete(url, rows, journal, *settings, **more)
    if reasons := Counter(row["failure"] for row in found if "failure" in row):
        shown = "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common(3))
        die(f"{reasons.total()} of {len(found)} asks of {url} failed: {shown}{'; ...' * (len(reasons) > 3)}. {journal} "
            "keeps the other answers (and all reasons): the same command asks only for these again")
    return found


def complete_file(cfg):
    """What generate.py does for an endpoint; `cfg` is its Config."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        die(f"{cfg.model} is asked by one process, which sends many requests at once: start it without torchrun")
    if cfg.prompts is None:
        die(f"{cfg.model} is an endpoint, and the chat in the terminal takes a folder; give --prompts FILE")
    rows = [r for r in read_rows(cfg.prompts, "prompts") if not cfg.languages or r["language"] in cfg.languages]
    if not rows:
        die(f"{cfg.prompts} holds no prompt in {' '.join(cfg.languages)}")
    journal = journal_of(cfg.out)
    done = complete(cfg.model, rows, journal, cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.samples, cfg.seed,
                    cfg.min_p, cfg.stop, threads=cfg.threads, timeout=cfg.timeout, retries=cfg.retries)
    write_rows(cfg.out, done)
    journal.unlink(missing_ok=True)  # not before the output is whole, and on the disk
    cut_off, empty = sum(not row["ended"] for row in done), sum(not row["completion"].strip() for row in done)
    print(f"{len(done)} completions of {len(rows)} prompts -> {cfg.out}"
          + f" ({cut_off} cut off at {cfg.max_new_tokens} tokens)" * (cut_off > 0) + f" ({empty} empty)" * (empty > 0))
