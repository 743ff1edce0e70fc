"""
Files of rows: one JSON object a line, UTF-8. Everything that can be wrong with a line is said with its file and number.

The kinds of rows are in README.md's table. write_rows writes a file as a whole; append_rows and RowWriter grow one in parts
that survive a kill; RowsOnDisk reads rows by number, for files that are larger than the memory.
"""

import json
import os
from array import array

import common
from common import atomic_file, die, writing
from languages import LANGUAGES

ROLES = ("system", "user", "assistant")
FIELDS = {"prompts": ("id", "language", "prompt"), "sft": ("language", "prompt", "completion"),
          "preferences": ("language", "prompt", "chosen", "rejected"),
          "completions": ("id", "language", "prompt", "completion")}


def check_row(row, kind, where):
    """Refuses a row with a missing, empty or ill-typed field or an unknown language; `where` is file:line."""
    if not isinstance(row, dict):
        die(f"{where}: a row is one JSON object, got {type(row).__name__}")
    if row.get("language") not in tuple(LANGUAGES):  # a tuple: what cannot be hashed is refused as well
        die(f"{where}: unknown language {row.get('language')!r}; known: {' '.join(LANGUAGES)}")
    fields = FIELDS[kind]
    if kind == "sft" and "messages" in row:
        fields = ("language", "messages")
    elif kind == "sft" and "text" in row:
        fields = ("language", "text")
    for name in fields:
        value = row.get(name)
        if value is None:
            die(f"{where}: the row has no {name!r}; {kind} rows have {', '.join(fields)}")
        if name == "messages" or (name == "prompt" and isinstance(value, list)):
            good = isinstance(value, list) and value and all(
                isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str)
                and (m["content"].strip() or m["role"] == "system") for m in value)
            if not good or (name == "messages" and value[-1]["role"] != "assistant"):
                die(f"{where}: {name!r} must be a list of messages with a role (system, user, assistant) and a content "
                    "that is not empty" + (", the last one the assistant's" if name == "messages" else ""))
        elif not isinstance(value, str):
            die(f"{where}: {name!r} must be a string, got {type(value).__name__}")
        elif not value.strip() and not (kind == "completions" and name == "completion"):  # a model may say nothing
            die(f"{where}: {name!r} is empty; remove the row")
    if kind == "preferences" and row["chosen"].strip() == row["rejected"].strip():
        die(f"{where}: chosen and rejected are the same text; remove the row")


def read_jsonl(path, places=None):
    """
    Yields (row, "file:line") for every line of a UTF-8 JSONL file; blank lines are errors, as any other non-JSON. Each
    line's place in the file, in bytes, is appended to `places`.
    """
    try:
        with open(path, "rb") as f:
            at = 0
            for number, line in enumerate(f, 1):
                if places is not None:
                    places.append(at)
                    at += len(line)
                try:
                    row = json.loads(line.decode("utf-8"))
                    if b"\\ud" in line.lower():
                        json.dumps(row, ensure_ascii=False).encode("utf-8")
                except json.JSONDecodeError as e:
                    die(f"{path}:{number} is not JSON ({e.msg}); each line must be one JSON object")
                except UnicodeDecodeError as e:
                    die(f"{path}:{number} is not UTF-8 (byte {e.start} of the line): "
                        "convert it, e.g. with iconv -t utf-8")
                except UnicodeEncodeError:
                    die(f"{path}:{number} holds half of a character (a \\ud... escape without its other half); "
                        "mend the row")
                yield row, f"{path}:{number}"
    except FileNotFoundError:
        die(f"{path} not found")
    except OSError as e:
        die(f"{path} cannot be read: {e.strerror}")


def read_checked(path, kind):
    """Yields (row, "file:line"), each row checked. kind: prompts, sft, preferences or completions."""
    where = ""
    for row, where in read_jsonl(path):
        check_row(row, kind, where)
        yield row, where
    if not where:
        die(f"{path} holds no rows")


def read_rows(path, kind):
    """All rows of a file, each checked."""
    return [row for row, _ in read_checked(path, kind)]


def write_rows(path, rows):
    """One JSON object a line, UTF-8, written beside and renamed. Returns how many rows."""
    with atomic_file(path) as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    return len(rows)


def read_finished(path):
    """Rows of a file that append_rows was writing when it was killed: up to the first line that is not whole."""
    rows = []
    try:
        with open(path, encoding="utf-8", newline="\n", errors="replace") as f:
            for line in f:
                rows.append(json.loads(line))
    except (FileNotFoundError, json.JSONDecodeError):
        pass
    return rows


def append_rows(path, rows, after):
    """Writes rows behind the first `after` rows of a file; anything else there goes. On the disk when it returns."""
    with writing(path), open(path, "a+b") as f:
        f.seek(0)
        for _ in range(after):
            line = f.readline()
        f.truncate()
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        f.write((b"\n" if after and not line.endswith(b"\n") else b"") + text.encode("utf-8"))
        f.flush()
        os.fsync(f.fileno())


class RowsOnDisk:
    """Rows of a file by number. Of each only its place in the file is in memory."""

    def __init__(self, path):
        self.path, self.places, self.file = path, array("Q"), None

    def scan(self):
        """Yields (row, "file:line") from the first row to the last: only what has come by can be asked for."""
        self.places = array("Q")
        return read_jsonl(self.path, self.places)

    def scanned(self):
        """Itself, ready for use: every row has been seen to be JSON."""
        for _ in self.scan():
            pass
        return self

    def __len__(self):
        return len(self.places)

    def __getitem__(self, number):
        self.file = self.file or open(self.path, "rb")
        self.file.seek(self.places[number])
        return json.loads(self.file.readline())


class RowWriter:
    """
    Rows that are appended in parts, on rank 0; a part is on the disk when add() returns. What a kill left of a part that
    was not finished goes when the file is opened again; `rows` counts what is there, on every rank.
    """

    def __init__(self, path, group=1):
        """`group`: rows come in groups of so many, and a group that is not whole goes too."""
        self.path, places = path, array("Q", [0])
        with writing(path):
            if common.is_main():
                with open(path, "a+b") as f:
                    f.seek(0)
                    places.extend(f.tell() for line in iter(f.readline, b"") if line.endswith(b"\n"))
                    places = places[:(len(places) - 1) // group * group + 1]
                    f.truncate(places[-1])
        self.rows = common.gather_list([len(places) - 1])[0]

    def add(self, rows):
        if common.is_main():
            with writing(self.path), open(self.path, "ab") as f:
                f.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8"))
                f.flush()
                os.fsync(f.fileno())
        common.barrier()  # the other ranks are about to read them
        self.rows += len(rows)
