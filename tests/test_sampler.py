"""
The engine of sampling: slots that are refilled, moved and reused, what stops a completion, log-probs, and what a CUDA graph
would record.

    python -m pytest tests/test_sampler.py
"""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import common
import tiny
from chat import Chat
from generate import Stop, complete, generate, key_of
from model import Config, Transformer, load
from sampler import Sampler

cpu = tiny.cpu
HERE = Path(__file__).parent / "fixtures"
FAMILIES = ["cohere2", "gemma2", "llama", "mistral", "qwen2_window", "qwen3"]
OPTIONS = dict(temperature=1.0, top_p=0.95, samples=3, stop_ids={1, 2, 3, 4}, seed=11)


@pytest.fixture(scope="module")
def model():
    """Two sliding layers of 5 tokens and a full one."""
    return Transformer(Config(
        model_type="cohere2", vocab_size=60, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=36, logit_scale=0.7, initializer_range=0.4, sliding_window=5,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"])).init_weights(1)


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(0)
    return [[rng.randrange(60) for _ in range(n)] for n in (4, 1, 9, 4, 7, 2, 12, 5, 5, 3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_token_logps(family):
    """Of greedy and of drawn tokens, past the sliding window, with slots that are refilled."""
    net, rng = load(HERE / "families" / family, torch.float32), random.Random(3)
    asked = [[rng.randrange(5, net.cfg.vocab_size) for _ in range(n)] for n in (3, 11, 6, 1, 8)]
    for options in ({}, dict(temperature=1.3, top_p=0.8, min_p=0.01, samples=2)):
        made, logps = generate(net, asked, 14, batch_size=3, logps=True, **options)
        for prompt, row, scores in zip(asked, made, logps):
            for ids, found in zip(row, scores):
                whole = torch.tensor([prompt + ids])
                mask = torch.arange(whole.shape[1])[None] >= len(prompt)
                assert (net.token_logps(whole, mask)[0, len(prompt) - 1:] - torch.tensor(found)).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_transformers_with_slots_that_are_refilled(family):
    """Past the sliding window; what transformers said of three prompts is in the fixture (make_families.py)."""
    net, said = load(HERE / "families" / family), load_file(HERE / "families" / family / "expected.safetensors")
    row, tokens = said["ids"][0].tolist(), said["greedy"].tolist()
    asked = [row[:3], row[:9], row] * 2
    assert generate(net, asked, 12, batch_size=2) == [[t] for t in tokens] * 2


def test_slots_batches_and_order_do_not_change_a_sample(model, prompts):
    keys = [key_of(f"q{i}") for i in range(len(prompts))]
    expected = generate(model, prompts, 12, prompt_keys=keys, **OPTIONS)
    for batch_size in (1, 2, 4, 7, 29):  # fewer places than samples of one prompt, or than prompts
        assert generate(model, prompts, 12, prompt_keys=keys, batch_size=batch_size, **OPTIONS) == expected
    order = random.Random(4).sample(range(len(prompts)), len(prompts))
    mixed = generate(model, [prompts[i] for i in order], 12, prompt_keys=[keys[i] for i in order], batch_size=5, **OPTIONS)
    assert [mixed[order.index(i)] for i in range(len(prompts))] == expected
    lengths = {len(ids) for row in expected for ids in row}
    assert min(lengths) < 6 and max(lengths) == 12  # answers do end at different times


def test_no_step_has_rows_for_nothing(model, prompts, monkeypatch):
    """Waiting prompts take free places at once; at the end sequences move together."""
    rows, plain = [], Sampler.step

    def step(self):
        rows.append((self.used, sum(n > 0 for n in self.lengths)))
        return plain(self)
    monkeypatch.setattr(Sampler, "step", step)
    generate(model, prompts * 4, 30, temperature=1.0, stop_ids=set(range(6)), batch_size=8)
    used, live = (torch.tensor(column) for column in zip(*rows))
    full = 40 - 8  # while prompts wait every place is taken: with 8 places, each that is free is filled
    assert (live == 8).sum() >= full / 2 and (live >= 0.75 * used).all() and (used <= 8).all() and live[-1] >= 1


def test_what_a_slot_held_before_reaches_nobody(model, prompts):
    """Keys and values of free slots, and behind a sequence's end, are made huge before every step."""
    expected = generate(model, prompts[:4], 10, batch_size=2)
    engine, made = Sampler(model, 2, 22), {}
    for pair in ((0, 1), (2, 3)):
        for x in (*engine.cache.k, *engine.cache.v):
            x.fill_(1e4)
        slots, ids, _ = engine.add([(prompts[i], i, [0]) for i in pair])
        place = dict(zip(slots, pair))
        for _ in range(10):
            for slot, token in zip(slots, ids):
                made.setdefault(place[slot], []).append(token)
            slots, ids, _ = engine.step()
        engine.release(slots)
        assert engine.used == 0 and engine.free == [0, 1] and engine.cache.length.tolist() == [0, 0]
    assert [[made[i]] for i in range(4)] == expected


def test_logits_that_are_no_numbers_end_with_a_line(model, prompts):
    broken = Transformer(model.cfg).init_weights(1)
    with torch.no_grad():
        broken.model.embed_tokens.weight[prompts[2][3]] = float("nan")  # tied: a column of the logits, too
    with pytest.raises(SystemExit, match="logits of prompt 1 of 3 are not numbers"):
        generate(broken, prompts[2:5], 5)
    with pytest.raises(SystemExit, match="prompt 2 of 2 has no token"):
        generate(model, [[1], []], 5)


# --- stop strings ---

@pytest.mark.parametrize("kind", ["aya", "llama3", "qwen", "gemma"])
@pytest.mark.parametrize("text, stop, left", [
    ("one\n\ntwo", "\n\n", "one"), ("مرحبا بالعالم اليوم", "العالم", "مرحبا ب"), ("नमस्ते दुनिया, कैसे हो", "दुनिया", "नमस्ते "),
    ("你好世界再見", "世界", "你好"), ("ok 👩‍🚀 go", "👩‍🚀", "ok "), ("xSTOPy", "STOP", "x"), ("STOP at once", "STOP", "")])
def test_stop_strings(kind, text, stop, left):
    """A completion ends with the token that completes the string, and its text before the string."""
    chat = Chat(HERE / "chat" / kind)
    ids = [i for i in chat.encode(text) if i not in chat.stop_ids]
    over = Stop(chat.stop_ids, ["never said", stop], chat.decode)
    ends = [n for n in range(1, len(ids) + 1) if over(ids[:n])]
    assert ends, chat.decode(ids)
    assert stop in chat.decode(ids[:ends[0]]) and stop not in chat.decode(ids[:ends[0] - 1])
    assert over.cut(chat.decode(ids[:ends[0]])) == (left if chat.decode(ids).startswith(left) else left.strip(), True)
    assert over.cut("nothing of it") == ("nothing of it", False)
    assert Stop((), ["b", "", "a"]).cut("xaby") == ("x", True)


def test_completions_stop_at_strings_and_are_named_by_ids(tmp_path, monkeypatch):
    """Through complete(): the same sample whatever else is asked, in whatever place, on whichever rank."""
    tiny.make_checkpoint(tmp_path / "model")
    net, chat = load(tmp_path / "model"), Chat(tmp_path / "model")
    rows = [{"id": f"q{i}", "language": "fr", "prompt": p} for i, p in enumerate(("trois", "أربعون", "le nombre", "347"))]
    options = dict(max_new_tokens=30, temperature=1.5, samples=2, seed=3)
    plain = complete(net, chat, rows, **options)
    assert complete(net, chat, rows[::-1], **options) == [r for i in (3, 2, 1, 0) for r in plain[2 * i:2 * i + 2]]
    assert complete(net, chat, rows[2:3], **options) == plain[4:6]
    for rank in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(common, "rank", lambda rank=rank: rank)
            patch.setattr(common, "world", lambda: 2)
            patch.setattr(common, "gather_list", lambda x: x)
            assert complete(net, chat, rows, **options) == [r for i in (rank, rank + 2) for r in plain[2 * i:2 * i + 2]]
    letters = sorted({c for r in plain for c in r["completion"][3:8]} - {"\ufffd"})[:4]
    stopped = complete(net, chat, rows, stop=letters, **options)
    for before, after in zip(plain, stopped):
        ends = [before["completion"].index(c) for c in letters if c in before["completion"]]
        if ends and "\ufffd" not in before["completion"][:min(ends)]:
            assert after["completion"] == before["completion"][:min(ends)] and after["ended"]
    assert any(a["completion"] != b["completion"] for a, b in zip(plain, stopped))


# --- what a CUDA graph would record ---

class Refusing(TorchDispatchMode):
    """What may not happen while a graph is recorded: waiting for the GPU, to read a number of it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(function) and "nonzero" not in str(function), function
        return function(*args, **(kwargs or {}))


def test_a_step_is_recordable(model, prompts, monkeypatch):
    """It reads no number back, and what it leaves lies where it lay."""
    monkeypatch.setattr("model.decode", lambda q, k, v, length, **o: q)  # on a CPU decode does read one
    monkeypatch.setattr("sampler.sample", lambda logits, u, *s: (logits.argmax(-1), logits[:, 0] + u.float()))
    engine = Sampler(model, 4, 30, temperature=1.0)
    engine.add([(prompts[i], i, [0]) for i in range(3)])
    fixed = lambda: [x.data_ptr() for x in (
        engine.token, engine.logp, engine.drawn, engine.alive, engine.cache.length, *engine.cache.k, *engine.cache.v)]
    before, lengths = fixed(), engine.cache.length.tolist()
    with torch.no_grad(), Refusing():
        engine.advance(4)
    assert fixed() == before
    assert engine.cache.length.tolist() == [n + (n > 0) for n in lengths] and engine.drawn.tolist() == [2, 2, 2, 0]


def test_replayed_steps_are_the_plain_ones(model, prompts, monkeypatch):
    """replay() with stand-ins that record a call instead of kernels: buckets larger than what is in use, idle slots."""
    expected = generate(model, prompts, 12, batch_size=7, logps=True, **OPTIONS)
    recorded = []

    class Graph:
        def replay(self):
            with torch.no_grad():
                self.call()

        def pool(self):
            return None

    class recording:
        def __init__(self, graph, pool=None):
            self.graph = graph

        def __enter__(self):
            Sampler.advance = lambda engine, n, longest=None: setattr(self.graph, "call", lambda: plain(engine, n)) or (
                recorded.append(n))

        def __exit__(self, *error):
            Sampler.advance = plain

    class Stream:
        def wait_stream(self, other):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass
    plain = Sampler.advance
    for name, value in dict(CUDAGraph=Graph, graph=recording, Stream=Stream, current_stream=Stream,
                            stream=lambda side: side).items():
        monkeypatch.setattr(torch.cuda, name, value)
    step = Sampler.step

    def on_gpu(self):
        self.advance, device = (lambda n, longest=None: Sampler.advance(self, n, longest)), self.device
        self.device = torch.device("cuda")
        try:
            return step(self)
        finally:
            self.device = device
    monkeypatch.setattr(Sampler, "step", on_gpu)
    ids, logps = generate(model, prompts, 12, batch_size=7, logps=True, **OPTIONS)
    assert ids == expected[0]  # log-probs to rounding: a graph reads all places of the cache
    assert all(torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-5) for row, other in zip(logps, expected[1])
               for a, b in zip(row, other))
    assert 7 in recorded and set(recorded) <= {1, 2, 4, 7} and len(recorded) == len(set(recorded))
