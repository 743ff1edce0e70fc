"""
Watching an online run: KL, win rates and guards against hand-made numbers; a run that hacks its reward is stopped.

    python -m pytest tests/test_watch.py

What each test's mutants are, which it catches, stands in its docstring.
"""

import json
import math
import shutil
import statistics
import weakref
from functools import partial
from types import SimpleNamespace

import tiny  # first: it finds the repository

import pytest
import torch
from safetensors.torch import load_file

import guards
import reward
import train_dpo
import watch
from chat import Chat, train_tokenizer
from common import parse_config
from forked import (STEP, all_of, before, calls, counted, flags, folder, go, inputs, kill, of_rounds, patched, refused,
                    same, states, straight, term)
from model import load
from run import RunConfig

cpu = tiny.cpu


# --- KL ---

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two models of one tokenizer, and a third of another."""
    here = tmp_path_factory.mktemp("two")
    tiny.make_checkpoint(here / "a")
    tiny.make_checkpoint(here / "b", seed=1)
    train_tokenizer(["quite other words"], 270, here / "c")
    tiny.make_checkpoint(here / "c", tokenizer=False)
    return here


ROWS = [{"id": f"q{i}", "language": "en", "prompt": text} for i, text in enumerate(
    ["one", "two words", "347を漢数字で", "trois cent quarante", "five"])]


def ratios(policy, sft, chat, rows, new=6, **options):
    cfg = RunConfig(micro_batch_tokens=40, **options)
    prompts, sampled = [chat.prompt_ids(r["prompt"]) for r in rows], watch.answers(policy, chat, rows, new, 1.0)
    one, other = (watch.sequence_logps(m, cfg, prompts, sampled, "cpu") for m in (policy, sft))
    return sampled, one, other


def test_kl_is_exactly_zero_for_equal_models(two):
    """Loaded twice; mutants: the sampler's log-probs, rows packed by another order."""
    a, again, chat = load(two / "a"), load(two / "a"), Chat(two / "a")
    _, one, other = ratios(a, again, chat, ROWS)
    assert torch.equal(one, other) and watch.kl((one - other).tolist()) == (0.0, 0.0)
    assert (one < 0).all()


def test_kl_by_brute_force(two):
    """Mutants: the prompt counted too, the end of turn left out, temperature 0, the ratio upside down."""
    a, b, chat = load(two / "a"), load(two / "b"), Chat(two / "a")
    sampled, one, other = ratios(a, b, chat, ROWS)
    for row, ids, found in zip(ROWS, sampled, zip(one.tolist(), other.tolist())):
        prompt = chat.prompt_ids(row["prompt"])
        for model, logp in zip((a, b), found):
            scores = model(torch.tensor([prompt + ids])).double().log_softmax(-1)[0]
            expected = sum(scores[len(prompt) + t - 1, token].item() for t, token in enumerate(ids))
            assert logp == pytest.approx(expected, abs=1e-4)
    values = (one - other).tolist()
    mean, error = watch.kl(values)
    assert mean == pytest.approx(sum(values) / 5) and error == pytest.approx(statistics.stdev(values) / 5 ** 0.5)


@torch.no_grad()
def test_kl_is_unbiased(two):
    """
    Two tokens, all continuations enumerated: KL = KL of the first token + the mean of the second's over the first,
    where the first does not end the turn.
    """
    a, b, chat = load(two / "a").double(), load(two / "b").double(), Chat(two / "a")
    prompt, V = chat.prompt_ids("one"), chat.vocab_size
    ids = torch.cat([torch.tensor(prompt).expand(V, -1), torch.arange(V)[:, None]], 1)
    p, q = (m(ids)[:, -2:].log_softmax(-1) for m in (a, b))
    step = (p.exp() * (p - q)).sum(-1)  # (V, 2)
    goes_on = torch.tensor([token not in chat.stop_ids for token in range(V)])
    exact = step[0, 0] + (p[0, 0].exp() * goes_on * step[:, 1]).sum()
    rows = [{"id": f"draw {i}", "language": "en", "prompt": "one"} for i in range(1000)]
    a, b = load(two / "a"), load(two / "b")
    sampled, one, other = ratios(a, b, chat, rows, new=2)
    mean, error = watch.kl((one - other).tolist())
    assert exact > 10 * error and abs(mean - exact) < 3.5 * error, (mean, exact.item(), error)


