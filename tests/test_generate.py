"""
Sampling: what is drawn is what softmax says, and nothing but the seed and the prompt decides which.

    python -m pytest tests/test_generate.py

The chi-square tests know what they would miss: each also rejects a distribution that is slightly wrong.
"""

import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

import generate as generate_file
import tiny
from chat import Chat
from generate import Config, Stop, complete, generate, key_of, main, pieces, stream, talk
from kernels import sample
from model import Config as ModelConfig
from model import Transformer, load
from sampler import uniforms

cpu = tiny.cpu
V = 60


@pytest.fixture(scope="module")
def model():
    return Transformer(ModelConfig(
        vocab_size=V, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=36, logit_scale=0.7, initializer_range=0.4)).init_weights(1)


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(0)
    return [[rng.randrange(V) for _ in range(n)] for n in (4, 1, 9, 4, 7, 2, 12, 5, 5, 3)]


def greedy_loop(model, prompt, max_new_tokens, stop_ids=(), vocab_size=V):
    """The definition: forward over everything, argmax, append."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        ids.append(model(torch.tensor([ids]))[0, -1, :vocab_size].argmax().item())
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt):]


# --- the numbers that decide ---

def splitmix(seed, prompt, sample, position):
    """The hash again, in Python's whole numbers."""
    z = 0
    for part in (seed, prompt, sample, position):
        z = ((z ^ part) + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
    return (z >> 11) / 2**53


def grid(n=12):
    """uniforms() of n seeds x n positions x n prompts x n samples: (n, n, n * n), seed first."""
    prompts, samples = torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)
    return np.array([[uniforms(seed, prompts, samples, position).numpy() for position in range(n)] for seed in range(n)])


def test_uniforms_are_splitmix64():
    for seed, position in ((0, 0), (3, 7), (2**63 + 5, 1000)):
        pairs = ((0, 0), (0, 1), (5, 2), (10**6, 63))
        expected = [splitmix(seed, prompt, sample, position) for prompt, sample in pairs]
        assert uniforms(seed, [0, 0, 5, 10**6], [0, 1, 2, 63], position).tolist() == expected
    negative = uniforms(1, [-5], [0], torch.tensor([3])).item()  # ids are named by 64 bits, of which one is the sign
    assert negative == splitmix(1, 2**64 - 5, 0, 3)


def test_uniforms_are_distinct_and_uniform():
    found = grid()
    assert np.unique(found).size == found.size  # no seed repeats another seed's prompts, no sample another position
    assert 0 <= found.min() and found.max() < 1
    for axis in range(4):  # within every seed, position, prompt and sample
        for part in np.moveaxis(found.reshape(12, 12, 12, 12), axis, 0):
            counts = np.histogram(part, bins=10, range=(0, 1))[0]
            assert chi_square(counts, np.full(10, 0.1)) < limit(9)
    a = found.reshape(12, 12, 12, 12) - 0.5
    for axis in range(4):  # and neighbours along every axis know nothing of each other
        x, y = np.moveaxis(a, axis, 0)[:-1].ravel(), np.moveaxis(a, axis, 0)[1:].ravel()
        assert abs((x * y).mean() * 12) < 5 / np.sqrt(x.size)


def chi_square(counts, probs):
    """sum (observed - expected)^2 / expected over the cells that can occur; infinite if another one did."""
    counts, expected = np.asarray(counts, dtype=float), np.asarray(probs) * np.sum(counts)
    if counts[expected == 0].any():
        return np.inf
    cells = expected > 0
    return ((counts - expected)[cells] ** 2 / expected[cells]).sum()


def limit(df):
    """About one in a million for what is right: mean df, variance 2 df."""
    return df + 6 * np.sqrt(2 * df)


