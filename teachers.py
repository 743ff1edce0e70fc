"""
The pool: who the teachers are, and how each of them answers its prompts, once, whatever happens.

A teacher is a folder or hub name (any family that model.py knows), an endpoint, or a file of completions that were made
elsewhere. `--teachers A B ...` gives them all the script's sampling settings; `--pool FILE` is one JSON object a line:

    {"model": "CohereLabs/aya-expanse-8b", "languages": ["de", "nl"], "samples": 4, "temperature": 0.8, "top_p": 0.95}
    {"name": "qwen", "model": "http://localhost:8000/v1#qwen", "system": "Answer in {language}.", "max_new_tokens": 512}
    {"name": "base", "model": "out/base", "template": "my_chat_template.jinja", "stop": ["\\n\\n"]}
    {"name": "translated", "model": "out/small", "translator": "http://localhost:8000/v1#nmt"}
    {"name": "nllb", "model": "translations.jsonl"}

A teacher with a `translator` answers in English, and the translator puts the answer into the prompt's language: what
"RLHF Can Speak Many Languages" (arXiv 2407.02552) rejects, and the baseline of Multilingual Arbitrage. The English prompt
is the row's "english", or the translator's translation of the prompt. The translator is any chat model.

Every completion is appended to a file as soon as its part is done; one model is in memory at a time.
"""

import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import common
from asking import Gone, check_sampling, try_to_complete
from chat import Chat
from checkpoint import find
from common import die, print0
from endpoint import Endpoint, is_endpoint
from generate import share
from languages import LANGUAGES
from model import load
from rows import RowsOnDisk, RowWriter, check_row, read_jsonl
from run import files_fingerprint

TRANSLATE = ("Translate the following text into {language}. Keep its format; write the translation and nothing else."
             "\n\n{text}")


@dataclass(frozen=True)
class Teacher:
    name: str
    model: str  # folder, hub name, URL#name, or FILE.jsonl of completion rows
    languages: tuple = ()  # prompts that it answers; (): all
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 256
    stop: tuple = ()  # strings
    system: str = ""  # system turn; {language} becomes the language's English name
    template: str = ""  # file of a chat template to use instead of the folder's
    translator: str = ""  # folder, hub name or URL#name

    @property
    def from_file(self):
        return self.model.endswith(".jsonl") and not is_endpoint(self.model)

    def speaks(self, language):
        return (not self.languages or language in self.languages) and not (self.translator and language == "en")


def name_of(model):
    """What a model is called if nobody says: the served name, or the last part of the folder's name."""
    return model.partition("#")[2] if is_endpoint(model) else Path(model).name.removesuffix(".jsonl")


def read_pool(cfg):
    """`cfg`: teachers (models), pool (a file or ""), samples, temperature, top_p, min_p, max_new_tokens -> [Teacher]."""
    common_settings = {f: getattr(cfg, f) for f in ("samples", "temperature", "top_p", "min_p", "max_new_tokens")}
    found = [(Teacher(name_of(model), model, **common_settings), "--teachers") for model in ([] if cfg.pool else cfg.teachers)]
    fields = {f.name: f for f in dataclasses.fields(Teacher)}
    for row, where in read_jsonl(cfg.pool) if cfg.pool else ():
        if not isinstance(row, dict) or not isinstance(row.get("model"), str) or not row["model"]:
            die(f'{where}: a teacher is an object with a "model": folder, hub name, URL#name or FILE.jsonl')
        if unknown := [key for key in row if key not in fields]:
            die(f"{where}: a teacher has no {unknown[0]!r}; it has {', '.join(fields)}")
        for key, value in row.items():
            kind, lists = type(fields[key].default), (list, tuple)
            good = isinstance(value, lists) and all(isinstance(v, str) for v in value) if kind is tuple else (
                isinstance(value, (int, float) if kind is float else kind if kind in (int, str) else str)
                and not isinstance(value, bool))
            if not good or (kind is not tuple and value == "" and key in ("name", "model")):
                die(f"{where}: {key!r} cannot be {value!r}")
        if unknown := [code for code in row.get("languages", ()) if code not in LANGUAGES]:
            die(f"{where}: unknown language {unknown[0]!r}; known: {' '.join(LANGUAGES)}")
        row = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        found.append((Teacher(**{"name": name_of(row["model"])} | common_settings | row), where))
    if not found:
        die(f"{cfg.pool or '--teachers'} names no teacher")
    for n, (teacher, where) in enumerate(found):
        if twin := next((t for t, _ in found[:n] if t.name == teacher.name), None):
            die(f"{where}: two teachers are called {teacher.name!r} ({twin.model} and {teacher.model}): give them names of "
                "their own in a file for --pool")
        check_sampling(teacher.temperature, teacher.top_p, teacher.min_p, teacher.samples, teacher.max_new_tokens)
        if teacher.template and (not Path(teacher.template).is_file() or is_endpoint(teacher.model) or teacher.from_file):
            die(f"{where}: the template {teacher.template} of {teacher.name} is no file, or {teacher.model} is no checkpoint")
        if teacher.from_file and (teacher.translator or teacher.system):
            die(f"{where}: {teacher.name} is a file of completions: it has neither a system turn nor a translator")
    return [teacher for teacher, _ in found]


