"""
The whole recipe at smoke scale, as a user runs it: end to end on one and on two ranks, killed and continued, repeated.

python -m pytest tests/test_recipe.py
"""

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import common
import recipe as recipe_file
import tiny

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
ENVIRONMENT.pop("TRITON_INTERPRET", None)


def recipe(*flags):
    return subprocess.run([sys.executable, "recipe.py", "--preset", "smoke", *flags], cwd=ROOT, capture_output=True,
                          text=True, env=ENVIRONMENT)


def main(*flags):
    """recipe.py in this process, for what starts no command."""
    recipe_file.main(common.parse_config(recipe_file.Config, list(flags)))


def begun(finished, out, *stages):
    """`out` becomes a run that has been through these stages before, copied from the finished one."""
    for name in stages + ("tokenizer",):
        shutil.copytree(finished[0] / name, out / name)
    (out / "stages").mkdir()
    for name in stages:  # a stamp holds the commands, which name the folder
        stamp = (finished[0] / "stages" / f"{name}.json").read_text(encoding="utf-8")
        (out / "stages" / f"{name}.json").write_text(stamp.replace(str(finished[0]), str(out)), encoding="utf-8")


def fingerprint(out):
    """Hashes of everything a run leaves that must not depend on time: weights, data, samples."""
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.rglob("*"))
            if path.is_file() and path.suffix in (".safetensors", ".jsonl") and path.name != "log.jsonl"}


