"""
merge.py --weights search: its moves and its climb on functions whose maximum is known, then whole searches on tiny
models. Run: python -m pytest tests/test_merge_search.py
"""

import json
import math
import statistics

import pytest
import torch

import merge
import tiny
from chat import Chat
from data import encode_row
from merge_search import Point, climb, moves, softmax_of
from model import load, save
from reward import load_reward_model, new_reward_model, write_reward_model
from reward import score as reward_score
from generate import complete

cpu = tiny.cpu
LANGUAGES = ["en", "ar", "zh-Hant", "hi"]
ANSWERS = {"en": "three hundred", "ar": "ثلاثمائة وسبعة", "zh-Hant": "三百四十七", "hi": "तीन सौ सैंतालीस"}


# ---------------------------------------------------------------------------------------------------------------------
# the search itself

def test_moves_stay_on_the_simplex():
    got = list(moves((0.5, 0.5), 0.3))
    assert got == [pytest.approx(w) for w in ((8 / 13, 5 / 13), (2 / 7, 5 / 7), (5 / 13, 8 / 13), (5 / 7, 2 / 7))]
    assert (0.0, 1.0) in list(moves((0.1, 0.9), 0.3))  # never below 0
    for start in ((1.0, 0.0, 0.0), (0.2, 0.3, 0.5)):
        for w in moves(start, 0.1):
            assert sum(w) == pytest.approx(1) and min(w) >= 0


def test_softmax_of_scores():
    assert softmax_of([-1.0, -1.0, -1.0]) == (1 / 3,) * 3
    e = math.exp(-2)  # two scores lie two of their standard deviations apart, whatever their scale
    for scale in (1e-6, 1.0, 1e6):
        assert softmax_of([3 * scale, 1 * scale]) == pytest.approx((1 / (1 + e), e / (1 + e)))


@pytest.mark.parametrize("best", [(0.2, 0.3, 0.5), (0.0, 1.0, 0.0), (1 / 3, 1 / 3, 1 / 3), (0.05, 0.05, 0.9)], ids=str)
def test_climb_finds_the_top(best):
    """A concave objective on the simplex: the end is within the last step of its maximum, at the borders too."""
    calls = []

    def evaluate(w):
        calls.append(w)
        return Point(w, 1.0, {}, objective=-sum((a - b) ** 2 for a, b in zip(w, best)))

    found = climb(evaluate((1 / 3,) * 3), evaluate, lambda: False)
    assert max(abs(a - b) for a, b in zip(found.weights, best)) < 0.03
    assert len(calls) < 100


def test_climb_stops_when_its_tries_are_spent():
    calls = []

    def evaluate(w):
        calls.append(w)
        return Point(w, 1.0, {}, objective=w[0])

    climb(evaluate((0.5, 0.5)), evaluate, lambda: len(calls) >= 4)
    assert len(calls) == 4


