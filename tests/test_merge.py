"""
merge.py against numbers worked out by hand, a second implementation in numpy float64, invariances and refusals.
Run: python -m pytest tests/test_merge.py        (kills, damaged files and memory: tests/test_merge_attack.py)
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import merge  # noqa: E402
import merge_methods as methods  # noqa: E402
import merge_stream  # noqa: E402

CONFIG = {"model_type": "cohere", "architectures": ["CohereForCausalLM"], "vocab_size": 37, "hidden_size": 12,
          "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 20,
          "layer_norm_eps": 1e-5, "rope_theta": 10000.0, "logit_scale": 0.125, "torch_dtype": "bfloat16"}
TOKENIZER = {"version": "1.0", "padding": None, "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2},
                                                          "merges": ["a b"]}}
SHAPES = {"model.embed_tokens.weight": (37, 12), "model.layers.0.self_attn.q_proj.weight": (12, 12),
          "model.layers.0.mlp.up_proj.weight": (20, 12), "model.layers.0.input_layernorm.weight": (12,),
          "model.layers.1.mlp.down_proj.weight": (12, 20), "model.norm.weight": (12,)}
METHODS = {"linear": {}, "slerp": {"t": 0.3}, "ties": {"density": 0.5}, "dare_ties": {"density": 0.5}}


def state(seed, dtype=torch.bfloat16, step=0.0, base=None):
    """Random tensors of SHAPES; with base: base + N(0, step)."""
    g = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    return {name: (x * 0.1 if base is None else base[name].float() + step * x).to(dtype) for name, x in noise.items()}


def write(folder, tensors, shards=1, config=None, tokenizer=TOKENIZER, remove=()):
    """A checkpoint folder as Hugging Face's libraries write it."""
    folder.mkdir(parents=True)
    config = {k: v for k, v in {**CONFIG, **(config or {})}.items() if k not in remove}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    if tokenizer:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        weight_map |= {name: file for name in names[i::shards]}
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read(folder):
    return {name: x for file in sorted(Path(folder).glob("*.safetensors")) for name, x in load_file(file).items()}


def run(out, models, **settings):
    """merge.main in this process -> the tensors that were written."""
    merge.main(merge.Config(models=[str(m) for m in models], out=str(out),
                            **{k: str(v) if k == "base" else v for k, v in settings.items()}))
    return read(out)


def refused(match, out, models, **settings):
    """The merge ends with one line that holds every word of `match`, and leaves nothing behind."""
    before = sorted(os.listdir(out.parent))
    with pytest.raises(SystemExit) as e:
        run(out, models, **settings)
    message = str(e.value)
    assert message.startswith("error: ") and "\n" not in message, message
    for word in match.split("|"):
        assert word in message, message
    assert sorted(os.listdir(out.parent)) == before


@pytest.fixture
def family(tmp_path):
    """A base and three models fine-tuned from it, bf16, the second one in three shards."""
    base = state(0)
    write(tmp_path / "base", base, shards=2)
    for i, (name, shards) in enumerate([("a", 2), ("b", 3), ("c", 1)]):
        write(tmp_path / name, state(i + 1, step=0.02, base=base), shards=shards)
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------------
# a second implementation, in numpy float64, from the formulas of the papers

def np_linear(xs, ws, normalize=True):
    total = sum(w * x for x, w in zip(xs, ws))
    return total / sum(ws) if normalize else total


def np_slerp(a, b, t):
    u, v = a.ravel() / np.linalg.norm(a), b.ravel() / np.linalg.norm(b)
    dot = float(np.clip(u @ v, -1, 1))
    if abs(dot) > 0.9995:
        return (1 - t) * a + t * b
    omega = math.acos(dot)
    return (math.sin((1 - t) * omega) * a + math.sin(t * omega) * b) / math.sin(omega)


def np_trim(delta, density):
    if not delta.size:
        return delta
    least = np.sort(np.abs(delta).astype(np.float32).ravel())[::-1][max(1, int(density * delta.size)) - 1]
    return np.where(np.abs(delta).astype(np.float32) >= least, delta, 0.0)


def np_elect(deltas, ws, normalize=True):
    """Element by element, as one reads it in the paper."""
    out = np.zeros(deltas[0].size)
    for j in range(out.size):
        terms = [(w * d.ravel()[j], w) for d, w in zip(deltas, ws)]
        sign = 1 if sum(x for x, _ in terms) >= 0 else -1
        agree = [(x, w) for x, w in terms if x * sign > 0]
        divisor = sum(w for _, w in agree) if normalize else 1
        out[j] = sum(x for x, _ in agree) / (divisor or 1)
    return out.reshape(deltas[0].shape)


def np_ties(base, xs, ws, density, lam=1.0, normalize=True):
    return base + lam * np_elect([np_trim(x - base, density) for x in xs], ws, normalize)


def np_dare_ties(base, xs, ws, masks, density, lam=1.0, normalize=True):
    return base + lam * np_elect([(x - base) * m / density for x, m in zip(xs, masks)], ws, normalize)


def mask(seed, model, name, shape, density):
    return methods.mask(seed, model, name, 0, math.prod(shape), density).view(shape).numpy()


def rounded_once(got, want, dtype):
    """got is the float64 value rounded to dtype, up to the error of the arithmetic: 2e-6 in fp32, 1e-12 in fp64."""
    want = torch.from_numpy(want)
    slack = (2e-6 if dtype.itemsize == 2 else 1e-12) * want.abs().max() if want.numel() else 0.0
    right = (got >= (want - slack).to(dtype)) & (got <= (want + slack).to(dtype))
    assert right.all(), f"{(~right).sum()} of {right.numel()}, largest error {(got.double() - want).abs().max()}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method,settings", [("slerp", {})] + [
    (method, settings) for method in ("linear", "ties", "dare_ties") for settings in (
        {"weights": [1.0, 1.0, 1.0]}, {"weights": [0.5, 0.3, 0.2]}, {"weights": [2.0, -0.5, 1.0]},
        {"weights": [1.0, 1.0, 1.0], "normalize": False}, {"weights": [1.0, -1.0, 0.5], "normalize": False})], ids=str)
