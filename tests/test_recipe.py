"""
The whole recipe at smoke scale, as a user runs it: end to end on one and on two ranks, killed and continued, repeated.

python -m pytest tests/test_recipe.py
"""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import common
import tiny

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
ENVIRONMENT.pop("TRITON_INTERPRET", None)


def recipe(*flags):
    return subprocess.run([sys.executable, "recipe.py", "--preset", "smoke", *flags], cwd=ROOT, capture_output=True,
                          text=True, env=ENVIRONMENT)


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
    """kill -9 of the whole process group while the teachers train, then of recipe.py alone; then on to SFT."""
    out = tmp_path / "run"
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
    done = recipe("--out", str(out), "--until", "sft")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "finished earlier" in done.stdout
    mine, theirs = fingerprint(out), fingerprint(finished[0])  # another run with the same seed: the same files
    assert len(mine) > 30 and [k for k in mine if mine[k] != theirs.get(k)] == []


def test_two_ranks_train_the_same_recipe(finished, tmp_path):
    """torchrun with two gloo ranks and FSDP, through every kind of training command."""
    out = tmp_path / "run"
    done = recipe("--out", str(out), "--ranks", "2", "--jobs", "1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    two, one = (json.loads((o / "results.json").read_text(encoding="utf-8"))["stages"] for o in (out, finished[0]))
    assert [s["name"] for s in two] == [s["name"] for s in one]
    # the base, trained on the same batches, is the same model to rounding; sampling afterwards may differ by a token
    assert abs(two[0]["chrfpp"] - one[0]["chrfpp"]) < 1.0


@pytest.mark.parametrize("preset", ["8b", "32b"])
def test_presets_for_real_checkpoints_print_commands_that_parse(preset):
    import arbitrage, eval as evaluation, merge, reward, train_dpo, train_rm, train_sft
    modules = (arbitrage, evaluation, merge, reward, train_dpo, train_rm, train_sft)
    scripts = {m.__file__.rpartition("/")[2]: m for m in modules}
    done = subprocess.run([sys.executable, "recipe.py", "--preset", preset], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    commands = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith(("python", "torchrun"))]
    assert len(commands) > 25
    for words in commands:
        at = next(i for i, w in enumerate(words) if w.endswith(".py"))
        common.parse_config(scripts[words[at]].Config, words[at + 1:])


def test_unknown_stage_and_preset_are_one_line_errors(tmp_path):
    for flags, said in ((("--until", "sftt"), "the stages are data base"),
                        (("--preset", "huge"), "known: mini smoke 8b 32b")):
        done = recipe("--out", str(tmp_path / "x"), *flags)
        assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr


def test_a_failing_command_says_which_and_shows_its_error(tmp_path):
    out = tmp_path / "run"
    assert recipe("--out", str(out), "--until", "data").returncode == 0
    (out / "data" / "base.jsonl").write_text('{"language": "en", "prompt": "a"}\n', encoding="utf-8")
    done = recipe("--out", str(out), "--until", "base")
    assert done.returncode == 1 and "train_sft.py" in done.stderr
    assert "base.jsonl:1: the row has no 'completion'" in done.stderr and "Traceback" not in done.stderr
    assert not (out / "base").exists() and not (out / "stages" / "base.json").exists()


def readme_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        yield from (line.split("#")[0].strip() for line in block.splitlines() if line.strip())


def test_readme_commands_exist_and_parse():
    """Every script of README's code blocks exists and takes the flags that README gives it."""
    import importlib
    seen = 0
    for command in readme_commands():
        words = shlex.split(command)
        at = next((i for i, w in enumerate(words) if w.endswith(".py")), None)
        if at is None:
            assert command in ("pip install -r requirements.txt", "python -m pytest"), command
            continue
        module = importlib.import_module(words[at].removesuffix(".py").replace("/", "."))
        common.parse_config(module.Config, words[at + 1:])
        seen += 1
    assert seen >= 12


def test_readme_by_hand_commands_run(finished, tmp_path):
    """The section "By hand", run for real on the smoke run's files (two that need GPUs or minutes excepted), one after
    another in one process: what each script's own command-line test starts anew."""
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