# ---------------------------------------------------------------------------------------------------------------------
# whole searches

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and two models that differ from it, each with small random weights of its own; dev and held-out rows."""
    folder = tmp_path_factory.mktemp("search")
    for name in ("base", "a", "b"):
        tiny.make_checkpoint(folder / name)
    base = load(folder / "base")
    for seed, name in enumerate(("a", "b"), 1):
        model, g = load(folder / name), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p, p0 in zip(model.parameters(), base.parameters()):
                p.copy_(p0 + 0.1 * torch.randn(p.shape, generator=g))
        save(model, folder / name, source=folder / "base")
    for split, numbers in (("dev", range(5)), ("held", range(5, 9))):
        tiny.write(folder / f"{split}.jsonl", [
            {"id": f"{language}-{i}", "language": language, "prompt": f"{language} {i}",
             "completion": f"{ANSWERS[language]} {i}"} for i in numbers for language in LANGUAGES])
    return folder


def by_hand(path, rows):
    """Mean log-probability of a token by language, one row at a time, from the logits."""
    model, chat, found = load(path), Chat(path), {}
    for row in rows:
        e = encode_row(chat, row["prompt"], row["completion"])
        with torch.no_grad():
            logps = model(torch.tensor([e.ids])).double().log_softmax(-1)[0]
        found.setdefault(row["language"], []).extend(
            logps[t - 1, token].item() for t, (token, trained) in enumerate(zip(e.ids, e.mask)) if trained)
    return {language: statistics.fmean(values) for language, values in found.items()}


def search(models, out, **flags):
    merge.main(merge.Config(models=[str(models / "a"), str(models / "b")], weights=["search"],
                            dev=str(models / "dev.jsonl"), held_out=str(models / "held.jsonl"), out=str(out), **flags))
    return json.loads((out / "merge_report.json").read_text(encoding="utf-8"))


def test_search_by_log_probability(models, tmp_path, capsys):
    report = search(models, tmp_path / "out", base=str(models / "base"), tries=12)
    found, dev, held = report["search"], tiny.read(models / "dev.jsonl"), tiny.read(models / "held.jsonl")
    # every recorded number, worked out another way: the parents' table, every tried point, the held-out scores
    for name in ("a", "b"):
        assert found["parents"][name] == pytest.approx(by_hand(models / name, dev), abs=1e-5)
    assert [p["weights"] for p in found["tried"][:3]] == [[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]
    even = found["tried"][0]["scores"]
    for point in found["tried"]:
        worst = min(point["scores"][l] - even[l] for l in even)
        assert point["mean"] == pytest.approx(statistics.fmean(point["scores"].values()))
        assert point["worst_change"] == pytest.approx(worst) and point["objective"] == pytest.approx(point["mean"] + worst)
    best = max(found["tried"], key=lambda p: p["objective"])
    assert found["weights"] == best["weights"] and found["lam"] == best["lam"]
    assert sorted({p["lam"] for p in found["tried"]}) == [0.25, 0.5, 0.75, 1.0, 1.25]
    assert len([p for p in found["tried"] if p["lam"] == 1.0]) <= 12
    far = next(p for p in found["tried"] if p["lam"] == 0.25)  # lambda goes into what is scored, not only into the end
    merge.main(merge.Config(models=[str(models / "a"), str(models / "b")], weights=far["weights"], lam=0.25,
                            base=str(models / "base"), out=str(tmp_path / "far")))
    assert far["scores"] == pytest.approx(by_hand(tmp_path / "far", dev), abs=1e-5)
    # the folder is the chosen point, and its held-out score is what that folder really scores
    hand = tmp_path / "hand"
    merge.main(merge.Config(models=[str(models / "a"), str(models / "b")], weights=found["weights"], lam=found["lam"],
                            base=str(models / "base"), out=str(hand)))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (hand / "model.safetensors").read_bytes()
    assert found["held_out"]["chosen"] == pytest.approx(by_hand(hand, held), abs=1e-5)
    key, = (k for k in found["held_out"] if k.startswith("best model"))
    assert found["held_out"][key] == pytest.approx(by_hand(models / key[12:-1], held), abs=1e-5)
    assert report["settings"]["weights"] == found["weights"] and report["settings"]["lam"] == found["lam"]
    printed = capsys.readouterr().out
    assert "zh-Hant" in printed and "held out:" in printed and printed.count("tried ") == len(found["tried"])


def test_search_finds_the_better_parent(models, tmp_path):
    """`a` trained on nothing, `b` = weights that score far worse: nearly all the weight goes to `a`."""
    noisy = load(models / "b")
    with torch.no_grad():
        for p in noisy.parameters():
            p.add_(2.0 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7)))
    save(noisy, tmp_path / "noisy", source=models / "base")
    merge.main(merge.Config(models=[str(models / "base"), str(tmp_path / "noisy")], weights=["search"], tries=30,
                            dev=str(models / "dev.jsonl"), held_out=str(models / "held.jsonl"), out=str(tmp_path / "out")))
    found = json.loads((tmp_path / "out" / "merge_report.json").read_text(encoding="utf-8"))["search"]
    assert found["weights"][0] > 0.8 and found["lam"] == 1.0
    mean = lambda scores: statistics.fmean(scores.values())
    assert mean(found["held_out"]["chosen"]) > mean(found["held_out"]["uniform"])


def test_search_by_reward(models, tmp_path):
    """Mean reward of greedy answers, by language, as sampling and scoring the folder gives it."""
    rm = new_reward_model(models / "base")
    with torch.no_grad():
        rm.score.weight.normal_(generator=torch.Generator().manual_seed(3))
    (tmp_path / "rm").mkdir()
    write_reward_model(tmp_path / "rm", rm, models / "base")
    found = search(models, tmp_path / "out", tries=5, reward_model=str(tmp_path / "rm"), max_new_tokens=6)["search"]
    model, chat = load(tmp_path / "out"), Chat(tmp_path / "out")
    done = complete(model, chat, tiny.read(models / "held.jsonl"), 6)
    rewards = reward_score(load_reward_model(tmp_path / "rm"), Chat(tmp_path / "rm"),
                           [(r["prompt"], r["completion"]) for r in done])
    for language in LANGUAGES:
        mine = [r for row, r in zip(done, rewards) if row["language"] == language]
        assert found["held_out"]["chosen"][language] == pytest.approx(statistics.fmean(mine), abs=1e-4)
    assert found["score"] == "mean reward of greedy answers"


@pytest.mark.parametrize("flags,said", [
    ({"dev": ""}, "--dev"), ({"held_out": ""}, "--held_out"), ({"method": "ties", "base": "base"}, "linear"),
    ({"normalize": False}, "linear"), ({"held_out": "dev"}, "share 20 prompts"), ({"dev": "nowhere"}, "not found"),
    ({"dev": "text"}, "prompt and a completion")], ids=str)
def test_searches_refused(models, tmp_path, flags, said):
    tiny.write(models / "text.jsonl", [{"language": "en", "text": "only text"}])
    flags = {k: str(models / v) if k == "base" else str(models / f"{v}.jsonl") if k in ("dev", "held_out") and v else v
             for k, v in flags.items()}
    cfg = {"dev": str(models / "dev.jsonl"), "held_out": str(models / "held.jsonl"), **flags}
    with pytest.raises(SystemExit) as e:
        merge.main(merge.Config(models=[str(models / "a"), str(models / "b")], weights=["search"],
                                out=str(tmp_path / "out"), **cfg))
    assert said in str(e.value) and "\n" not in str(e.value) and not list(tmp_path.iterdir())