# --- numbers by hand ---

def row(reward, win=None, **more):
    return {"id": "q", "language": "en", "completion": "a b a b", "tokens": 4, "flags": [], "log_ratio": 0.0,
            "reward": reward} | ({} if win is None else {"win": win}) | more


def test_win_rate_and_summary_by_hand():
    assert [watch.win(2.0, 1.0, "a", "b"), watch.win(1.0, 2.0, "a", "b"), watch.win(1.0, 1.0, "a", "b"),
            watch.win(1.0, 1.0 + 1e-7, "a", "a")] == [1.0, 0.0, 0.5, 0.5]
    rows = [row(1.0, 1.0, log_ratio=2.0), row(2.0, 0.5, flags=["language", "script"], tokens=8),
            row(3.0, 0.5, flags=["script"], completion="c d"), row(6.0, 0.0, flags=["truncated"], log_ratio=-1.0)]
    found = watch.summary(rows)
    assert (found["reward"], found["length"], found["win_rate"], found["kl"]) == (3.0, 5.0, 0.5, 0.25)
    assert found["win_rate_stderr"] == pytest.approx(math.sqrt((0.25 + 0.25) / 3) / 2)
    assert found["language"] == 0.5 and found["guard/script"] == 0.5 and found["guard/truncated"] == 0.25
    assert found["distinct_2"] == pytest.approx(3 / 10)  # a b, b a, c d of 3 + 3 + 1 + 3
    assert {name for name in found if name.startswith("guard/")} == {f"guard/{name}" for name in guards.GUARDS}
    assert "win_rate" not in watch.summary([row(1.0)]) and watch.summary([row(1.0)])["kl_stderr"] is None
    json.dumps(found, allow_nan=False)
    line = watch.line(found, found | {"reward": 4.0, "win_rate": 0.25, "kl": 1.0})
    assert line == ("reward 3.00 -> 4.00 | judge 50.0 -> 25.0 % of SFT | length 5.0 -> 5.0 | KL to SFT 0.25 -> 1.00 | "
                    "language 50 -> 50 % | distinct-2 0.30 -> 0.30")


@pytest.mark.parametrize("rewards, wins, expected", [
    ((1, 1, 1, 1), (0, 0, 0, 0.5), True),  # changes -.5 -.5 -.5 0: -.375 + 1.645 * .125 < 0
    ((1, 1, 1, 1), (0, 0, 0.5, 0.5), True),  # -.25 + 1.645 * .144 < 0 < -.25 + 1.96 * .144
    ((1, 1, 1, 1), (0, 0.5, 0.5, 0.5), False),  # -.125 + 1.645 * .125 > 0: noise
    ((1, 1, 1, 1), (0, 0, 0, 1), False),  # -.25 + 1.645 * .25
    ((0, 0, 0, 0), (0, 0, 0, 0), False),  # no reward rises
    ((-1, 0, 0, 0), (0, 0, 0, 0), False), ((3, -1, -1, 0), (0, 0, 0, 0), True),
    ((1, 1, 1, 1), (1, 1, 1, 1), False)])
def test_hacking_by_hand(rewards, wins, expected):
    """Mutants: the reward not asked for, a falling one, no errors, two-sided errors, a judge that rises."""
    old = [row(0.0, 0.5) for _ in rewards]
    assert watch.hacking(old, [row(float(r), w) for r, w in zip(rewards, wins)]) is expected


def test_hacking_is_paired():
    """Wins that vary from prompt to prompt hide nothing if every prompt's change is alike."""
    old = [row(0.0, float(i % 2)) for i in range(20)]
    new = [row(1.0, 0.5 if i % 8 == 1 else old[i]["win"]) for i in range(20)]  # three prompts fall by a half
    assert watch.hacking(old, new)
    assert not watch.hacking([row(0.0)], [row(1.0)]) and not watch.hacking([row(0.0, 1.0)], [row(1.0, 0.0)])