def test_every_method_against_numpy(tmp_path, monkeypatch, method, settings, dtype):
    """Whole merges of odd shapes, many chunks a tensor, against float64; the written value is the rounded one."""
    monkeypatch.setattr(merge_stream, "CHUNK", 64)
    base = state(0, dtype)
    states = [state(i, dtype, 0.02, base) for i in (1, 2, 3)]
    if method == "slerp":
        states = [states[0], state(9, dtype)]  # far enough apart for an angle
    folders = [write(tmp_path / f"m{i}", s) for i, s in enumerate(states)]
    write(tmp_path / "base", base)
    lam = {} if method in ("linear", "slerp") else {"lam": 0.7, "seed": 5}
    got = run(tmp_path / "out", folders, method=method, base=tmp_path / "base", **METHODS[method], **settings, **lam)
    assert got.keys() == base.keys()
    for name, x in got.items():
        xs, b = [s[name].double().numpy() for s in states], base[name].double().numpy()
        w, normalize = settings.get("weights"), settings.get("normalize", True)
        if method == "linear":
            want = np_linear(xs, w, normalize)
        elif method == "slerp":
            want = np_slerp(*xs, 0.3)
        elif method == "ties":
            want = np_ties(b, xs, w, 0.5, 0.7, normalize)
        else:
            masks = [mask(5, f"m{i}", name, b.shape, 0.5) for i in range(3)]
            want = np_dare_ties(b, xs, w, masks, 0.5, 0.7, normalize)
        assert x.dtype == dtype and x.shape == base[name].shape
        rounded_once(x, want, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# numbers worked out by hand

def t(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


def test_linear_by_hand():
    assert methods.linear([t(1.0, 2.0), t(3.0, 6.0)], [1, 3]).tolist() == [2.5, 5.0]
    assert methods.linear([t(1.0, 2.0), t(3.0, 6.0)], [1, 3], normalize=False).tolist() == [10.0, 20.0]
    assert methods.linear([t(1.0), t(7.0)], [2, -1]).tolist() == [-5.0]
    assert methods.linear([t(1.0), t(math.nan)], [2, 0]).tolist() == [1.0]
    out = methods.linear([t(1.0, dtype=torch.bfloat16), t(1.0078125, dtype=torch.bfloat16)], [1, 1])
    assert out.dtype == torch.float32 and out.item() == 1.00390625  # between two bf16 numbers: not rounded yet


def test_linear_rounds_once():
    """The mean of three bf16 numbers is the correctly rounded one; multiplying by 1/3 in bf16 misses a quarter."""
    g = torch.Generator().manual_seed(0)
    xs = [(torch.randn(200_000, generator=g) * 0.02).to(torch.bfloat16) for _ in range(3)]
    right = (sum(x.double() for x in xs) / 3).to(torch.bfloat16)
    assert torch.equal(methods.linear(xs, [1, 1, 1]).to(torch.bfloat16), right)
    assert (sum(x * (1 / 3) for x in xs) != right).float().mean() > 0.1


def test_slerp_by_hand():
    root = math.sqrt(0.5)
    torch.testing.assert_close(methods.slerp(t(1.0, 0.0), t(0.0, 1.0), 0.5), t(root, root))
    torch.testing.assert_close(methods.slerp(t(1.0, 0.0), t(0.0, 1.0), 1 / 3), t(math.sqrt(3) / 2, 0.5))
    # lengths are left as they are: |a| 1, |b| 3, orthogonal, halfway -> (1, 3) / sqrt(2), of length sqrt(5)
    out = methods.slerp(t(1.0, 0.0), t(0.0, 3.0), 0.5)
    torch.testing.assert_close(out, t(root, 3 * root))
    assert out.norm().item() == pytest.approx(math.sqrt(5))
    assert methods.slerp(t(2.0, 0.0), t(4.0, 0.0), 0.25).tolist() == [2.5, 0.0]  # parallel: lerp
    assert methods.slerp(t(1.0, 0.0), t(-1.0, 0.0), 0.25).tolist() == [0.5, 0.0]  # antipodal: lerp too
    assert methods.slerp(t(0.0, 0.0), t(2.0, 4.0), 0.5).tolist() == [1.0, 2.0]  # no angle: lerp
    whole = methods.slerp(t([1.0, 2.0], [3.0, 4.0]), t([0.0, 1.0], [-1.0, 0.5]), 0.4)  # a matrix is one vector
    torch.testing.assert_close(whole.flatten(), methods.slerp(t(1.0, 2.0, 3.0, 4.0), t(0.0, 1.0, -1.0, 0.5), 0.4))
    for cosine, lerp in ((0.9996, True), (0.9994, False)):  # the border
        a, b = t(1.0, 0.0, dtype=torch.float64), t(cosine, math.sqrt(1 - cosine ** 2), dtype=torch.float64) * 2
        assert (methods.slerp(a, b, 0.5) == 0.5 * a + 0.5 * b).all().item() == lerp


def test_slerp_ends():
    a, b = t(-0.0, 0.3, 1.7), t(2.0, -0.1, -0.0)
    for x, y in ((methods.slerp(a, b, 0.0), a), (methods.slerp(a, b, 1.0), b)):
        assert torch.equal(x.view(torch.int32), y.view(torch.int32))


def test_ties_by_hand():
    """
    Deltas (4, -3, 1, 2), (-1, -2, 5, -2), (3, 1, -2, -1); half of each is kept: (4, -3, 0, 0), (0, -2, 5, -2) as the
    two 2s tie, (3, 0, -2, 0). Signs + - + -; means over those that agree: 3.5, -2.5, 5, -2.
    """
    base = t(10.0, 20.0, 30.0, 40.0)
    xs = [base + t(4.0, -3.0, 1.0, 2.0), base + t(-1.0, -2.0, 5.0, -2.0), base + t(3.0, 1.0, -2.0, -1.0)]
    assert methods.ties(base, xs, [1, 1, 1], 0.5).tolist() == [13.5, 17.5, 35.0, 38.0]
    assert methods.ties(base, xs, [1, 1, 1], 0.5, lam=2.0).tolist() == [17.0, 15.0, 40.0, 36.0]
    assert methods.ties(base, xs, [1, 1, 1], 0.5, normalize=False).tolist() == [17.0, 15.0, 35.0, 38.0]
    # weights 1 1 3: the third outvotes the second on the third element (5 - 6 < 0); first: (4 + 9) / 4
    assert methods.ties(base, xs, [1, 1, 3], 0.5).tolist() == [13.25, 17.5, 28.0, 38.0]
    # density 1 keeps all: sums 6, -4, 4, -1; means 7/2, -5/2, (1 + 5)/2, (-2 - 1)/2
    assert methods.ties(base, xs, [1, 1, 1], 1.0).tolist() == [13.5, 17.5, 33.0, 38.5]


def test_ties_elects_by_mass_not_votes_and_plus_on_zero():
    base = t(0.0, 0.0)
    xs = [t(-5.0, 2.0), t(2.0, -2.0), t(2.0, 0.0)]
    assert methods.ties(base, xs, [1, 1, 1], 1.0).tolist() == [-5.0, 2.0]  # two of three vote +, the mass is -; 0 is +


def test_ties_keeps_the_largest_always_one():
    base, x = torch.zeros(10), torch.arange(1.0, 11.0)
    for density, kept in ((0.01, 1), (0.1, 1), (0.25, 2), (0.5, 5), (1.0, 10)):
        assert (methods.ties(base, [x], [1.0], density) != 0).sum() == kept
    tied = t(1.0, 1.0, 1.0, 2.0)
    assert methods.ties(torch.zeros(4), [tied], [1.0], 0.5).tolist() == tied.tolist()  # all that tie with the k-th stay


def test_trim_threshold_is_the_kth_magnitude():
    """Exactly, on dense ties (bf16), tiny, huge and zero values, for every k."""
    g = torch.Generator().manual_seed(1)
    for x in (torch.randn(5000, generator=g), torch.randn(5000, generator=g).to(torch.bfloat16).float(),
              torch.randn(300, generator=g) * 1e-42, torch.randn(300, generator=g) * 1e38, torch.zeros(50),
              torch.cat([torch.zeros(40), torch.ones(3)]), t(-3.0)):
        ordered = x.abs().sort(descending=True).values
        for k in {1, min(2, len(x)), max(1, len(x) // 3), max(1, len(x) // 2), max(1, len(x) - 1), len(x)}:
            density = (k + 0.5) / len(x) if k < len(x) else 1.0
            assert methods.trim_threshold(x, density) == ordered[k - 1].item()
    assert methods.trim_threshold(torch.zeros(0), 0.5) == 0.0


def test_a_threshold_whose_bracket_was_guessed_wrong(tmp_path, monkeypatch):
    """
    The first runs of a tensor, all that the sample sees, moved a thousand times as far as the rest: the exact pass must
    notice, and the threshold is still the k-th. Also where most of a delta is 0, and where one number is all there is.
    """
    for name, value in (("CHUNK", 64), ("SPAN", 256), ("RUN", 64), ("SAMPLE", 1024)):
        monkeypatch.setattr(merge_stream, name, value)
    plain, passes = merge_stream.scan, []
    monkeypatch.setattr(merge_stream, "scan", lambda pool, plan, names, f, *a: passes.append(f.__name__) or plain(
        pool, plan, names, f, *a))
    n, g = 2048, torch.Generator().manual_seed(2)
    base = torch.zeros(n)
    cases = {"far": torch.randn(n, generator=g), "zeros": torch.zeros(n), "one": torch.full((n,), 0.25)}
    for begin in range(0, n, 128):
        cases["far"][begin:begin + 64] *= 1000
    cases["zeros"][5] = 1.0
    write(tmp_path / "base", {f"model.{k}": base.clone() for k in cases})
    write(tmp_path / "m", {f"model.{k}": x for k, x in cases.items()})
    got = run(tmp_path / "out", [tmp_path / "m"], method="ties", base=tmp_path / "base", density=0.3)
    for k, x in cases.items():
        assert np.array_equal(got[f"model.{k}"].numpy(), np_trim(x.numpy(), 0.3).astype(np.float32)), k
    assert passes == ["scan_coarse", "scan_bracket"] * 2


def test_dare_by_hand():
    delta, kept = torch.arange(1.0, 9.0), t(1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0)
    assert methods.dare(delta, 0.25, kept).tolist() == [4.0, 0.0, 0.0, 16.0, 0.0, 24.0, 28.0, 0.0]
    assert methods.mask(0, "a", "w", 0, 8, 1.0).tolist() == [1.0] * 8


def test_dare_ties_has_no_second_trim():
    """Density 1 drops nothing: all deltas count, small ones too."""
    base, xs = torch.zeros(4), [t(1.0, 2.0, 3.0, -4.0), t(3.0, 2.0, -1.0, -2.0)]
    masks = [methods.mask(0, m, "w", 0, 4, 1.0) for m in "ab"]
    assert methods.dare_ties(base, xs, [1, 1], 1.0, masks).tolist() == [2.0, 2.0, 3.0, -3.0]


# ---------------------------------------------------------------------------------------------------------------------
# DARE's chance

def test_dare_keeps_the_stated_share_and_is_unbiased():
    """n draws: keep rate within 5 standard errors of density, mean of the output within 5 of the delta's."""
    n = 400_000
    for density in (0.1, 0.3, 0.53, 0.9):
        out = methods.dare(torch.ones(n), density, methods.mask(7, "m", f"w{density}", 0, n, density))
        rate = (out != 0).double().mean().item()
        error = math.sqrt(density * (1 - density) / n)
        assert abs(rate - density) < 5 * error
        assert abs(out.double().mean().item() - 1) < 5 * error / density
        assert set(out.unique().tolist()) == {0.0, t(1.0).div(density).item()}  # 1 / density, not a ratio of norms
    few = torch.stack([methods.dare(t(1.0, -2.0), 0.5, methods.mask(s, "m", "w", 0, 2, 0.5)) for s in range(4000)])
    assert (few.mean(0) - t(1.0, -2.0)).abs().max() < 0.16  # small tensors too: 5 standard errors of the larger


def test_dare_masks_are_independent():
    n = 100_000
    masks = {key: torch.from_numpy(mask(*key, (n,), 0.5)) for key in
             [(0, "a", "w"), (1, "a", "w"), (0, "b", "w"), (0, "a", "v")]}
    keys = list(masks)
    for i, x in enumerate(keys):
        for y in keys[:i]:
            assert abs((masks[x] == masks[y]).float().mean().item() - 0.5) < 0.01, (x, y)
    for lag in range(1, 9):  # nor are neighbours, eight of which come from one step of the generator
        assert abs((masks[keys[0]][lag:] == masks[keys[0]][:-lag]).float().mean().item() - 0.5) < 0.01, lag
    # weights that were made with manual_seed(7) are not correlated with the masks of seed 7
    made = torch.rand(n, generator=torch.Generator().manual_seed(7))
    assert abs(np.corrcoef(made, mask(7, "a", "w", (n,), 0.5))[0, 1]) < 0.02


def test_dare_mask_depends_on_seed_model_and_tensor_only(family, monkeypatch):
    """Not on order, chunks, other models or where the folders lie."""
    base = dict(method="dare_ties", base=family / "base", density=0.5)
    one = run(family / "o1", [family / "a", family / "b"], weights=[1.0, 2.0], **base)

    def same(other, equal=True):
        assert equal == all(torch.equal(one[k], other[k]) for k in one)

    same(run(family / "o2", [family / "b", family / "a"], weights=[2.0, 1.0], **base))
    same(run(family / "o3", [family / "a", family / "b", family / "c"], weights=[1.0, 2.0, 0.0], **base))
    (family / "deep").mkdir()
    (family / "deep" / "a").symlink_to(family / "a")
    same(run(family / "o4", [family / "deep" / "a", family / "b"], weights=[1.0, 2.0], **base))
    same(run(family / "o5", [family / "a", family / "b"], weights=[1.0, 2.0], seed=1, **base), equal=False)
    monkeypatch.setattr(merge_stream, "CHUNK", 7)
    same(run(family / "o6", [family / "a", family / "b"], weights=[1.0, 2.0], **base))


def test_mask_of_a_chunk_is_that_part_of_the_whole():
    """For every place and length, across the eights that the generator makes at once; 0.1 of a word is its low end."""
    whole = methods.mask(3, "m", "w", 0, 100, 0.3)
    for begin in range(0, 40):
        for end in (begin, begin + 1, begin + 7, begin + 8, begin + 9, 100):
            assert torch.equal(methods.mask(3, "m", "w", begin, end, 0.3), whole[begin:end]), (begin, end)
    # past 2**32 elements as well: an embedding of 256,000 x 8192 has 2**31, and nothing is counted in 32 bits
    far = 1 << 40
    assert torch.equal(methods.mask(3, "m", "w", far + 5, far + 50, 0.3), methods.mask(3, "m", "w", far, far + 50, 0.3)[5:])
    few = methods.mask(3, "m", "w", 0, 100, 1e-12)  # rounds to one of 2**32, never to none
    assert few.sum() == 0 and (whole >= methods.mask(3, "m", "w", 0, 100, 0.2)).all()  # smaller density: a subset


def test_masks_stay_what_they_are():
    """The same words in every version: a merge can be made again. Philox4x64 with this key, worked out once."""
    got = methods.mask(0, "aya", "model.norm.weight", 0, 32, 0.5)
    assert "".join(str(int(x)) for x in got) == "11010101000010011001001011110000"


def test_mask_names():
    assert merge.mask_names(["out/a", "./out/b/"]) == ["a", "b"]
    assert merge.mask_names(["/x/ar/final", "/x/fr/final"]) == ["ar/final", "fr/final"]
    assert merge.mask_names(["out/a", "out/a"]) == ["a", "a"]


# ---------------------------------------------------------------------------------------------------------------------
# invariances

def same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        assert torch.equal(a[name].flatten().view(torch.uint8), b[name].flatten().view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [[], [0.1, 0.2], [3.0, -1.0], [1e-3, 1e3]], ids=str)
def test_merged_with_itself_is_itself(tmp_path, dtype, weights):
    tensors = state(0, dtype)
    tensors["model.norm.weight"][:4] = torch.tensor(
        [-0.0, 0.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny / 4], dtype=dtype)
    a, b = write(tmp_path / "a", tensors), write(tmp_path / "b", tensors, shards=3)
    same_bits(run(tmp_path / "o1", [a, b], weights=weights), tensors)
    same_bits(run(tmp_path / "o2", [a, a], weights=weights), tensors)
    same_bits(run(tmp_path / "o3", [a, b], method="slerp", t=0.3), tensors)
    for method in ("ties", "dare_ties"):  # no delta: the base
        same_bits(run(tmp_path / method, [a, b], method=method, base=b, weights=weights), tensors)


def test_ends_and_single_models(family):
    a, b = read(family / "a"), read(family / "b")
    same_bits(run(family / "t0", [family / "a", family / "b"], method="slerp", t=0.0), a)
    same_bits(run(family / "t1", [family / "a", family / "b"], method="slerp", t=1.0), b)
    same_bits(run(family / "w1", [family / "a", family / "b"], weights=[0.0, 2.0]), b)
    same_bits(run(family / "one", [family / "b"]), b)
    one = run(family / "all", [family / "b"], method="ties", base=family / "base", density=1.0)
    same_bits(one, b)  # base + (b - base), rounded back
    same_bits(run(family / "lam", [family / "b"], method="ties", base=family / "base", lam=0.0), read(family / "base"))


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_order_of_models_does_not_matter(family, method):
    weights = {"a": 1.0, "b": 2.0, "c": 0.5}
    outs = []
    for i, order in enumerate((["a", "b", "c"], ["c", "a", "b"], ["b", "a", "c"])):
        outs.append(run(family / f"o{i}", [family / n for n in order], method=method, base=family / "base",
                        weights=[weights[n] for n in order], **METHODS[method]))
    for other in outs[1:]:
        for name in outs[0]:
            torch.testing.assert_close(outs[0][name].float(), other[name].float(), rtol=2 ** -7, atol=1e-6)
            assert (outs[0][name] != other[name]).float().mean() < 0.01


@pytest.mark.parametrize("method", METHODS)
def test_chunks_and_shards_do_not_matter(family, monkeypatch, method):
    models = [family / "a", family / "b"]
    settings = dict(method=method, base=family / "base", **METHODS[method])
    one = run(family / "o1", models, **settings)
    monkeypatch.setattr(merge_stream, "CHUNK", 5)
    same_bits(run(family / "o2", models, **settings), one)
    for name, shards in (("a", 1), ("b", 2), ("base", 3)):
        write(family / "again" / name, read(family / name), shards=shards)
    again = family / "again"
    same_bits(run(family / "o3", [again / "a", again / "b"], **{**settings, "base": again / "base"}), one)
    assert sorted(p.name for p in (family / "o1").glob("model*")) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert [p.name for p in (family / "o3").glob("model*")] == ["model.safetensors"]  # the first model's layout


def test_odd_shapes_and_mixed_dtypes(tmp_path):
    """0-d, one element, empty, and an odd number of bf16 before fp32; integers that agree are copied."""
    def make(seed, wide):
        g = torch.Generator().manual_seed(seed)
        return {"model.a": torch.randn(3, generator=g).to(torch.bfloat16), "model.b": torch.randn(3, 1, generator=g),
                "model.c": torch.randn((), generator=g).to(torch.float16), "model.d": torch.zeros(0, 4),
                "model.e": torch.randn(1, generator=g).to(wide), "model.ids": torch.arange(5),
                "model.flag": torch.tensor([True, False, True])}

    xs = [make(0, torch.bfloat16), make(1, torch.float16), make(2, torch.float32)]
    folders = [write(tmp_path / str(i), x) for i, x in enumerate(xs)]
    for method in ("linear", "ties", "dare_ties"):
        got = run(tmp_path / method, folders[:2], method=method, base=folders[2], density=1.0)
        for name, x in got.items():
            assert x.dtype == xs[0][name].dtype and x.shape == xs[0][name].shape
            a, b, base = (s[name].double().numpy() for s in xs)
            if x.is_floating_point():
                want = np_linear([a, b], [1, 1]) if method == "linear" else np_ties(base, [a, b], [1, 1], 1.0)
                rounded_once(x, np.asarray(want), x.dtype)
            else:
                assert torch.equal(x, xs[0][name])
    slerped = run(tmp_path / "slerp", folders[:2], method="slerp")
    assert slerped["model.c"].shape == () and slerped["model.d"].shape == (0, 4)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_output_dtype(family, dtype):
    got = run(family / "out", [family / "a", family / "b"], dtype=dtype)
    a, b = read(family / "a"), read(family / "b")
    for name, x in got.items():
        assert x.dtype == getattr(torch, dtype)
        assert torch.equal(x, ((a[name].float() + b[name].float()) / 2).to(x.dtype))
    assert json.loads((family / "out" / "config.json").read_text()) == {**CONFIG, "torch_dtype": dtype}


# ---------------------------------------------------------------------------------------------------------------------
# the folder

def test_what_is_carried_and_reported(family):
    run(family / "out", [family / "a", family / "b", family / "c"], method="ties", base=family / "base", density=0.5,
        weights=[1.0, 1.0, 2.0])
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (family / "out" / name).read_bytes() == (family / "a" / name).read_bytes()
    index = json.loads((family / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((family / "a" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["metadata"]["total_size"] == 2 * sum(math.prod(s) for s in SHAPES.values())
    report = json.loads((family / "out" / "merge_report.json").read_text())
    assert report["method"] == "ties" and report["delta_to"] == "base" and report["cosine_of"] == "deltas"
    assert report["settings"] == {"weights": [1.0, 1.0, 2.0], "density": 0.5, "lam": 1.0, "normalize": True,
                                  "trim": "tensor"}
    assert report["groups"].keys() == {"embedding", "attention", "mlp", "norm", "all"}
    assert report["groups"]["all"]["parameters"] == sum(map(math.prod, SHAPES.values()))
    base, xs = read(family / "base"), [read(family / n) for n in "abc"]
    names = [n for n in SHAPES if "mlp" in n]
    flat = [np.concatenate([(x[n].double() - base[n].double()).flatten().numpy() for n in names]) for x in xs]
    mlp = report["groups"]["mlp"]
    assert mlp["parameters"] == flat[0].size
    np.testing.assert_allclose(mlp["delta_norm"], [np.linalg.norm(d) for d in flat], rtol=1e-5)
    np.testing.assert_allclose(mlp["cosine"], np.corrcoef(flat) * 0 + [[
        a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in flat] for a in flat], atol=1e-5)
    np.testing.assert_allclose(mlp["unchanged"], [(d == 0).mean() for d in flat])


def test_report_without_a_base_and_without_a_delta(family):
    got = run(family / "out", [family / "a", family / "b"])
    report = json.loads((family / "out" / "merge_report.json").read_text())
    assert report["delta_to"] == "merge" and report["cosine_of"] == "weights"
    assert report["settings"] == {"weights": [1.0, 1.0], "normalize": True, "lam": 1.0}
    a, b, out = (torch.cat([x[n].double().flatten() for n in SHAPES if n.endswith("norm.weight")])
                 for x in (read(family / "a"), read(family / "b"), got))
    norm = report["groups"]["norm"]
    exact = (a + b) / 2  # the report looks at the result before it is rounded
    np.testing.assert_allclose(norm["delta_norm"], [(a - exact).norm(), (b - exact).norm()], rtol=1e-4)
    assert norm["cosine"][0][1] == pytest.approx((a @ b / a.norm() / b.norm()).item(), abs=1e-5)
    run(family / "still", [family / "base"], base=family / "base")
    report = json.loads((family / "still" / "merge_report.json").read_text())  # 0 / 0 is null, never NaN
    assert report["groups"]["norm"]["cosine"] == [[None]] and report["groups"]["norm"]["unchanged"] == [1.0]


def test_header_is_as_the_format_says(family):
    """Little-endian length, JSON padded to 8, data without holes and aligned, a file exactly as long as it says."""
    a = read(family / "a")
    mixed = write(family / "mixed", {"model.a": torch.ones(3, dtype=torch.bfloat16), "model.b": torch.ones(2), **a})
    run(family / "out", [mixed])
    raw = (family / "out" / "model.safetensors").read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + n])
    assert n % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    at = 0
    for entry in header.values():
        assert entry["data_offsets"][0] == at and at % {"BF16": 2, "F32": 4}[entry["dtype"]] == 0
        at = entry["data_offsets"][1]
    assert len(raw) == 8 + n + at


def test_tied_head_stored_twice(family):
    """Some folders hold lm_head.weight beside a tied embedding: taken if it is the same, refused if it is not."""
    c = read(family / "c")
    twice = write(family / "twice", {**c, "lm_head.weight": c["model.embed_tokens.weight"].clone()})
    got = run(family / "out", [twice, family / "a"])
    assert got.keys() == SHAPES.keys()
    other = write(family / "other", {**c, "lm_head.weight": c["model.embed_tokens.weight"] + 1})
    refused("other|lm_head.weight|differs", family / "out2", [other, family / "a"])
    untied = [write(family / f"u{i}", {**c, "lm_head.weight": torch.ones(37, 12) * i},
                    config={"tie_word_embeddings": False}) for i in (1, 3)]
    assert run(family / "out3", untied)["lm_head.weight"].unique().tolist() == [2.0]


# ---------------------------------------------------------------------------------------------------------------------
# refusals

@pytest.mark.parametrize("match,settings", [
    ("--method|'mean'|linear slerp", dict(method="mean")), ("--dtype|'fp8'", dict(dtype="fp8")),
    ("--weights|3 values for 2", dict(weights=[1.0, 2.0, 3.0])), ("sum to zero", dict(weights=[1.0, -1.0])),
    ("sum to zero", dict(weights=[0.0, 0.0])), ("sum to zero", dict(weights=[0.1 + 0.2, -0.3])),
    ("sum to zero", dict(weights=[1.0, -1.0], method="ties", base="base")),
    ("finite", dict(weights=[1.0, math.nan])), ("finite", dict(method="slerp", t=math.inf)),
    ("--density 0|(0, 1]", dict(density=0.0)), ("--density 1.5", dict(method="ties", base="base", density=1.5)),
    ("--density", dict(density=math.nan)), ("--density -0.2", dict(method="dare_ties", base="base", density=-0.2)),
    ("ties|--base", dict(method="ties")), ("dare_ties|--base", dict(method="dare_ties")),
    ("slerp|--t", dict(method="slerp", weights=[1.0, 2.0]))], ids=str)
def test_settings_refused(family, match, settings):
    if "base" in settings:
        settings = {**settings, "base": family / "base"}
    refused(match, family / "out", [family / "a", family / "b"], **settings)


def test_counts_of_models_refused(family):
    refused("slerp|3", family / "out", [family / n for n in "abc"], method="slerp")
    refused("slerp|1", family / "out", [family / "a"], method="slerp")
    refused("--models", family / "out", [])
    assert run(family / "out", [family / "a", family / "b"], method="slerp", weights=[1.0, 1.0])  # equal: says nothing


@pytest.mark.parametrize("key,value", [
    ("logit_scale", 0.0625), ("rope_theta", 4e6), ("layer_norm_eps", 1e-6), ("tie_word_embeddings", False),
    ("hidden_size", 24), ("num_hidden_layers", 3), ("num_attention_heads", 6), ("num_key_value_heads", 3),
    ("vocab_size", 38), ("use_qk_norm", True), ("attention_bias", True), ("head_dim", 8),
    ("model_type", "llama"), ("architectures", ["CohereForRewardModel"]), ("something_new", 3),
    ("rope_scaling", {"type": "linear", "factor": 2.0}), ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4})])
def test_configs_that_compute_other_things_refused(family, key, value):
    """Weights alike, function unlike: the parent, or the base, is refused and both values are shown."""
    extra = {"something_new": 2} if key == "something_new" else {}
    one = write(family / "x", read(family / "a"), config=extra)
    other = write(family / "y", read(family / "a"), config={key: value})
    shown = "rope_parameters" if key.startswith("rope") else key
    refused(f"config.json|{shown}|{one}|{other}", family / "out", [one, other])
    refused(f"config.json|{shown}", family / "out", [one], base=other)


@pytest.mark.parametrize("key", ["logit_scale", "rope_theta", "layer_norm_eps"])
def test_config_key_missing_on_one_side_refused(family, key):
    """An absent key means a default, and defaults differ between versions of transformers."""
    other = write(family / "y", read(family / "a"), remove=[key])
    refused(f"config.json|{'rope_parameters' if 'rope' in key else key}", family / "out", [family / "a", other])


def test_spellings_of_config_that_mean_the_same(family):
    new = write(family / "new", read(family / "a"), remove=["rope_theta", "torch_dtype"], config={
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000}, "dtype": "bfloat16", "use_qk_norm": False,
        "transformers_version": "5.0", "tie_word_embeddings": True, "head_dim": 4, "attention_bias": False,
        "rope_scaling": None, "eos_token_id": 7, "max_position_embeddings": 131072, "use_cache": False})
    both = write(family / "both", read(family / "a"), config={"rope_parameters": {"rope_theta": 10000.0}})
    assert run(family / "out", [family / "a", new, both])
    linear = [write(family / f"s{i}", read(family / "a"), config=c) for i, c in enumerate((
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}))]
    assert run(family / "out2", linear)


def test_tokenizers(family):
    a = read(family / "a")

    def with_tokenizer(name, **changes):
        model = {**TOKENIZER["model"], **changes.pop("model", {})}
        return write(family / name, a, tokenizer={**TOKENIZER, **changes, "model": model})

    for i, changes in enumerate(({"model": {"vocab": {"a": 1, "b": 0, "ab": 2}}}, {"model": {"merges": []}},
                                 {"added_tokens": [{"id": 3, "content": "<x>"}]}, {"normalizer": {"type": "NFC"}})):
        other = with_tokenizer(f"t{i}", **changes)
        part = next(iter(changes.get("model", changes)))
        refused(f"tokenizer.json|{part}", family / "out", [family / "a", other])
    same = with_tokenizer("same", padding={"length": 3}, truncation={"max_length": 3}, model={"merges": [["a", "b"]]})
    assert run(family / "out", [family / "a", same])
    none = write(family / "none", a, tokenizer=None)
    assert run(family / "out2", [family / "a", none])


def test_tensors_that_do_not_fit_refused(family):
    a = read(family / "a")
    norm = "model.norm.weight"
    refused(f"less|{norm}|missing", family / "out",
            [family / "a", write(family / "less", {k: v for k, v in a.items() if k != norm})])
    refused("model.layers.9.x|missing|more", family / "out",
            [family / "a", write(family / "more", {**a, "model.layers.9.x": torch.ones(2)})])
    refused(f"wide|{norm}|[12]|[13]", family / "out",
            [family / "a", write(family / "wide", {**a, norm: torch.ones(13)})])
    turned = {**a, "model.layers.1.mlp.down_proj.weight": torch.ones(20, 12)}  # as many numbers
    refused("turned|[12, 20]|[20, 12]", family / "out", [family / "a", write(family / "turned", turned)])
    refused(f"ints|{norm}|int64", family / "out",
            [family / "a", write(family / "ints", {**a, norm: torch.ones(12, dtype=torch.int64)})])
    refused(f"fp8|{norm}|F8", family / "out",
            [family / "a", write(family / "fp8", {**a, norm: torch.ones(12).to(torch.float8_e4m3fn)})])
    refused(f"{norm}|less", family / "out", [family / "a"], base=family / "less")  # the base is looked at as well
    ids = [write(family / f"ids{i}", {**a, "model.ids": torch.arange(3) + i}) for i in (0, 1)]
    refused("ids1|model.ids|integers", family / "out", ids)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_values_that_are_not_finite_refused(family, method, bad, monkeypatch):
    """In any model, weight 0 and the base included; also in the last chunk."""
    monkeypatch.setattr(merge_stream, "CHUNK", 50)
    a = read(family / "a")
    a["model.layers.0.mlp.up_proj.weight"][19, 11] = bad
    broken = write(family / "broken", a)
    settings = dict(method=method, base=family / "base", **METHODS[method])
    refused("broken/model.safetensors: |up_proj|NaN or infinity", family / "out", [family / "c", broken], **settings)
    refused("broken/model.safetensors: ", family / "out", [family / "c", family / "b"], **{**settings, "base": broken})
    if method == "linear":
        refused("broken/model.safetensors: ", family / "out", [family / "c", broken], weights=[1.0, 0.0])


def test_large_values_are_not_infinite(tmp_path):
    """Finite numbers whose sum is not."""
    tensors = {"model.w": torch.full((300,), 3e38, dtype=torch.bfloat16)}
    same_bits(run(tmp_path / "out", [write(tmp_path / "a", tensors)]), tensors)


def test_overflow_of_the_output_refused(tmp_path):
    big = write(tmp_path / "big", {"model.w": torch.full((3,), 1e5)})
    refused("model.w|float16", tmp_path / "out", [big, big], dtype="float16")
    refused("model.w|float32", tmp_path / "out", [big], weights=[1e38], normalize=False)


def test_broken_folders_refused(family):
    out, good = family / "out", family / "a"
    refused("nowhere|not found|hub name", out, [good, family / "nowhere"])
    index, shard = "model.safetensors.index.json", "model-00001-of-00002.safetensors"

    def broken(name, change):
        folder = write(family / name, read(good), shards=2)
        change(folder)
        return folder

    def edit_index(**changes):
        def change(folder):
            value = json.loads((folder / index).read_text())
            value["weight_map"].update(changes)
            (folder / index).write_text(json.dumps(value))
        return change

    def cut(n):
        return lambda folder: (folder / shard).write_bytes((folder / shard).read_bytes()[:n])

    for i, (match, change) in enumerate((
            (f"{shard}|unfinished", cut(-1)), (f"{shard}|unfinished", cut(100)), (f"{shard}|unfinished", cut(0)),
            (f"{shard}|unfinished", lambda f: (f / shard).write_bytes((f / shard).read_bytes() + b"\0")),
            (f"{shard}|missing", lambda f: (f / shard).unlink()),
            (f"{index}|model.norm.weight|'../a/{shard}'", edit_index(**{"model.norm.weight": f"../a/{shard}"})),
            (f"{index}|'/etc/x.safetensors'", edit_index(**{"model.norm.weight": "/etc/x.safetensors"})),
            (f"{index}|'pytorch_model.bin'", edit_index(**{"model.norm.weight": "pytorch_model.bin"})),
            (f"{index}|3", edit_index(**{"model.norm.weight": 3})),
            ("model.ghost|missing", edit_index(**{"model.ghost": shard})),
            ("model.norm.weight|surplus", edit_index(**{"model.norm.weight": shard})),
            (f"{index}|weight_map", lambda f: (f / index).write_text("{}")),
            (f"{index}|weight_map", lambda f: (f / index).write_text('{"weight_map": ["model.norm.weight"]}')),
            (index, lambda f: (f / index).write_text("{")), ("config.json", lambda f: (f / "config.json").unlink()),
            ("config.json|object", lambda f: (f / "config.json").write_text("[]")),
            ("model.safetensors|missing", lambda f: (f / index).unlink()))):
        refused(match, out, [good, broken(f"broken{i}", change)])
        assert not (family / "etc").exists()


def test_existing_output(family):
    run(family / "out", [family / "a", family / "b"])
    before = read(family / "out")
    refused("out|exists|--overwrite", family / "out", [family / "b", family / "c"])
    after = run(family / "out", [family / "b", family / "c"], overwrite=True)
    assert any(not torch.equal(before[n], after[n]) for n in before)
    assert sorted(p.name for p in family.iterdir()) == ["a", "b", "base", "c", "out"]
    refused("exists", family / "c", [family / "a", family / "b"], overwrite=True)  # no merge: not ours to replace
    refused("one of the models", family / "a", [family / "a", family / "b"], overwrite=True)
    refused("one of the models", family / "b" / ".." / "a", [family / "a", family / "b"], overwrite=True)
    refused("one of the models", family, [family / "a", family / "b"], overwrite=True)
    refused("exists", family / "out", [family / "a", write(family / "bad", {"model.w": torch.ones(1)})])
    same_bits(read(family / "out"), after)

# ---------------------------------------------------------------------------------------------------------------------
# settings that run over the depth, trimming over the model, lambda

def test_gradient_by_hand():
    """Values at even distances over the layers; outside the layers the first, as in mergekit."""
    g = methods.gradient
    assert [g([0.0, 0.5, 1.0], layer, 5) for layer in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [g([0.0, 1.0, 0.0], layer, 4) for layer in range(4)] == pytest.approx([0.0, 2 / 3, 2 / 3, 0.0])
    assert g([0.3, 0.7], None, 5) == 0.3 and g([0.3, 0.7], 4, 5) == 0.7  # the ends exactly
    assert g([0.3], 2, 5) == 0.3 and g([0.3, 0.9], 0, 1) == 0.3


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare_ties"])
def test_settings_over_the_depth(family, method):
    """Layer 0 gets the first value, layer 1 (the last) the last, the rest the first: as merges with these values have."""
    models, base = [family / "a", family / "b"], dict(base=family / "base", density=0.5, method=method)
    runs = {"t": ("0.2,0.9", "0.2", "0.9")} if method == "slerp" else {
        "weights": (["1,0.5", "0,2"], [1.0, 0.0], [0.5, 2.0])}
    (flag, (both, first, last)), = runs.items()
    got, begin, end = (run(family / f"o{i}", models, **{**base, flag: value})
                       for i, value in enumerate((both, first, last)))
    for name, x in got.items():
        want = end if ".layers.1." in name else begin
        assert torch.equal(x, want[name]), name
    assert not torch.equal(begin["model.norm.weight"], end["model.norm.weight"])
    settings = json.loads((family / "o0" / "merge_report.json").read_text())["settings"]
    assert settings[flag] == ([0.2, 0.9] if method == "slerp" else [[1.0, 0.5], [0.0, 2.0]])


def test_weights_that_cancel_in_one_layer_refused(family):
    refused("--weights|sum to zero in layer 1", family / "out", [family / "a", family / "b"], weights=["1,1", "1,-1"])
    refused("--weights|sum to zero, nothing", family / "out", [family / "a", family / "b"], weights=["1,1", "-1,1"])
    assert run(family / "out", [family / "a", family / "b"], weights=["1,1", "1,-1"], normalize=False)


def np_ties_whole(base, models, density, lam=1.0):
    """TIES as its authors run it: the deltas of all tensors in one vector, trimmed together, in float64."""
    names = sorted(base)
    flat = lambda tensors: np.concatenate([tensors[n].double().numpy().ravel() for n in names])
    b = flat(base)
    merged = b + lam * np_elect([np_trim(flat(m) - b, density) for m in models], [1] * len(models))
    out, at = {}, 0
    for n in names:
        out[n] = merged[at:at + base[n].numel()].reshape(base[n].shape)
        at += base[n].numel()
    return out


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_trimming_over_the_whole_model(tmp_path, monkeypatch, density, dtype):
    """One threshold a model: tensors that moved little lose more. Chunks, spans and groups of tensors do not matter."""
    base = state(0, dtype)
    models = [state(i, dtype, 0.02, base) for i in (1, 2, 3)]
    for i, m in enumerate(models):  # one tensor moved ten times as far: by tensor and over the model differ much
        m["model.norm.weight"] = (base["model.norm.weight"].float() * (1 + 0.5 * (i + 1))).to(dtype)
    folders = [write(tmp_path / f"m{i}", m) for i, m in enumerate(models)]
    write(tmp_path / "base", base)
    settings = dict(method="ties", base=tmp_path / "base", density=density, trim="model", lam=0.8)
    got = run(tmp_path / "out", folders, **settings)
    for name, want in np_ties_whole(base, models, density, 0.8).items():
        rounded_once(got[name], want, dtype)
    monkeypatch.setattr(merge_stream, "CHUNK", 7)
    monkeypatch.setattr(merge_stream, "SPAN", 21)
    monkeypatch.setattr(merge_stream, "GROUP", 100)
    same_bits(run(tmp_path / "small", folders, **settings), got)
    by_tensor = run(tmp_path / "tensor", folders, **{**settings, "trim": "tensor"})
    assert density == 1.0 or any(not torch.equal(got[n], by_tensor[n]) for n in got)
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text())["settings"]["trim"] == "model"


def test_spans_threads_and_groups_do_not_matter(family, monkeypatch):
    for method in METHODS:
        settings = dict(method=method, base=family / "base", **METHODS[method])
        one = run(family / f"{method}-1", [family / "a", family / "b"], threads=1, **settings)
        with monkeypatch.context() as m:
            for name, value in (("CHUNK", 8), ("SPAN", 24), ("LOOK", 1), ("GROUP", 30)):
                m.setattr(merge_stream, name, value)
            same_bits(run(family / f"{method}-7", [family / "a", family / "b"], threads=7, **settings), one)
        reports = [json.loads((family / f"{method}-{n}" / "merge_report.json").read_text())["groups"] for n in (1, 7)]
        for group, a in reports[0].items():
            b = reports[1][group]
            assert a["parameters"] == b["parameters"] and a["sign_conflicts"] == pytest.approx(b["sign_conflicts"])
            np.testing.assert_allclose(a["delta_norm"], b["delta_norm"], rtol=1e-5)


def test_lambda_of_a_linear_merge(family):
    """theta_0 + lambda (merge - theta_0): 0 is the base, 1 the merge, and past it."""
    models, base = [family / "a", family / "b"], family / "base"
    same_bits(run(family / "l0", models, base=base, lam=0.0), read(base))
    same_bits(run(family / "l1", models, base=base, lam=1.0), run(family / "plain", models))
    got, (a, b, b0) = run(family / "l", models, base=base, lam=1.25), (read(f) for f in (*models, base))
    for name, x in got.items():
        origin = b0[name].double().numpy()
        want = origin + 1.25 * (np_linear([a[name].double().numpy(), b[name].double().numpy()], [1, 1]) - origin)
        rounded_once(x, want, torch.bfloat16)
    refused("--lam|--base", family / "out", models, lam=0.5)
    again = run(family / "hand", [*models, base], weights=[0.5 * 1.25, 0.5 * 1.25, 1 - 1.25])  # the same, as weights
    assert all(torch.allclose(again[n].float(), got[n].float(), rtol=2 ** -7, atol=1e-6) for n in got)


# ---------------------------------------------------------------------------------------------------------------------
# what it says

def test_statistics_against_numpy(family, monkeypatch):
    """With a base: norms, cosines, conflicts, what bf16 swallowed in training and in the merge; over many chunks."""
    monkeypatch.setattr(merge_stream, "CHUNK", 40)
    g, base = torch.Generator().manual_seed(5), read(family / "base")
    small = [write(family / f"s{i}", {n: (x.float() + 2e-4 * torch.randn(x.shape, generator=g)).to(x.dtype)
                                      for n, x in base.items()}) for i in range(3)]  # near the grid of bf16
    for method, settings in (("linear", {"weights": [1.0, 2.0, 1.0]}), ("ties", {"density": 0.7, "lam": 0.4})):
        got = run(family / method, small, method=method, base=family / "base", **settings)
        stats = json.loads((family / method / "merge_report.json").read_text())["groups"]["all"]
        flat = lambda tensors: np.concatenate([tensors[n].double().numpy().ravel() for n in SHAPES])
        b, y = flat(base), flat(got)
        d = [flat(read(s)) - b for s in small]
        np.testing.assert_allclose(stats["norm"], np.linalg.norm(b), rtol=1e-5)
        np.testing.assert_allclose(stats["delta_norm"], [np.linalg.norm(x) for x in d], rtol=1e-5)
        np.testing.assert_allclose(stats["unchanged"], [(x == 0).mean() for x in d], rtol=1e-6)
        conflicts = (np.max(d, 0) > 0) & (np.min(d, 0) < 0)
        np.testing.assert_allclose(stats["sign_conflicts"], conflicts.mean(), rtol=1e-6)
        if method == "linear":
            tau = (d[0] + 2 * d[1] + d[2]) / 4
        else:
            tau = 0.4 * np_elect([np.concatenate([np_trim(part, 0.7) for part in np.split(x, np.cumsum(
                [math.prod(s) for s in SHAPES.values()])[:-1])]) for x in d], [1, 1, 1])
        lost = (tau != 0) & (y == b)
        assert 0.05 < lost.mean() < 0.9
        np.testing.assert_allclose(stats["rounded_away"], lost.mean(), atol=2e-3)  # fp32 sums may cancel to 0


def test_statistics_of_large_tensors_are_estimates(tmp_path, monkeypatch):
    """Beyond SPAN elements a quarter stands for all: right within what a quarter of them can tell, exact for counts."""
    for name, value in (("CHUNK", 500), ("SPAN", 1000)):
        monkeypatch.setattr(merge_stream, name, value)
    g = torch.Generator().manual_seed(3)
    base = {"model.w": torch.randn(41_300, generator=g), "model.norm.weight": torch.ones(30)}
    models = [{n: x + 0.1 * (i + 1) * torch.randn(x.shape, generator=g) for n, x in base.items()} for i in range(2)]
    folders = [write(tmp_path / f"m{i}", m) for i, m in enumerate(models)]
    for out, base_flag in (("with", {"base": write(tmp_path / "base", base)}), ("without", {})):
        got = run(tmp_path / out, folders, **base_flag)
        stats = json.loads((tmp_path / out / "merge_report.json").read_text())["groups"]
        origin = base["model.w"] if base_flag else got["model.w"]
        want = [(m["model.w"] - origin).norm().item() for m in models]
        np.testing.assert_allclose(stats["other"]["delta_norm"], want, rtol=0.03)
        assert not np.allclose(stats["other"]["delta_norm"], want, rtol=1e-4)  # an estimate, or this test says nothing
        np.testing.assert_allclose(stats["norm"]["delta_norm"], [
            (m["model.norm.weight"] - (base if base_flag else got)["model.norm.weight"]).norm().item() for m in models],
            rtol=1e-4)
        assert stats["other"]["parameters"] == 41_300 and stats["all"]["parameters"] == 41_330
        if base_flag:
            assert 0.4 < stats["other"]["sign_conflicts"] < 0.6 and stats["other"]["unchanged"] == [0.0, 0.0]


def test_model_card(family):
    """YAML between two lines of ---, hub names only as base_model; parents, method, settings and table in the text."""
    run(family / "aya-merged", [family / "a", family / "b"], method="ties", base=family / "base", weights=[1.0, 3.0],
        density=0.3, seed=4)
    text = (family / "aya-merged" / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\nlibrary_name: transformers\ntags:\n- merge\n- nanoaya\n---\n# aya-merged\n")
    for part in ("`ties` merge of 2 models", "| a | 1.0 |", "| b | 3.0 |", "| base | base |", "density 0.3", "dtype auto",
                 "| embedding | 444 |", "sign conflicts"):
        assert part in text, part
    assert str(family) not in text  # where the folders lay is nobody's business
    report = {**json.loads((family / "aya-merged" / "merge_report.json").read_text()), "models": ["org/x", str(family)]}
    assert merge.card(report, "y").startswith('---\nbase_model:\n- "org/x"\nbase_model_relation: merge\nlibrary_name:')


# ---------------------------------------------------------------------------------------------------------------------
# as a program

def command(*args, **kwargs):
    return subprocess.run([sys.executable, str(ROOT / "merge.py"), *map(str, args)], capture_output=True, text=True,
                          timeout=120, **kwargs)


@pytest.mark.parametrize("method", ["linear", "dare_ties"])
def test_command_line(family, method):
    flags = ["--weights", 1, 2, "--normalize", "true", "--density", 0.5, "--lam", "0.5", "--seed", 3]
    done = command("--method", method, "--models", family / "a", family / "b", *flags, "--base", family / "base",
                   "--dtype", "float32", "--out", family / "new" / "out")
    assert done.returncode == 0, done.stderr
    assert f"{method} of 2 models" in done.stdout and "embedding" in done.stdout
    assert ("--density has no effect" in done.stdout) == (method == "linear")
    same_bits(read(family / "new" / "out"), run(
        family / "here", [family / "a", family / "b"], method=method, dtype="float32", weights=[1.0, 2.0], density=0.5,
        lam=0.5, seed=3, base=family / "base"))


def test_command_line_error(family):
    done = command("--models", family / "a", family / "b", "--weights", 1, -1, "--out", family / "out")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
