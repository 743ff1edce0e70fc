"""
Benchmarks' files, as they are published: where they lie, and their rows.

--data DIR holds a folder per benchmark, each as a clone or download of the published repository, whatever its age: rows may be
.jsonl, .tsv, .csv, .txt (a line is a row) or .parquet (with `pip install pyarrow`). --data hub fetches what is needed from the
Hugging Face hub. A language or a column that is not there is named.
"""

import csv
import json
from pathlib import Path

from common import die, print0
from languages import LANGUAGES
from rows import read_jsonl


def read_table(path, columns=None):
    """
    A file -> [{column: value}], of .tsv and .csv all values strings. `columns`: their names if the file has no header; of a
    .txt file, the one column's ("text"). Ends with one line that names file and line, if it cannot be read.
    """
    path = Path(path)
    if path.suffix in (".jsonl", ".json"):
        return [row for row, _ in read_jsonl(path)] if path.suffix == ".jsonl" else json.loads(path.read_text(encoding="utf-8"))
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            die(f"{path} is a parquet file: pip install pyarrow, or convert it to .jsonl")
        return pyarrow.parquet.read_table(path).to_pylist()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        die(f"{path} is not UTF-8 (byte {e.start}): convert it, e.g. with iconv -t utf-8")
    if path.suffix not in (".tsv", ".csv"):
        name, lines = (columns or ["text"])[0], text.split("\n")
        return [{name: line} for line in (lines[:-1] if lines[-1] == "" else lines)]
    quoting = csv.QUOTE_NONE if path.suffix == ".tsv" and columns else csv.QUOTE_MINIMAL
    reader = csv.reader(text.splitlines(keepends=True), delimiter="\t" if path.suffix == ".tsv" else ",", quoting=quoting)
    rows = list(reader)
    head, rows = (columns, rows) if columns else (rows[0] if rows else [], rows[1:])
    for number, row in enumerate(rows, 1 if columns else 2):
        if len(row) != len(head):
            die(f"{path}:{number} has {len(row)} columns, expected {len(head)}: {', '.join(head)}")
    return [dict(zip(head, row)) for row in rows]


def folder_of(data, repository):
    """
    The folder of a published repository, "CohereLabs/m-ArenaHard": DIR/m-ArenaHard, DIR/CohereLabs/m-ArenaHard, any of them
    with other capitals, or DIR itself if it has that name; --data hub: fetched. Ends with one line if there is none.
    """
    name = repository.split("/")[-1]
    if data == "hub":
        import huggingface_hub
        try:
            return Path(huggingface_hub.snapshot_download(repository, repo_type="dataset"))
        except Exception as e:  # many kinds: offline, no such set, a licence to accept
            reason = (str(e).strip() or type(e).__name__).splitlines()[0]
            die(f"{repository} could not be fetched from the hub ({reason}): download it elsewhere, and give its folder's parent "
                "as --data")
    root = Path(data)
    if not root.is_dir():
        die(f"--data {data} is no folder")
    places = [root, *sorted(p for p in root.iterdir() if p.is_dir()), *sorted(p for p in root.glob("*/*") if p.is_dir())]
    same = lambda a, b: a.casefold().replace("_", "-") == b.casefold().replace("_", "-")
    found = next((p for p in places if same(p.name, name)), None)
    if found is None:
        die(f"{data} has no folder {name}: put the files of {repository} there")
    return found


def find_file(folder, *patterns):
    """The first file below a folder that matches one of the patterns ("**/test.{l}.jsonl" filled in), or None."""
    for pattern in patterns:
        if found := sorted(p for p in Path(folder).glob(pattern) if p.is_file()):
            return found[0]
    return None


def need(rows, columns, path):
    """The rows; ends with one line if one lacks a column (a tuple of names: any of them will do)."""
    for number, row in enumerate(rows, 1):
        for column in columns:
            names = column if isinstance(column, tuple) else (column,)
            if not any(row.get(name) is not None for name in names):
                die(f"{path}: row {number} has no {' or '.join(names)}; it has {', '.join(map(str, row))}")
    return rows


def wanted(languages, known, task):
    """Of the languages asked for (all of `known` if none were), those that the task has; says which it has not."""
    if unknown := [language for language in languages if language not in LANGUAGES]:
        die(f"unknown language {unknown[0]!r}; known: {' '.join(LANGUAGES)}")
    if lacking := [language for language in languages if language not in known]:
        print0(f"{task}: not in {' '.join(lacking)}; it has {' '.join(known)}")
    return [language for language in known if not languages or language in languages]


def limited(items, limit):
    """At most `limit` items of every language (0: all), and how many that leaves out is printed by who asks."""
    seen, kept = {}, []
    for item in items:
        seen[item["language"]] = seen.get(item["language"], 0) + 1
        if not limit or seen[item["language"]] <= limit:
            kept.append(item)
    return kept