def test_prompts_are_taken_evenly_from_the_end():
    rows = [{"id": f"{language}{i}", "language": language} for i in range(5) for language in ("en", "fr", "ar")]
    rows = [r for r in rows if r["language"] != "ar" or r["id"] == "ar0"]
    ids = lambda *args: [r["id"] for r in watch.pick(rows, *args)]
    assert ids(5, 0) == ["ar0", "en3", "fr3", "en4", "fr4"] and len(ids(100, 0)) == len(rows)
    assert {tuple(ids(2, seed)) for seed in range(20)} == {("en4", "fr4"), ("ar0", "en4"), ("ar0", "fr4")}
    assert ids(2, 3) == ids(2, 3)


# --- guards ---

def test_flagged_samples_are_in_no_pair(tmp_path, monkeypatch):
    """Mutants: flags not written, flags of all guards whatever --guards says, greedy answers among the samples."""
    said = ["three hundred and forty-seven people", "trois cents personnes sont venues hier soir à la maison de mon père",
            "three hundred people came", "", "there were many people, " * 12]
    prompts = [{"id": "q", "language": "en", "prompt": "How many people came to the house?"}]

    def complete(policy, chat, rows, *_, samples=1, **__):
        return [r | {"completion": said[k], "sample": k, "ended": k != 2} for r in rows for k in range(samples)]

    monkeypatch.setattr(train_dpo, "complete", complete)
    rewards = {text: float(i) for i, text in enumerate(said)}
    monkeypatch.setattr(train_dpo, "score", lambda model, chat, pairs: [rewards[c] for _, c in pairs])
    expected = [[], ["language"], ["truncated"], ["empty"], ["repeated"]]

    def round_of(name, *kept):
        cfg = train_dpo.Config(samples=5, guards=list(kept))
        written = []
        run = SimpleNamespace(round=1, should_stop=lambda: False, log=SimpleNamespace(write=written.append))
        done, pairs = train_dpo.sample_round(cfg, run, None, None, None, None, prompts, tmp_path / name)
        assert tiny.read(tmp_path / name) == done and [r["flags"] for r in done[:5]] == expected
        train_dpo.report_samples(cfg, run, done, pairs)
        again = train_dpo.sample_round(cfg, run, None, None, None, None, prompts, tmp_path / name)  # from the file
        assert again == (done, pairs)
        return [(p["chosen"], p["rejected"]) for p in pairs], written[0]["samples"]

    pairs, found = round_of("all", *guards.GUARDS)
    assert pairs == [] and found["flagged"] == {name: int([name] in expected) for name in guards.GUARDS}
    assert round_of("some", "truncated", "empty", "repeated")[0] == [(said[1], said[0])]
    pairs, found = round_of("few", "empty", "truncated")
    assert pairs == [(said[4], said[0])] and found["flagged"] == {"empty": 1, "truncated": 1} and found["pairs"] == 1


def test_eligible():
    """It asks for what is written in the row, and looks itself where nothing is."""
    bare = {"id": "q", "language": "en", "prompt": "How are you?", "completion": "", "ended": False, "reward": 0.0}
    assert not reward.eligible(bare) and reward.eligible(bare, ["language"]) and not reward.eligible(bare, ["empty"])
    assert reward.eligible(bare | {"flags": []}) and not reward.eligible(bare | {"flags": ["copied"]})
    assert not reward.eligible(bare | {"flags": [], "reward": None})


# --- runs ---

@pytest.fixture(scope="module")
def judge(inputs, tmp_path_factory):
    """Flags: a second reward model, an SFT model that is not --model, and all samples of a round at once (sooner)."""
    here = tmp_path_factory.mktemp("judge")
    go("rm", "--model", inputs / "base", "--pairs", inputs / "pairs.jsonl", "--out", here / "judge", "--max_steps", 3,
       "--lr", 3e-3)
    go("sft", "--model", inputs / "base", "--data", inputs / "sft.jsonl", "--out", here / "sft", "--max_steps", 2)
    return ["--judge", here / "judge", "--sft", here / "sft", "--prompts_at_once", 9]


