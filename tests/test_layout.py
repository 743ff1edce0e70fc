"""
The repository's shape: imports point down, few packages, encodings are named, files stay short.

    python -m pytest tests/test_layout.py

The layers are the table in README.md's "layout". Every check is a function of (name of a file, its text), so that the
tests at the end can show it code that breaks the rule.
"""

import ast
import functools
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {"out", "venv", "build", "dist", "node_modules", "__pycache__"}

# A file may import what stands on a lower row; files of one package may import each other.
LAYERS = {
    "common": 0, "kernels": 0, "mini": 0, "mini.templates": 0, "mini.items": 0, "mini.langid": 0,  # mini/'s table
    "languages": 0, "rows": 0.3, "guards": 0.3,
    "merge_methods": 0, "merge_stream": 0.6, "merge_search": 2.5,  # merge.py's mathematics, engine and choice of weights
    "checkpoint": 0.3, "config": 0.6, "chat": 0.6, "model": 1, "data": 1,  # files, what they say, what is made of them
    "sharding": 0.2, "optim": 0.3, "state": 0.3, "meter": 0.3, "run": 1.3, "reference": 1.6,  # what training needs beside
    "endpoint": 1.2, "asking": 1.5,  # models that run elsewhere: one request, and many
    "cache": 0.6, "sampler": 1.6,  # keys and values, and the engine that samples with them
    "routers": 0.6, "teachers": 2.3, "pool": 2.4, "pool_report": 2.3, "pool_page": 2.5,  # arbitrage: who answers, and whose answer is kept
    "eval_table": 2.4, "eval_page": 2.5,  # what eval.py's results say, as text and as a page
    "stats": 0, "benchmarks": 0.6, "likelihood": 2, "generate": 2, "reward": 2, "judge": 2.2, "tasks": 2.5, "charts": 2, "watch": 2.5,
    "train_sft": 3, "train_rm": 3, "train_dpo": 3, "arbitrage": 3, "merge": 3, "eval": 3, "report": 3,
    "mini.make": 3, "mini.prepare": 3, "mini.pairs": 3, "mini.best_of_k": 3, "mini.summary": 3,
    "recipe": 4}
SCRIPTS = {name for name, layer in LAYERS.items() if layer >= 3}  # never imported
SIDEWAYS = {("tasks", "generate"), ("tasks", "reward")}  # a benchmark samples and scores
FREE = {"tests", "bench"}  # may import everything above, and the peers they compare with; nobody imports them

# what is wrong today, and why; a line here that is no longer needed is an error too
IMPORTS_A_SCRIPT = {}  # (file, module): why

PACKAGES = {"torch", "numpy", "tokenizers", "safetensors", "triton", "pytest",  # requirements.txt
            "tqdm", "huggingface_hub", "jinja2"}  # installed by those
ONLY_IN = {"icu": {"mini/make.py"},  # remakes the table; the repository ships it
           "pyarrow": {"benchmarks.py"}}  # reads parquet if it is installed, and says so if not

MOST_LINES = 400  # a file has fewer
LONGER = {  # file: (fewer than this many lines, why it is longer today)
}


def sources():
    """{"kernels/rope.py": its text} of every Python file outside tests/."""
    return {name: text for name, text in files(".py").items() if not name.startswith("tests/")}