def test_inverse_transform_by_hand():
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]])).expand(7, 3)
    u = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 0.99, 1 - 2**-53], dtype=torch.float64)
    draw = lambda *settings: sample(logits, u, 3, *settings)[0].tolist()
    assert draw(1.0) == [0, 0, 1, 1, 2, 2, 2]
    assert draw(0.0) == [1] * 7
    # top_p 0.6 keeps 0.5 and 0.3 (0.5 alone is too little); the bound between them is 0.5 / 0.8
    assert draw(1.0, 0.6) == [1, 1, 1, 2, 2, 2, 2]
    assert draw(1.0, 0.49) == [1] * 7  # the likeliest token alone
    # min_p 0.5 drops what is less than half as likely as 0.5; with top_p, what either drops
    assert draw(1.0, 1.0, 0.5) == [1, 1, 1, 2, 2, 2, 2]
    assert draw(1.0, 1.0, 0.7) == [1] * 7 and draw(1.0, 0.6, 0.7) == [1] * 7 and draw(1.0, 0.9, 0.3) == [0, 0, 1, 1, 2, 2, 2]
    # temperature 0.5 squares the odds: 4, 25, 9 of 38
    u = torch.tensor([0.105, 0.106, 0.763, 0.764, 0.9, 0.9, 0.9])
    assert draw(0.5) == [0, 1, 1, 2, 2, 2, 2]


def test_tokens_that_cannot_occur_are_never_drawn():
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.0, -torch.inf]]).expand(2000, 5)
    found, _ = sample(logits, torch.from_numpy(np.linspace(0, 1, 2000, endpoint=False)), 5, 1.0)
    assert found.unique().tolist() == [1, 3] and found[0] == 1


def nucleus(probs, top_p):
    """The smallest set of likeliest tokens that holds top_p, renormalised; token by token."""
    kept, mass = np.zeros(len(probs)), 0.0
    for i in sorted(range(len(probs)), key=lambda i: -probs[i]):
        if mass >= top_p:
            break
        kept[i], mass = probs[i], mass + probs[i]
    return kept / kept.sum()


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.7, 1.0), (1.0, 0.8), (0.7, 0.5)])
def test_samples_follow_the_distribution(model, temperature, top_p):
    """12,000 samples of the first token of one prompt, and of the second token after the commonest first one."""
    prompt = [7, 3, 40]
    made = [tuple(ids) for ids in generate(model, [prompt], 2, temperature, top_p, samples=12000, seed=5)[0]]

    def check(context, drawn):
        def expected(temperature, top_p):
            logits = model(torch.tensor([context]))[0, -1].detach().double()
            return nucleus((logits / temperature).softmax(-1).numpy(), top_p)

        probs = expected(temperature, top_p)
        counts = np.bincount(drawn, minlength=V)
        rare = probs < 5 / len(drawn)  # cells with small expectations are joined
        observed = np.append(counts[~rare], counts[rare & (probs > 0)].sum())
        assert counts[probs == 0].sum() == 0
        bound = limit(len(observed) - 1)

        def statistic(p):
            p = np.append(p[~rare], p[rare & (probs > 0)].sum())
            return chi_square(observed, p / p.sum())

        assert statistic(probs) < bound
        return statistic(expected(temperature * 1.25, top_p)), bound

    wrong, bound = check(prompt, [ids[0] for ids in made])
    assert wrong > bound  # a temperature that is 25 % off would have been noticed
    first = max({ids[0] for ids in made}, key=lambda t: sum(ids[0] == t for ids in made))
    check([*prompt, first], [ids[1] for ids in made if ids[0] == first])


# --- invariances ---

@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_greedy_is_the_argmax_loop(model, prompts, batch_size):
    expected = [[greedy_loop(model, p, 8)] for p in prompts]
    assert generate(model, prompts, 8, batch_size=batch_size) == expected
    assert len({tuple(e[0]) for e in expected}) == len(prompts)  # the prompts do matter