def fingerprint(name):
    """What a model or a file is: a digest of its bytes, or an endpoint's name. Ends with one line if there is none."""
    if is_endpoint(name):
        return Endpoint(name).url + "#" + Endpoint(name).model
    if Path(name).suffix in (".jsonl", ".safetensors"):
        if not Path(name).is_file():
            die(f"{name} not found")
        with open(name, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    return files_fingerprint(find(name))


def identity(teacher):
    """All that its completions depend on, but for prompts and seed: a dict that JSON can hold."""
    files = {key: fingerprint(getattr(teacher, key)) for key in ("model", "translator") if getattr(teacher, key)}
    template = hashlib.sha256(Path(teacher.template).read_bytes()).hexdigest() if teacher.template else ""
    return json.loads(json.dumps(dataclasses.asdict(teacher))) | {"files": files, "template": template}


# ---------------------------------------------------------------------------------------------------------------------
# one model answers many prompts

def conversation(teacher, row):
    """The prompt as the teacher is asked: with its system turn in front."""
    prompt = [{"role": "user", "content": row["prompt"]}] if isinstance(row["prompt"], str) else row["prompt"]
    if not teacher.system:
        return row["prompt"]
    system = teacher.system.replace("{language}", LANGUAGES[row["language"]][0])
    return [{"role": "system", "content": system}, *(m for m in prompt if m["role"] != "system")]


class GivenUp(Exception):
    """This model answers no more; its message says why."""


def everywhere(work):
    """work() on every rank -> what it returned here; if it ended or ran out of memory on any of them, all raise GivenUp."""
    result, why = None, ""
    try:
        result = work()
    except SystemExit as e:  # a damaged file, a template that refuses, logits that are no numbers
        why = str(e).removeprefix("error: ")
    except torch.OutOfMemoryError as e:
        why = "out of memory: " + str(e).splitlines()[0]
    if reasons := [reason for reason in common.gather_list([why]) if reason]:
        raise GivenUp(reasons[0])
    return result


def local(teacher, cfg, device):
    """A checkpoint -> a function that answers rows: on all ranks together."""
    model, chat = everywhere(lambda: (load(teacher.model, device=device), Chat(teacher.model, teacher.template or None)))

    def answer(rows):
        done = everywhere(lambda: share(
            model, chat, rows, teacher.max_new_tokens, teacher.temperature, teacher.top_p, teacher.samples, cfg.seed,
            cfg.batch_size, teacher.name, teacher.min_p, teacher.stop))
        return [row for _, _, row in sorted(common.gather_list(done), key=lambda part: part[:2])]
    return answer


def remote(teacher, cfg, journal):
    """An endpoint -> a function that answers rows. Rank 0 asks, the others wait: the work is the server's."""
    def ask(rows):
        try:
            return try_to_complete(teacher.model, rows, journal, teacher.max_new_tokens, teacher.temperature, teacher.top_p,
                                   teacher.samples, cfg.seed, teacher.min_p, teacher.stop, threads=cfg.threads,
                                   timeout=cfg.timeout, retries=cfg.retries)
        except Gone as e:
            return str(e).removeprefix("error: ")

    def answer(rows):
        done = common.on_main(lambda: ask(rows))
        if isinstance(done, str):
            raise GivenUp(done)
        return [row | {"teacher": teacher.name} for row in done]
    return answer


def stored(teacher):
    """A file of completion rows -> a function that looks up what it says to rows."""
    file, at = RowsOnDisk(teacher.model), {}
    for n, (row, where) in enumerate(file.scan()):
        check_row(row, "completions", where)
        at.setdefault(row["id"], []).append(n)

    def answer(rows):
        done = []
        for row in rows:
            for k in range(teacher.samples):
                new = {"id": row["id"], "language": row["language"], "prompt": row["prompt"]}
                if k < len(at.get(row["id"], ())):
                    old = file[at[row["id"]][k]]
                    new |= {"completion": old["completion"], "teacher": teacher.name, "sample": k,
                            "ended": old.get("ended", True), "tokens": old.get("tokens")}
                else:
                    new |= {"completion": "", "teacher": teacher.name, "sample": k, "ended": False, "tokens": 0,
                            "failure": f"{teacher.model} has no such completion"}
                done.append(new)
        return done
    return answer


def fill(path, teacher, count, row_of, cfg, device):
    """
    The model of `teacher` answers row_of(0) ... row_of(count - 1); what it says is appended to `path`, part by part, under
    the rows' own prompts. What is there already is not asked again. Raises GivenUp.
    """
    writer, journal = RowWriter(path, teacher.samples), path.with_suffix(".journal")
    todo = range(writer.rows // teacher.samples, count)
    if not todo:  # the model is not even loaded
        return
    begin, size = time.time(), max(1, cfg.completions_at_once // teacher.samples)
    answer = stored(teacher) if teacher.from_file else remote(teacher, cfg, journal) if is_endpoint(teacher.model) else (
        local(teacher, cfg, device))
    for at in range(todo.start, count, size):
        rows = [row_of(n) for n in range(at, min(at + size, count))]
        made = answer([row | {"prompt": conversation(teacher, row)} for row in rows])
        writer.add([new | {"prompt": rows[n // teacher.samples]["prompt"]} for n, new in enumerate(made)])
        if common.is_main():
            journal.unlink(missing_ok=True)  # not before its answers are in the file
    print0(f"{teacher.name}: {len(todo) * teacher.samples} completions in {time.time() - begin:.1f} s")


def answer_all(teacher, prompts, numbers, path, cfg, device):
    """
    `teacher` answers the prompts with these numbers (rows of `prompts`, a RowsOnDisk) -> why it was given up, or "". `path`
    gets teacher.samples rows a prompt, in order; a prompt without an answer has empty ones with a "failure". What `path`
    holds already is not asked again.
    """
    try:
        if teacher.translator:
            translated(teacher, prompts, numbers, path, cfg, device)
        else:
            fill(path, teacher, len(numbers), lambda n: prompts[numbers[n]], cfg, device)
    except GivenUp as e:
        print0(f"{teacher.name} is given up, the others go on: {e}")
        return str(e)
    return ""


def translated(teacher, prompts, numbers, path, cfg, device):
    """
    English prompts, English answers, translations: three files, each as resumable as any. Where a step gives nothing the
    next is asked about a dash, and the row ends as a "failure".
    """
    K, writer = teacher.samples, RowWriter(path, teacher.samples)
    if writer.rows == len(numbers) * K:
        return
    translator = dataclasses.replace(teacher, model=teacher.translator, samples=1, temperature=0.0, top_p=1.0, min_p=0.0,
                                     stop=(), template="", system="")

    def step(name, model, count, row_of):
        file = path.with_suffix(f".{name}.jsonl")
        fill(file, model, count, row_of, cfg, device)
        return RowsOnDisk(file).scanned()

    # 1) the prompts in English, where the rows do not hold them
    lacking = [n for n in numbers if not prompts[n].get("english")]
    asked, found = {}, []  # number of a prompt -> of its translation in `found`
    if lacking:
        def to_english(n):
            row = prompts[lacking[n]]
            text = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
            return row | {"prompt": TRANSLATE.format(language="English", text=text)}
        found = step("english", translator, len(lacking), to_english)
        asked = dict(zip(lacking, range(len(lacking))))

    # 2) the answers to them
    def in_english(n):
        row = prompts[numbers[n]]
        prompt = row.get("english") or found[asked[numbers[n]]]["completion"].strip() or "-"
        return row | {"language": "en", "prompt": prompt}
    answers = step("answers", dataclasses.replace(teacher, translator=""), len(numbers), in_english)

    # 3) the answers in the prompt's language
    def to_language(n):
        row = prompts[numbers[n // K]]
        return {"id": f"{row['id']}/{n % K}", "language": row["language"], "prompt": TRANSLATE.format(
            language=LANGUAGES[row["language"]][0], text=answers[n]["completion"].strip() or "-")}
    texts = step("translations", translator, len(numbers) * K, to_language)

    # 4) one row a completion, as every teacher writes them
    for begin in range(writer.rows, len(texts), 1024 * K):
        made = []
        for n in range(begin, min(begin + 1024 * K, len(texts))):
            number = numbers[n // K]
            row, parts = prompts[number], [answers[n], texts[n]] + ([found[asked[number]]] if number in asked else [])
            tokens = [part["tokens"] for part in parts]
            lost = next((part["failure"] for part in parts if "failure" in part), "")
            lost = lost or ("" if all(part["completion"].strip() for part in parts) else "a step said nothing")
            made.append({"id": row["id"], "language": row["language"], "prompt": row["prompt"],
                         "completion": "" if lost else texts[n]["completion"], "teacher": teacher.name, "sample": n % K,
                         "ended": not lost and all(part["ended"] for part in parts),
                         "tokens": None if None in tokens else sum(tokens), "english": answers[n]["completion"]}
                        | ({"failure": lost} if lost else {}))
        writer.add(made)