@functools.cache
def files(*suffixes):
    """{path from the root: text} of what belongs to the repository."""
    found = {}
    for folder, folders, names in os.walk(ROOT):
        folders[:] = sorted(f for f in folders if f not in SKIPPED and not f.startswith("."))
        for path in (Path(folder) / name for name in sorted(names) if name.endswith(suffixes)):
            found[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
    return found


def imports(name, text):
    """[(line, module)] of every import, wherever it stands; relative ones resolved, `from mini import x` as mini.x."""
    found, package = [], name.split("/")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            inside = (ROOT / module.replace(".", "/")).is_dir()  # from tasks import mini: the file tasks/mini.py
            found += [(node.lineno, f"{module}.{alias.name}".lstrip(".") if inside else module) for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("__import__", "import_module"):
                found.append((node.lineno, node.args[0].value))
    return list(dict.fromkeys(found))


def module_of(name):
    """"tasks/mini.py" -> "tasks.mini", "kernels/__init__.py" -> "kernels"."""
    return name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def unit(module):
    """The row's name in LAYERS: "kernels.rope" -> "kernels", "mini.items" -> "mini.items"; None if it is not ours."""
    top = module.split(".")[0]
    own = next((u for u in (".".join(module.split(".")[:2]), top) if u in LAYERS), None)
    if own is None and (top in FREE or any(u.startswith(f"{top}.") for u in LAYERS)):
        return module  # ours, but not in the table
    return own


def upward(name, text):
    """["file:line imports x ..."] where an import does not point down."""
    here, bad = unit(module_of(name)), []
    for line, module in imports(name, text):
        there = unit(module)
        if there is None or name.split("/")[0] in FREE:
            continue
        down = there in LAYERS and LAYERS[there] < LAYERS.get(here, 9) and there not in SCRIPTS
        beside = there == here or (here, there) in SIDEWAYS or (
            here.split(".")[0] == there.split(".")[0] and there in LAYERS and there not in SCRIPTS)
        if not down and not beside and (name, there) not in IMPORTS_A_SCRIPT:
            bad.append(f"{name}:{line} imports {module}: imports point down, scripts never import scripts")
    return bad


def foreign(name, text):
    """Imports of packages that requirements.txt does not name."""
    bad = []
    for line, module in imports(name, text):
        top = module.split(".")[0]
        known = top in PACKAGES or top in sys.stdlib_module_names or unit(module) is not None
        if not known and name not in ONLY_IN.get(top, ()) and name.split("/")[0] not in FREE:
            bad.append(f"{name}:{line} imports {module}, which is not in requirements.txt")
    return bad


NOT_FILES = {"os", "tarfile", "zipfile", "webbrowser", "self"}  # x.open() that opens no text
COMPRESSED = {"gzip", "bz2", "lzma"}  # their open() is binary unless the mode says t


def without_encoding(name, text):
    """Calls that open, read or write text in whatever encoding the machine has."""
    bad = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        owner = getattr(node.func.value, "id", "") if isinstance(node.func, ast.Attribute) else None
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        keywords = {k.arg: k.value for k in node.keywords}
        if called == "open" and owner not in NOT_FILES:
            is_method = owner is not None and owner not in ("io", "codecs", *COMPRESSED)  # path.open(mode)
            place = 0 if is_method else 1
            mode = keywords.get("mode", node.args[place] if len(node.args) > place else None)
            mode = mode.value if isinstance(mode, ast.Constant) else "" if mode is None else "?"
            binary = "t" not in mode if owner in COMPRESSED else "b" in mode
        else:
            binary = called not in ("read_text", "write_text")
        if not binary and "encoding" not in keywords:
            bad.append(f"{name}:{node.lineno} {called}() of text without encoding=\"utf-8\"")
    return bad


def too_long(name, text):
    lines, most = text.count("\n") + 1 - text.endswith("\n"), LONGER.get(name, (MOST_LINES,))[0]
    return [f"{name} has {lines} lines, a file has fewer than {most}: split it by idea"] if lines >= most else []


def machine_paths(name, text):
    """Folders of the machine a file was written on."""
    return [f"{name}:{n} names {found[0]}" for n, line in enumerate(text.splitlines(), 1)
            if (found := re.search(r"(?<![\w.-])/(work|root)/", line))]


@pytest.mark.parametrize("check", [upward, foreign, without_encoding, too_long], ids=lambda f: f.__name__)
def test_sources(check):
    bad = [line for name, text in sources().items() for line in check(name, text)]
    assert not bad, "\n" + "\n".join(bad)


def test_no_machine_paths():
    bad = [line for name, text in files(".py", ".md", ".txt").items() for line in machine_paths(name, text)]
    assert not bad, "\n" + "\n".join(bad)


def test_every_source_file_has_a_place_in_the_layers():
    names = sources()
    lost = [name for name in names if unit(module_of(name)) not in LAYERS and name.split("/")[0] not in FREE]
    assert not lost, f"new files: {lost}; give them a layer in this test and in the README's table"
    there = {unit(module_of(name)) for name in names}
    assert set(LAYERS) <= there, f"gone: {set(LAYERS) - there}"


def test_no_drawer_for_everything():
    assert not [name for name in files(".py") if Path(name).stem in ("utils", "util", "helpers", "misc")]


def test_no_trainer_class():
    classes = [n.name for text in sources().values() for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ClassDef)]
    assert not [c for c in classes if c.endswith(("Trainer", "Callback", "Registry"))]


def test_every_file_says_what_it_is():
    assert not [name for name, text in sources().items() if not ast.get_docstring(ast.parse(text))]


def test_exceptions_are_still_needed():
    names = sources()
    for name, module in IMPORTS_A_SCRIPT:
        found = [m for _, m in imports(name, names[name])]
        assert module in found, f"{name} no longer imports {module}: take the line out"
    assert set(LONGER) <= set(names)


def test_requirements_name_the_packages():
    words = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    for package in PACKAGES:
        assert any(word.split("==")[0].strip("#,;()") == package for word in words), package
    required = {line.split("#")[0].split("==")[0].strip() for line in
                (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()} - {""}
    assert required == {"torch", "numpy", "tokenizers", "safetensors", "triton", "pytest"}


# ---------------------------------------------------------------------------------------------------------------------
# the checks can fail

@pytest.mark.parametrize("name,text,bad", [
    ("data.py", "import common\nfrom common import die", []), ("data.py", "import model", ["data.py:1 imports model"]),
    ("data.py", "def f():\n    from generate import generate", ["data.py:2 imports generate"]),
    ("data.py", "m = __import__('reward')", ["data.py:1 imports reward"]),
    ("data.py", "import json, tests.tiny", ["data.py:1 imports tests"]),
    ("common.py", "import kernels", ["common.py:1 imports kernels"]),
    ("kernels/rope.py", "from ._triton import tl\nfrom . import swiglu", []),
    ("kernels/rope.py", "import common", ["kernels/rope.py:1 imports common"]),
    ("kernels/rope.py", "from .. import model", ["imports model"]),
    ("tasks/mgsm.py", "from generate import complete\nfrom tasks import flores\nfrom mini.items import rows", []),
    ("tasks/mgsm.py", "import eval", ["imports eval"]),
    ("tasks/mgsm.py", "from mini import prepare", ["imports mini.prepare"]),
    ("reward.py", "import generate", ["imports generate"]), ("eval.py", "from tasks import mini\nimport model", []),
    ("train_dpo.py", "from train_sft import sft_loss", ["imports train_sft"]),
    ("recipe.py", "import merge", ["imports merge"]),
    ("mini/items.py", "from mini.templates import X", []), ("mini/items.py", "from data import X", ["imports data"]),
    ("mini/pairs.py", "from mini.prepare import X", ["imports mini.prepare"]),
    ("mini/pairs.py", "from tasks.mini import X", []),
    ("mini/pairs.py", "import arbitrage", ["imports arbitrage"]),
    ("model.py", "import bench.attention", ["imports bench"]), ("bench/dpo.py", "import train_dpo", [])])
def test_imports_that_point_up_are_found(name, text, bad):
    found = upward(name, text)
    assert len(found) == len(bad) and all(b in f for b, f in zip(bad, found)), found


@pytest.mark.parametrize("name,text,bad", [
    ("a.py", "import os.path, torch.nn as nn\nfrom safetensors.torch import save_file\nfrom tasks.mini import x", 0),
    ("a.py", "import pandas", 1), ("a.py", "try:\n    import pyarrow.parquet\nexcept ImportError:\n    pass", 1),
    ("a.py", "from transformers import AutoModel, AutoTokenizer", 1), ("mini/make.py", "import icu", 0),
    ("mini/items.py", "import icu", 1),
    ("bench/a.py", "import trl", 0), ("kernels/a.py", "from ._triton import tl", 0),
    ("a.py", "importlib.import_module('yaml')", 1)])
def test_foreign_packages_are_found(name, text, bad):
    assert len(foreign(name, text)) == bad, foreign(name, text)


@pytest.mark.parametrize("text,bad", [
    ("open(p)", 1), ("open(p, 'w')", 1), ("open(p, mode='a')", 1), ("open(p, mode)", 1), ("open(p, 'rb')", 0),
    ("open(p, 'w', encoding='utf-8')", 0), ("open(p, mode, encoding=e)", 0), ("p.open()", 1), ("p.open('wb')", 0),
    ("io.open(p)", 1),
    ("gzip.open(p)", 0), ("gzip.open(p, 'rt')", 1), ("gzip.open(p, 'rt', encoding='utf-8')", 0),
    ("os.open(p, os.O_RDONLY)", 0),
    ("self.open(p)", 0), ("p.read_text()", 1), ("p.write_text(x)", 1), ("(a / b).read_text()", 1),
    ("p.read_text(encoding='utf-8')", 0),
    ("p.read_bytes()", 0), ("safe_open(p)", 0), ("(a / b).open('w')", 1)])
def test_text_without_an_encoding_is_found(text, bad):
    assert len(without_encoding("a.py", text)) == bad


def test_long_files_and_machine_paths_are_found():
    assert not too_long("a.py", "x\n" * 399) and too_long("a.py", "x\n" * 399 + "x")
    assert "400 lines" in too_long("a.py", "x\n" * 400)[0]
    assert machine_paths("a.md", "ok\nsee " + "/work" + "/main") == ["a.md:2 names /work" + "/"]
    assert machine_paths("a.py", "x = \"/root" + "/v\"")
    assert not machine_paths("a.md", "frame/work/x, network/root/x, /tm" + "p/x")