def test_greedy_with_stop_ids_and_fewer_words(model, prompts):
    plain = [greedy_loop(model, p, 12) for p in prompts]
    stops = {plain[0][2], plain[2][5], plain[5][0]}
    expected = [[greedy_loop(model, p, 12, stops)] for p in prompts]
    assert len({len(e[0]) for e in expected}) > 3
    for batch_size in (2, 256):
        assert generate(model, prompts, 12, stop_ids=stops, batch_size=batch_size) == expected
    for completion, in expected:
        assert len(completion) == 12 or completion[-1] in stops
        assert not stops.intersection(completion[:-1])

    fewer = generate(model, prompts, 8, vocab_size=20)
    assert fewer == [[greedy_loop(model, p, 8, vocab_size=20)] for p in prompts]
    sampled = generate(model, prompts, 8, temperature=2.0, samples=20, vocab_size=20)
    assert max(t for row in sampled for ids in row for t in ids) == 19
    assert max(t for row in generate(model, prompts, 8, temperature=2.0, samples=20) for ids in row for t in ids) > 19


def test_samples_do_not_depend_on_the_batch(model, prompts):
    options = dict(temperature=1.0, top_p=0.95, samples=3, stop_ids={1, 2, 3, 4, 5, 6}, seed=11)
    expected = generate(model, prompts, 10, **options)
    for batch_size in (1, 2, 7):  # prompts alone, with some others, with all
        assert generate(model, prompts, 10, batch_size=batch_size, **options) == expected
    order = random.Random(3).sample(range(len(prompts)), len(prompts))
    shuffled = generate(model, [prompts[i] for i in order], 10, prompt_keys=order, **options)
    assert [shuffled[order.index(i)] for i in range(len(prompts))] == expected
    for i in (0, 6):
        assert generate(model, [prompts[i]], 10, prompt_keys=[i], **options) == [expected[i]]
    assert [row[:2] for row in expected] == generate(model, prompts, 10, **options | {"samples": 2})
    assert [[ids[:4] for ids in row] for row in expected] == generate(model, prompts, 4, **options)


def test_seeds_samples_and_equal_prompts_differ(model):
    prompts = [[5, 6, 7]] * 4
    options = dict(temperature=1.5, samples=4)
    once = generate(model, prompts, 10, seed=1, **options)
    assert generate(model, prompts, 10, seed=1, **options) == once
    drawn = [tuple(ids) for seed in range(4) for row in generate(model, prompts, 10, seed=seed, **options)
             for ids in row]
    assert len(set(drawn)) == len(drawn) == 64  # no seed repeats another seed's samples under other prompts
    torch.manual_seed(9)  # the global generator is not asked, nor moved
    before = torch.get_rng_state()
    assert generate(model, prompts, 10, seed=1, **options) == once and torch.equal(torch.get_rng_state(), before)


def test_finished_rows_leave_the_batch(model, prompts, monkeypatch):
    sizes, plain = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, **o: sizes.append(ids.shape[0]) or plain(ids, **o))
    made = generate(model, prompts, 60, temperature=1.0, samples=20, stop_ids=set(range(6)))
    lengths = np.array([len(ids) for row in made for ids in row])
    assert lengths.max() > 20 and len(sizes) == lengths.max()  # the prefill, then one step a token, none in vain
    for step, size in enumerate(sizes[1:], 1):
        assert size * 0.75 <= (lengths > step).sum()  # at most a quarter of the rows has ended


def test_ill_requests(model):
    for options in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"samples": 0}, {"max_new_tokens": 0}):
        with pytest.raises(SystemExit, match="error: sampling needs"):
            generate(model, [[1]], **{"max_new_tokens": 3} | options)
    assert generate(model, [], 3) == []


# --- rows and the command line ---

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    tiny.make_checkpoint(folder / "model", vocab_size=310)  # ten more embeddings than tokens
    prompts = ["trois cent", "أربعون", [{"role": "user", "content": "Write"}], "le nombre", "347"]
    tiny.write(folder / "prompts.jsonl", [{"id": f"q{i}", "language": ("fr", "ar")[i % 2], "prompt": p, "extra": i}
                                          for i, p in enumerate(prompts)])
    return folder