def measured(out, n):
    return json.loads((out / f"watch-{n}.json").read_text(encoding="utf-8"))["rows"]


def rounds(out):
    return [r for r in of_rounds(out) if "watch" in r]


def test_what_a_run_logs(inputs, judge, straight):
    """Mutants: before and after mixed up, the SFT model's answers those of another round, KL to the last policy."""
    out, chat = straight("online", *judge), Chat(inputs / "base")
    first, *later = (measured(out, n) for n in (0, 1, 2))
    assert [r["id"] for r in first] == [f"q{i}" for i in range(9)]
    for rows in (first, *later):
        assert [r["sft"] for r in rows] == [r["sft"] for r in first]
        arbiter, other = (reward.load_reward_model(p) for p in (inputs / "rm", judge[1]))
        for model, name, text in ((arbiter, "reward", "completion"), (other, "judge", "completion"),
                                  (other, "sft_judge", "sft")):
            expected = reward.score(model, chat, [(r["prompt"], r[text]) for r in rows])
            assert [r[name] for r in rows] == pytest.approx(expected, abs=1e-4)
        assert all(r["win"] == watch.win(r["judge"], r["sft_judge"], r["completion"], r["sft"]) for r in rows)
    sft = load(judge[3])
    assert [r["sft"] for r in first] == [chat.decode(x) for x in watch.answers(sft, chat, first, 16)]
    policy = load(out)  # behind the last round
    assert [r["completion"] for r in later[1]] == [chat.decode(x) for x in watch.answers(policy, chat, first, 16)]
    sampled = watch.answers(policy, chat, first, 16, 1.0)
    prompts = [chat.prompt_ids(r["prompt"]) for r in first]
    ratio = [watch.sequence_logps(m, RunConfig(), prompts, sampled, "cpu") for m in (policy, sft)]
    assert [r["log_ratio"] for r in later[1]] == pytest.approx((ratio[0] - ratio[1]).tolist(), abs=1e-4)
    logged = rounds(out)
    assert [r["round"] for r in logged] == [1, 2]
    for n, line in enumerate(logged, 1):
        for name, (was, now) in line["watch"].items():
            assert was == watch.summary(measured(out, n - 1))[name] and now == watch.summary(measured(out, n))[name]
    samples = [r["samples"] for r in of_rounds(out) if "samples" in r]
    assert [s["n"] for s in samples] == [20, 16] and all([*s["flagged"]] == ["truncated", "empty"] for s in samples)


def test_a_model_that_was_asked_is_gone():
    """Also one that points at itself, as FSDP's parts do. Mutants: no collection, the model returned."""
    class Model:
        def __init__(self):
            self.root = self

    made = []
    make = lambda: made.append(weakref.ref(model := Model())) or model
    answer = watch.briefly(make, lambda model: type(model).__name__)
    assert answer == "Model" and made[0]() is None


def test_the_first_policy_is_the_sft_model(inputs, straight, tmp_path):
    """Without --sft: KL is 0 to the bit, and nothing is loaded for it before the second measurement."""
    loads = tmp_path / "loads"
    go("online", *flags(inputs, "online"), "--out", tmp_path / "out", "--watch", 4,
       fault=partial(counted, loads, "watch:load"))
    assert sum(calls(loads)) == 2  # behind two rounds
    assert all(r["log_ratio"] == 0 and "win" not in r for r in measured(tmp_path / "out", 0))
    assert len(measured(tmp_path / "out", 0)) == 4 and rounds(tmp_path / "out")[0]["watch"]["kl"][0] == 0
    assert any(r["log_ratio"] != 0 for r in measured(tmp_path / "out", 2))
    go("online", *flags(inputs, "online"), "--out", tmp_path / "none", "--watch", 0)
    assert not [*(tmp_path / "none").glob("watch-*")] and not rounds(tmp_path / "none")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("none", "out"))
    assert one == other  # to watch changes nothing