def numbers(out):
    """What results.json says about every stage, but for the seconds."""
    stages = json.loads((out / "results.json").read_text(encoding="utf-8"))["stages"]
    return [(s["name"], s["exact_match"], s["chrfpp"], s["win_rate"], s["reward"], s["per_language"]) for s in stages]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run on one rank."""
    out = tmp_path_factory.mktemp("recipe") / "run"
    done = recipe("--out", str(out))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out, done.stdout


def test_every_stage_runs_and_leaves_what_the_design_promises(finished):
    out, printed = finished
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert {"preset", "seed", "commit", "hardware", "seconds", "stages"} <= results.keys()
    names = [s["name"] for s in results["stages"]]
    assert names == ["base", "teacher-asian", "teacher-western", "sft-single", "sft", "offline-dpo", "online-1"]
    for stage in results["stages"]:
        assert {"name", "exact_match", "chrfpp", "win_rate", "reward", "seconds", "per_language"} <= stage.keys()
        assert set(stage["per_language"]) == {"en", "es", "fr", "de", "ar", "zh"}
        for mean, low, high in stage["win_rate"].values():
            assert 0 <= low <= mean <= high <= 1
    assert next(s for s in results["stages"] if s["name"] == "sft")["win_rate"]["sft"] == [0.5, 0.5, 0.5]
    assert "| stage | exact match |" in printed and "$ python train_sft.py" in printed  # table and commands are shown
    assert (out / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (out / "final" / "model.safetensors").read_bytes() == (out / "online-1" / "model.safetensors").read_bytes()
    assert not list(out.rglob("*.partial*"))


def test_training_never_sees_the_references_of_its_prompts(finished):
    out, _ = finished
    lines = lambda name: (out / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    for name in ("arbitrage", "online-1", "rm_prompts"):
        rows = [json.loads(line) for line in lines(name)]
        assert rows and all(set(row) == {"id", "language", "prompt"} for row in rows)
    ids = {name: {json.loads(line)["id"] for line in lines(name)}
           for name in ("base", "rm_rows", "arbitrage", "online-1", "test")}
    groups = list(ids.values())
    assert all(a.isdisjoint(b) for i, a in enumerate(groups) for b in groups[i + 1:])  # no stage reads another's items


def test_running_again_skips_what_is_finished(finished):
    out, _ = finished
    before, begin = (fingerprint(out), numbers(out)), time.time()
    done = recipe("--out", str(out))
    assert done.returncode == 0 and done.stdout.count("finished earlier") == 11 and "$ " not in done.stdout
    assert time.time() - begin < 60 and (fingerprint(out), numbers(out)) == before


def test_other_settings_in_the_same_folder_are_refused(finished):
    out, _ = finished
    done = recipe("--out", str(out), "--seed", "7")
    assert done.returncode == 1 and "was made with other commands" in done.stderr and done.stderr.count("\n") == 1


def test_killed_in_the_middle_it_goes_on_and_ends_with_the_same_files(finished, tmp_path):
    """kill -9 of the whole process group while the teachers train, then of recipe.py alone; then on."""
    out = tmp_path / "run"
    begun(finished, out, "data", "base")
    for stage, whole_group in (("teachers", True), ("rm", False)):
        process = subprocess.Popen([sys.executable, "recipe.py", "--preset", "smoke", "--out", str(out)], cwd=ROOT,
                                   stdout=subprocess.DEVNULL, env=ENVIRONMENT, start_new_session=True)
        while not (out / "logs" / f"{stage}-0-0.log").exists():  # the stage has begun
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(1.0)
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        assert not (out / "stages" / f"{stage}.json").exists()
    done = recipe("--out", str(out), "--until", "rm")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("finished earlier") == 3
    mine, theirs = fingerprint(out), fingerprint(finished[0])  # another run with the same seed: the same files
    assert len(mine) > 20 and [k for k in mine if mine[k] != theirs.get(k)] == []


def plan(out, ranks):
    """[command as words, ...] of the whole smoke recipe."""
    sizes = (out, 0, recipe_file.SMOKE, ranks, "smoke", False)
    return [shlex.split(c) for _, steps in recipe_file.mini_plan(*sizes) for commands in steps for c in commands]


def test_ranks_change_the_launcher_of_training_commands_only():
    launcher, started = ["torchrun", "--standalone", "--nproc_per_node=2"], []
    for one, two in zip(plan("out", 1), plan("out", 2), strict=True):
        if one[1].startswith("train_") or "--teachers" in one:
            started.append(one[1])
            assert one[0] == "python" and two == launcher + one[1:]
        else:
            assert two == one
    assert {n: started.count(n) for n in started} == {"train_sft.py": 8, "train_rm.py": 1, "arbitrage.py": 1,
                                                      "train_dpo.py": 4}


@pytest.fixture(scope="module")
def two_ranks(finished, tmp_path_factory):
    """
    A folder with what every command of two ranks makes from the files of the run on one rank. The first is started as
    the recipe starts it, by torchrun; the others one after another in a second group: starting ranks is most of the time.
    """
    if torch.cuda.is_available():
        pytest.skip("one rank has run on the GPU, two would need two")
    out = tmp_path_factory.mktemp("ranks") / "run"
    begun(finished, out, "data")
    done = recipe("--out", str(out), "--ranks", "2", "--jobs", "1", "--until", "base")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"$ torchrun --standalone --nproc_per_node=2 train_sft.py --model new --tokenizer {out}/" in done.stdout
    todo = []
    for words in plan(str(finished[0]), 2):
        if words[0] == "torchrun":
            words[words.index("--out") + 1] = words[words.index("--out") + 1].replace(str(finished[0]), str(out))
            todo.append(["", *words[3:]])
    assert todo.pop(0)[1:4] == ["train_sft.py", "--model", "new"]
    tiny.jobs(out / "jobs.json", {2: todo})
    return out


TRAINED = {words[words.index("--out") + 1][2:]: words for words in plan(".", 2) if words[3].startswith("train_")}


@pytest.mark.parametrize("name", TRAINED)
def test_two_ranks_train_the_same_recipe(finished, two_ranks, name):
    """From the same files every training command ends with the same files, and the same weights to rounding."""
    one, two, words = finished[0] / name, two_ranks / name, TRAINED[name]
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
    for file in ("config.json", "tokenizer.json"):
        assert (one / file).read_bytes() == (two / file).read_bytes()
    (first, *steps), (header, *found) = (tiny.read(folder / "log.jsonl") for folder in (one, two))
    assert (first["ranks"], header["ranks"]) == (1, 2) and len(steps) > 1
    for a, b in zip(steps, found, strict=True):
        if "languages" in a:
            count = lambda row: {language: means["n"] for language, means in row["languages"].items()}
            assert count(a) == count(b)
            continue
        if "step" not in a:  # of an online round: what is drawn is the same, and rewards are, to rounding
            assert a.keys() == b.keys() and a["round"] == b["round"]
            for key in a.get("samples", {}).keys() - {"flagged"}:
                assert b["samples"][key] == pytest.approx(a["samples"][key], abs=1e-3)
            assert a.get("watch", {}).keys() == b.get("watch", {}).keys()
            continue
        assert (b["step"], b["tokens"]) == (a["step"], a["tokens"])
        assert [b["loss"], b["grad_norm"]] == pytest.approx([a["loss"], a["grad_norm"]], rel=1e-3)
    start = finished[0] / words[words.index("--model") + 1] / "model.safetensors"
    before = load_file(start) if start.exists() else {}  # a new model: all of its weights are compared
    one, two = (load_file(folder / "model.safetensors") for folder in (one, two))
    distance = lambda a, b: math.sqrt(sum((p - b.get(key, 0)).square().sum().item() for key, p in a.items()))
    assert one.keys() == two.keys() and distance(one, two) < 1e-3 * distance(one, before)  # of the way they went


@pytest.mark.parametrize("file", ["arbitrage/completions", "arbitrage/sft", "arbitrage/pairs", *(
    f"online-1-{group}/{name}-1" for group in ("west", "east") for name in ("completions", "pairs"))])
def test_two_ranks_sample_and_score_the_same_rows(finished, two_ranks, file):
    one, two = (tiny.read(folder / f"{file}.jsonl") for folder in (finished[0], two_ranks))
    assert len(one) == len(two) > 0
    for a, b in zip(one, two):
        assert b == {k: pytest.approx(v, abs=1e-4) if "reward" in k else v for k, v in a.items()}


@pytest.mark.parametrize("how", ["checkpoints", "search"])
def test_what_a_stage_merges(finished, tmp_path, how):
    """--merge checkpoints: also the runs' earlier ones, uniformly; --merge search: the models, by weights it chose."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out, symlinks=True)
    for stamp in (out / "stages").iterdir():
        stamp.write_text(stamp.read_text(encoding="utf-8").replace(str(finished[0]), str(out)), encoding="utf-8")
        if stamp.stem not in ("data", "base", "teachers", "rm", "arbitrage"):
            stamp.unlink()
    done = recipe("--out", str(out), "--merge", how, "--until", "sft")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((out / "sft" / "merge_report.json").read_text(encoding="utf-8"))
    folders = [f"sft-{g}{at}" for g in ("west", "east") for at in (("/at-50", "/at-75", "") if how == "checkpoints" else ("",))]
    assert report["models"] == [f"{out}/{folder}" for folder in folders]
    models, merged = [load_file(out / folder / "model.safetensors") for folder in folders], load_file(
        out / "sft" / "model.safetensors")
    weights = report["settings"]["weights"]
    for name, x in merged.items():
        mean = sum(w * m[name].double() for w, m in zip(weights, models)) / sum(weights)
        if how == "search":
            base = load_file(out / "base" / "model.safetensors")[name].double()
            mean = base + report["settings"]["lam"] * (mean - base)
        assert torch.allclose(x.double(), mean, rtol=1e-6, atol=1e-7), name
    same = (out / "sft-west" / "model.safetensors").read_bytes()  # keeping checkpoints changes nothing of the training
    assert same == (finished[0] / "sft-west" / "model.safetensors").read_bytes()
    if how == "checkpoints":
        assert weights == [1.0] * 6 and any(not torch.equal(models[0][n], models[2][n]) for n in merged)
    else:
        assert report["search"]["held_out"].keys() >= {"uniform", "chosen"} and len(report["search"]["tried"]) > 6