def test_command_line(folder):
    out = folder / "deep" / "out.jsonl"
    done = tiny.script("generate.py", "--model", folder / "model", "--prompts", folder / "prompts.jsonl", "--out", out,
                       "--max_new_tokens", 30, "--temperature", 1.5, "--samples", 3, "--seed", 4, "--batch_size", 4)
    rows = tiny.read(out)
    assert [(r["id"], r["sample"]) for r in rows] == [(f"q{i}", k) for i in range(5) for k in range(3)]
    assert all(set(r) == {"id", "language", "prompt", "completion", "teacher", "sample", "ended", "tokens"} for r in rows)
    assert {r["teacher"] for r in rows} == {"model"}
    assert rows[6]["prompt"] == [{"role": "user", "content": "Write"}]
    cut_off = sum(not r["ended"] for r in rows)
    assert 0 < cut_off and f"15 completions of 5 prompts -> {out} ({cut_off} cut off at 30 tokens)" in done.stdout

    chat, model = Chat(folder / "model"), load(folder / "model")
    prompts = [chat.prompt_ids(r["prompt"]) for r in tiny.read(folder / "prompts.jsonl")]
    drawn = generate(model, prompts, 30, 1.5, samples=3, stop_ids={chat.end}, seed=4, vocab_size=chat.vocab_size,
                     prompt_keys=[key_of(f"q{i}") for i in range(5)])
    expected = [(chat.decode(ids), ids[-1] == chat.end) for row in drawn for ids in row]
    assert [(r["completion"], r["ended"]) for r in rows] == expected
    assert not any(token in r["completion"] for r in rows for token in ("<|", "<PAD>", "<BOS_TOKEN>"))


def test_padded_embeddings_are_never_drawn(folder, monkeypatch):
    """The tokenizer has fewer words than the embedding has rows: complete() says so to generate()."""
    chat, seen = Chat(folder / "model"), []
    plain = generate_file.generate
    monkeypatch.setattr(generate_file, "generate", lambda *a: seen.append(plain(*a)) or seen[-1])
    complete(load(folder / "model"), chat, tiny.read(folder / "prompts.jsonl"), 40, 5.0, samples=40)
    assert chat.vocab_size < 310
    assert max(t for row in seen[0] for ids in row for t in ids) < chat.vocab_size


@pytest.mark.parametrize("changes, words", [
    ({"model": "http://localhost:8000#x"}, "an endpoint's address"), ({"model": "{folder}/none"}, "none not found"),
    ({"prompts": "{folder}/none.jsonl"}, "none.jsonl not found"), ({"prompts": "{folder}/bad.jsonl"}, "bad.jsonl:2"),
    ({"languages": ["de"]}, "no prompt in de")])
def test_refusals(folder, changes, words):
    (folder / "bad.jsonl").write_text('{"id":"a","language":"fr","prompt":"x"}\n{"id":"b","language":"fr"}\n')
    settings = {"model": "{folder}/model", "prompts": "{folder}/prompts.jsonl"} | changes
    settings = {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in settings.items()}
    with pytest.raises(SystemExit) as e:
        main(Config(out=str(folder / "refused.jsonl"), **settings))
    assert words in str(e.value) and "\n" not in str(e.value) and not (folder / "refused.jsonl").exists()


# --- a chat in the terminal ---