def test_two_ranks_watch_as_one(judge, straight):
    """KL to an SFT model that is sharded. Mutants: each rank its own prompts only."""
    one, two = (straight("online", *judge, ranks=n) for n in (1, 2))
    for a, b in zip(measured(one, 0), measured(two, 0), strict=True):
        assert b == {k: pytest.approx(v, abs=1e-4) if isinstance(v, float) else v for k, v in a.items()}
    for a, b in zip(rounds(one), rounds(two), strict=True):
        assert a["watch"].keys() == b["watch"].keys() and a["hacking"] == b["hacking"]
        for name, values in a["watch"].items():
            assert b["watch"][name] == pytest.approx(values, abs=2e-3), name


def test_killed_and_stopped_while_watching(inputs, judge, straight, tmp_path):
    """Mutants: a measurement repeated, an old file trusted, the round's line logged twice or lost."""
    out, asked, seen = tmp_path / "out", tmp_path / "asked", []
    words = [*flags(inputs, "online"), *judge, "--out", out]

    def life(fault, code):
        go("online", *words, code=code, fault=partial(all_of, [partial(counted, asked, "watch:answers"), fault]))
        seen.append(sum(calls(asked)))

    life(partial(before, "train_dpo:complete", 1, kill), -9)  # nothing is sampled, but the start is measured
    life(partial(before, "watch:answers", 2, kill), -9)  # in the measurement behind round 1
    life(partial(before, "train_dpo:complete", 1, term), 143)  # it is measured; in the second round's samples
    life(partial(before, STEP, 3, term), 143)  # the last step of all
    path = folder(out) / "watch-1.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert refused("online", *words).startswith(f"error: {path} is missing or damaged, and the weights")
    path.write_bytes(whole)
    life(partial(before, "run:write_checkpoint", 1, kill), -9)  # measured; the result is not written
    life(partial(before, STEP, 1, kill), 0)
    assert seen == [3, 1, 2, 0, 2, 0]
    same(out, straight("online", *judge))
    assert [r["round"] for r in rounds(out)] == [1, 2]


def test_a_measurement_of_other_weights_is_not_used(inputs, tmp_path):
    """The round's end is lost with its state, and the round done again, at another rate."""
    out = tmp_path / "out"
    words = [*flags(inputs, "online"), "--watch", 3, "--max_steps", 2, "--samples", 3, "--prompts_at_once", 9,
             "--out", out]
    go("online", *words, code=143, fault=partial(before, STEP, 1, term))
    go("online", *words, code=-9, fault=partial(before, "train_dpo:append_rows", 1, kill))  # of round 2
    old = measured(folder(out), 1)
    states(out)[0].joinpath("manifest.json").unlink()
    go("online", *words, "--lr", 1e-2)
    assert [r["log_ratio"] for r in measured(out, 1)] != [r["log_ratio"] for r in old]
    assert rounds(out)[0]["watch"]["kl"][1] == watch.summary(measured(out, 1))["kl"]


# --- reward hacking ---

def long_answers_win(inputs, out, monkeypatch, *more):
    """A run whose reward is the length of the answer, and whose judge hates it."""
    def score(model, chat, pairs, *_):
        return [(-1.0 if "judge" in str(model.source) else 1.0) * len(c) for _, c in pairs]

    monkeypatch.setattr(reward, "score", score)
    monkeypatch.setattr(train_dpo, "score", score)
    words = [*flags(inputs, "online"), "--samples", 8, "--temperature", 1.2, "--max_new_tokens", 24, "--max_steps", 6,
             "--prompts_at_once", 9, "--lr", 1e-2, "--warmup_steps", 0, "--out", out, *more]
    train_dpo.main(parse_config(train_dpo.Config, [str(w) for w in words]))
    return [r["hacking"] for r in rounds(out)]