@pytest.mark.parametrize("preset", ["8b", "32b"])
@pytest.mark.parametrize("how", ["models", "checkpoints", "search"])
def test_presets_for_real_checkpoints_print_commands_that_parse(preset, how, capsys):
    import arbitrage, eval as evaluation, merge, reward, train_dpo, train_rm, train_sft
    modules = (arbitrage, evaluation, merge, reward, train_dpo, train_rm, train_sft)
    scripts = {m.__file__.rpartition("/")[2]: m for m in modules}
    main("--preset", preset, "--merge", how)
    lines = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith(("python", "torchrun"))]
    assert len(commands) > 25
    safe = [words for words in commands if any(word.endswith(":0.15") and "safety" in word for word in words)]
    assert len(safe) == 8 and all(any(word.endswith(":0.85") for word in words) for words in safe)  # SFT and offline DPO
    for words in commands:
        at = next(i for i, w in enumerate(words) if w.endswith(".py"))
        common.parse_config(scripts[words[at]].Config, words[at + 1:])


def test_unknown_stage_and_preset_are_one_line_errors(tmp_path):
    for flags, said in ((("--until", "sftt"), "the stages are data base"),
                        (("--preset", "huge"), "known: mini smoke 8b 32b")):
        with pytest.raises(SystemExit) as e:
            main("--preset", "smoke", "--out", str(tmp_path / "x"), *flags)
        assert said in str(e.value) and "\n" not in str(e.value) and not (tmp_path / "x").exists()