@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_stream_is_what_generate_returns(model, prompts, temperature):
    for seed, prompt in enumerate(prompts[:5]):
        options = dict(temperature=temperature, top_p=0.9, stop_ids={7, 8, 9}, seed=seed, vocab_size=V // 2)
        expected = generate(model, [prompt], 25, **options)[0][0]
        assert list(stream(model, prompt, 25, **options)) == expected and max(expected) < V // 2


@pytest.mark.parametrize("kind", ["aya", "llama3", "qwen", "gemma", "mistral", "cohere2"])
def test_pieces_are_whole_characters_and_the_whole_text(kind):
    chat = Chat(Path(__file__).parent / "fixtures" / "chat" / kind)
    for text in ("می\u200cروم به خانه", "שָׁלוֹם עולם!", "नमस्ते दुनिया", "繁體與简体", "e\u0301 👩\u200d🚀 ok", "\u200fمرحبا (3)", "x"):
        ids = chat.completion_ids(text)
        seen = list(pieces(chat, iter(ids)))
        assert "".join(seen) == chat.decode(ids) and not any("\ufffd" in piece for piece in seen), text
        assert chat.decode(ids) in (text.strip(), unicodedata.normalize("NFC", text.strip()))  # some tokenizers do that
    cut = chat.completion_ids("日本")[:1]  # an answer that is cut off inside a character is shown all the same
    assert "".join(pieces(chat, iter(cut))) == chat.decode(cut)


def typed(monkeypatch, *lines):
    """What a person types, then Ctrl-D."""
    lines = iter(lines)

    def next_line(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None
    monkeypatch.setattr("builtins.input", next_line)
    for file in (sys.stdin, sys.stdout):  # pytest's have no reconfigure
        monkeypatch.setattr(file, "reconfigure", lambda **k: None, raising=False)


def test_chat_remembers_resets_and_takes_a_system_prompt(folder, monkeypatch, capsys):
    chat, net, asked = Chat(folder / "model"), load(folder / "model"), []
    monkeypatch.setattr(generate_file, "stream", lambda model, prompt, *a: asked.append(prompt) or iter(
        chat.completion_ids(f"answer {len(asked)}")))
    typed(monkeypatch, "trois", "", "cent", "/system be brief", "أربعون", "/reset", "347", "/what", "/system", "x")
    talk(net, chat, Config(model="m"))
    user, said = (lambda text: {"role": "user", "content": text}), (lambda text: {"role": "assistant", "content": text})
    system = {"role": "system", "content": "be brief"}
    assert asked == [chat.prompt_ids(messages) for messages in (
        [user("trois")], [user("trois"), said("answer 1"), user("cent")], [system, user("أربعون")],
        [system, user("347")], [user("x")])]
    shown = capsys.readouterr().out
    assert shown.count("/reset forgets") == 2 and "answer 5" in shown and "(cut off" not in shown


def test_chat_goes_on_after_ctrl_c_and_after_a_refusal(folder, monkeypatch, capsys):
    chat, asked = Chat(Path(__file__).parent / "fixtures" / "chat" / "gemma"), []  # its template knows no system turn

    def interrupted(model, prompt, *a):
        asked.append(prompt)
        yield from chat.completion_ids("this much of it")[:3]
        if len(asked) == 1:
            raise KeyboardInterrupt
    monkeypatch.setattr(generate_file, "stream", interrupted)
    typed(monkeypatch, "/system x", "hello", "/system", "hello", "again")
    talk(load(folder / "model"), chat, Config(model="m", max_new_tokens=3))
    shown = capsys.readouterr().out
    assert "error: " in shown and "(stopped)" in shown and "(cut off at 3 tokens" in shown and len(asked) == 2
    partial = chat.decode(chat.completion_ids("this much of it")[:3])
    assert asked[1] == chat.prompt_ids([{"role": "user", "content": "hello"}, {"role": "assistant", "content": partial},
                                        {"role": "user", "content": "again"}])


def test_chat_from_the_command_line(folder):
    """Bytes in, bytes out, in a locale that is not UTF-8."""
    net, chat = load(folder / "model"), Chat(folder / "model")
    done = subprocess.run([sys.executable, "generate.py", "--model", str(folder / "model"), "--max_new_tokens", "12"],
                          cwd=tiny.ROOT, input="ثلاثمائة وسبعة\n".encode(), capture_output=True, timeout=120,
                          env=tiny.environment() | {"PYTHONIOENCODING": "latin-1"})
    ids = generate(net, [chat.prompt_ids("ثلاثمائة وسبعة")], 12, stop_ids=chat.stop_ids, vocab_size=chat.vocab_size)[0][0]
    assert done.returncode == 0, done.stderr.decode()
    assert chat.decode(ids) in done.stdout.decode("utf-8") and b"Traceback" not in done.stderr