@pytest.mark.parametrize("how", ["stop", "warn", "ignore"])
def test_a_run_that_hacks_its_reward(inputs, judge, tmp_path, monkeypatch, capsys, how):
    """Mutants: stop that only warns, warn that stops, the policy of the hacked round saved."""
    out = tmp_path / "out"
    found = long_answers_win(inputs, out, monkeypatch, *judge[:2], "--on_hacking", how)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("reward hacking: ")]
    assert found[0] == ["over this round"] and len(found) == (1 if how == "stop" else 2)
    assert bool(said) == (how != "ignore") and ("is undone" in "".join(said)) == (how == "stop")
    start, end = (load_file(p / "model.safetensors") for p in (inputs / "base", out))
    assert all(torch.equal(start[k], end[k]) for k in start) == (how == "stop")
    assert not (out / "resume").exists()


def hacked_behind_round_2(out, rank):
    """hacking() says so where it compares with what was measured behind round 1."""
    def make(plain):
        return lambda old, new: (folder(out) / "watch-2.json").exists() and old == measured(folder(out), 1)
    patched("watch:hacking", make, rank)


def test_a_later_round_is_undone(inputs, judge, straight, tmp_path):
    """
    The policy behind round 1 is saved, also by a run that was killed where it mattered; on two ranks, sharded. --sft is
    --model under another name: it is loaded, and at distance 0 to the bit, also sharded.
    """
    out, hack, loads = tmp_path / "out", partial(hacked_behind_round_2, tmp_path / "out"), tmp_path / "loads"
    shutil.copytree(inputs / "base", tmp_path / "base")
    with open(tmp_path / "base" / "config.json", "a", encoding="utf-8") as f:
        f.write("\n")
    words = [*flags(inputs, "online"), *judge[:2], "--sft", tmp_path / "base", "--on_hacking", "stop", "--out", out]
    count = partial(counted, loads, "watch:load")
    go("online", *words, code=143, ranks=2, fault=partial(all_of, [count, partial(before, STEP, 5, term)]))
    assert sum(calls(loads)) == 2 and [r["log_ratio"] for r in measured(folder(out), 0)] == [0] * 9
    assert any(r["log_ratio"] for r in measured(folder(out), 1))
    kept = folder(out) / "resume" / "before-the-round" / "model.safetensors"
    expected, killed = load_file(kept), partial(before, "run:replace_dir", 1, kill, only=0)
    go("online", *words, ranks=2, code=None, fault=partial(all_of, [hack, killed]))
    said = go("online", *words, ranks=2, fault=hack).out[0]
    assert "round 2 is undone" in said and not kept.exists()
    found, last = (load_file(p / "model.safetensors") for p in (out, straight("online", *judge, ranks=2)))
    equal = lambda a, b: all(torch.equal(a[k], b[k]) for k in a)
    assert equal(found, expected) and not equal(found, last)
    assert [r["hacking"] for r in rounds(out)] == [[], ["over this round"]]


# --- what is refused ---

@pytest.mark.parametrize("words, line", [
    (["--guards", "empty", "boring"], "--guards knows no boring; what there is: truncated empty language"),
    (["--on_hacking", "panic"], "--on_hacking is warn, stop or ignore, got 'panic'"),
    (["--on_hacking", "stop"], "--on_hacking stop needs a --judge"),
    (["--judge", "{rm}", "--watch", "0"], "--judge reads the answers to watched prompts"),
    (["--judge", "{rm}"], "is the reward model that training climbs"), (["--watch", "-1"], "--watch is at least 0"),
    (["--watch_prompts", "{here}/none.jsonl"], "none.jsonl not found"),
    (["--sft", "{two}/c"], "has another tokenizer")])
def test_flags_that_are_refused(inputs, two, tmp_path, words, line):
    words = [w.format(rm=inputs / "rm", here=inputs, two=two) for w in words]
    with pytest.raises(SystemExit) as e:
        train_dpo.main(parse_config(train_dpo.Config, [str(w) for w in (
            *flags(inputs, "online"), "--out", tmp_path / "out", *words)]))
    assert line in str(e.value) and "\n" not in str(e.value) and not list(tmp_path.iterdir())