def test_a_failing_command_says_which_and_shows_its_error(finished, tmp_path):
    out = tmp_path / "run"
    begun(finished, out, "data")
    (out / "data" / "base.jsonl").write_text('{"language": "en", "prompt": "a"}\n', encoding="utf-8")
    done = recipe("--out", str(out), "--until", "base")
    assert done.returncode == 1 and "train_sft.py" in done.stderr
    assert "base.jsonl:1: the row has no 'completion'" in done.stderr and "Traceback" not in done.stderr
    assert not (out / "base").exists() and not (out / "stages" / "base.json").exists()


def readme_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        # as the shell sees it: a # inside a word (URL#model) begins no comment
        yield from (re.split(r"(?:^|\s)#", line)[0].strip() for line in block.splitlines() if line.strip())


def test_readme_commands_exist_and_parse():
    """Every script of README's code blocks exists and takes the flags that README gives it."""
    import importlib
    seen = 0
    for command in readme_commands():
        words = shlex.split(command)
        at = next((i for i, w in enumerate(words) if w.endswith(".py")), None)
        if at is None:
            known = command in ("pip install -r requirements.txt", "python -m pytest") or words[:2] == ["vllm", "serve"]
            assert known, command
            continue
        module = importlib.import_module(words[at].removesuffix(".py").replace("/", "."))
        common.parse_config(module.Config, words[at + 1:])
        seen += 1
    assert seen >= 12


def test_readme_by_hand_commands_run(finished, tmp_path):
    """
    The section "By hand", run for real on the smoke run's files (two that need GPUs or minutes excepted). One process
    runs them all; that each script starts by itself is seen in the recipe.
    """
    out, _ = finished
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## By hand")[1].split("```bash\n")[1].split("```")[0]
    commands = [line.split("#")[0].strip() for line in text.splitlines() if line.startswith("python")]
    assert len(commands) >= 7
    todo = []
    for command in commands:
        command = re.sub(r"out/mini/", f"{out}/", command)
        command = re.sub(r"(?<= )out/(\S+)", rf"{tmp_path}/\1", command)
        words = shlex.split(command)[1:]
        if words[0] in ("train_sft.py", "train_rm.py", "train_dpo.py"):
            words += ["--max_steps", "1", "--batch_size", "8"]
        todo.append(["", *words])
    tiny.jobs(tmp_path / "jobs.json", {1: todo})
    for made in ("my-sft", "my-rm", "my-dpo", "my-merge"):
        assert (tmp_path / made / "model.safetensors").exists()
    answers, scored = (tiny.read(tmp_path / f"{name}.jsonl") for name in ("answers", "scored"))
    assert len(answers) == len(scored) > 0 and (tmp_path / "my-eval" / "results.json").exists()
