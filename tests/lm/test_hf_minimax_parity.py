"""MiniMax against transformers' own: logits, gradients, weights, decoding, padding, generation."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.lm import hf
from research.lm.attention import Cache
from research.lm.sampler import Sampler, Sampling

pytestmark = [
    pytest.mark.parity,
    # Their own affair; warnings of ours stay errors.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(torch|transformers)"),
    pytest.mark.filterwarnings("ignore::FutureWarning:(torch|transformers)"),
    pytest.mark.filterwarnings("ignore::UserWarning:(torch|transformers)"),
]

LINEAR, FULL = "linear_attention", "full_attention"
VOCAB = 96
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,  # not heads times their size, as in the released model
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "block_size": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # large enough that attention and gates are far from linear
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "linear_attn_alpha_factor": 2.0,
    "linear_attn_beta_factor": 0.9,
    "full_attn_alpha_factor": 1.7,
    "full_attn_beta_factor": 1.1,
    "mlp_alpha_factor": 1.9,
    "mlp_beta_factor": 0.8,
    "bos_token_id": None,
    "eos_token_id": None,
}
CASES = {
    "seven-to-one": {"layer_types": [LINEAR] * 7 + [FULL]},
    "softmax-first": {"layer_types": [FULL, LINEAR] * 2, "rms_norm_eps": 1e-6},
    "softmax-last": {"layer_types": [LINEAR, FULL] * 2, "tie_word_embeddings": True},
    "six-heads": {
        "layer_types": [LINEAR, LINEAR, FULL] * 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
    },
    "no-period": {
        "layer_types": [LINEAR, FULL, FULL, LINEAR, LINEAR],
        "num_key_value_heads": 4,
        "num_experts_per_tok": 1,
        "num_local_experts": 3,
    },
    "lightning-alone": {"layer_types": [LINEAR] * 3, "head_dim": 10, "num_experts_per_tok": 4},
    "softmax-alone": {"layer_types": [FULL] * 2, "hidden_size": 80, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e6,
    }},
    "one-layer": {"layer_types": [LINEAR]},
}


def make(case: str, seed: int = 0):
    """A random model of transformers, in which every parameter matters."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    changes = CASES[case]
    config = transformers.MiniMaxConfig(
        **BASE | changes, num_hidden_layers=len(changes["layer_types"])
    )
    config._attn_implementation = "eager"
    torch.set_num_threads(1)  # small products: more threads would wait for each other
    torch.manual_seed(seed)
    model = transformers.MiniMaxForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones would hide a mix-up
            parameter.data += 0.3 * torch.randn_like(parameter)
    return torch, model


def read(path):
    """A model of transformers from a directory, with nothing missing or left over."""
    transformers = pytest.importorskip("transformers")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == "MiniMaxForCausalLM"
    return model.eval()


def tokens_of(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length))


def relative(a, b, least: float) -> float:
    """Error over the largest element, or over `least`: a router of one choice has gradient 0."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / max(np.abs(b).max(), least))


def as_published(named: dict) -> dict:
    """transformers' fused experts under the names and shapes of the single ones."""
    out = {}
    for name, tensor in named.items():
        name = name.replace(".mlp.", ".block_sparse_moe.")
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(tensor):
                for which, half in zip(("w1", "w3"), both.chunk(2), strict=True):
                    out[f"{name.removesuffix('gate_up_proj')}{e}.{which}.weight"] = half
        elif name.endswith("experts.down_proj"):
            for e, one in enumerate(tensor):
                out[f"{name.removesuffix('down_proj')}{e}.w2.weight"] = one
        else:
            out[name] = tensor
    return out


@pytest.mark.parametrize("case", CASES)
def test_logits_gradients_and_back(case, tmp_path):
    torch, theirs = make(case)
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = hf.load(tmp_path / "theirs")
    assert model.config.lightning.slopes == "native" and model.config.rotary_dim is None
    tokens = tokens_of(2, 75)  # no multiple of the block
    weights = np.random.default_rng(1).normal(size=(2, 75)).astype(np.float32)

    logits = theirs(torch.from_numpy(tokens)).logits
    logprobs = torch.log_softmax(logits[:, :-1], -1)
    picked = logprobs.gather(-1, torch.from_numpy(tokens[:, 1:, None]))[..., 0]
    (picked * torch.from_numpy(weights[:, 1:])).sum().backward()

    def loss(params):
        ours = model.apply({"params": params}, jnp.asarray(tokens))
        logprobs = jax.nn.log_softmax(ours[:, :-1])
        picked = jnp.take_along_axis(logprobs, tokens[:, 1:, None], -1)[..., 0]
        return (picked * weights[:, 1:]).sum(), ours

    (_, ours), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    error = np.abs(np.asarray(ours) - logits.detach().numpy()).max()
    named = as_published({name: p.grad for name, p in theirs.named_parameters()})
    least = 1e-3 * max(float(grad.abs().max()) for grad in named.values())
    errors = {
        name: relative(grad, named[name], least)
        for name, grad in hf.tensors(model, grads, "minimax")
    }
    worst = max(errors, key=errors.get)
    print(f"\nPARITY {case}: logits {error:.1e} of {np.abs(np.asarray(ours)).max():.0f}, "
          f"gradients {errors[worst]:.1e} of the largest ({worst})")
    assert set(errors) == set(named)
    assert error < 1e-4
    assert all(x < 1e-4 for x in errors.values())

    hf.save(tmp_path / "ours", model, params)
    again = read(tmp_path / "ours")(torch.from_numpy(tokens)).logits
    # The weights are the same bit for bit (below), the stored decays to the last bits.
    np.testing.assert_allclose(again.detach(), logits.detach(), atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back(dtype, tmp_path):
    """transformers → ours → as published → ours → transformers: the same weights, bit for bit."""
    torch, theirs = make("seven-to-one")
    theirs.to(getattr(torch, dtype)).save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    model, params = hf.load(tmp_path / "theirs")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {dtype}
    hf.save(tmp_path / "published", model, params, "minimax_text_01", max_shard_bytes=80_000)
    model, params = hf.load(tmp_path / "published")
    hf.save(tmp_path / "ours", model, params, "minimax", max_shard_bytes=80_000)

    theirs, again = read(tmp_path / "theirs"), read(tmp_path / "ours")
    assert str(again.dtype) == str(theirs.dtype) == f"torch.{dtype}"
    before, after = dict(theirs.named_parameters()), dict(again.named_parameters())
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    for key in BASE | CASES["seven-to-one"]:
        if key != "block_size":  # has no key among the published ones
            assert getattr(again.config, key) == getattr(theirs.config, key), key


def test_fused_experts_and_no_buffers_read_the_same(tmp_path):
    """The names of transformers in memory, as other tools store them."""
    torch, theirs = make("softmax-first")
    theirs.save_pretrained(tmp_path / "single")
    safetensors = pytest.importorskip("safetensors.torch")
    buffers = {name for name, _ in theirs.named_buffers()}
    state = {k: v.contiguous() for k, v in theirs.state_dict().items() if k not in buffers}
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in state)
    (tmp_path / "fused").mkdir()
    safetensors.save_file(state, tmp_path / "fused" / "model.safetensors")
    config = (tmp_path / "single" / "config.json").read_text()
    (tmp_path / "fused" / "config.json").write_text(config)
    for a, b in zip(*(jax.tree.leaves(hf.load(tmp_path / d)) for d in ("single", "fused")), strict=True):
        if isinstance(a, jax.Array):
            np.testing.assert_array_equal(a, b)


def test_our_buffers_are_theirs(tmp_path):
    """Decays and their powers: to the last bits, whatever the head count."""
    for case in ("six-heads", "lightning-alone", "one-layer"):
        torch, theirs = make(case)
        theirs.save_pretrained(tmp_path / "theirs")
        hf.save(tmp_path / "ours", *hf.load(tmp_path / "theirs"))
        ours = dict(read(tmp_path / "ours").named_buffers())
        for name, tensor in theirs.named_buffers():
            assert ours[name].shape == tensor.shape
            tolerance = 1e-4 if case == "one-layer" else 2e-6  # there f_0 = 1.00001
            np.testing.assert_allclose(ours[name], tensor, rtol=tolerance, atol=1e-7, err_msg=name)


def test_partial_rotary_positions(tmp_path):
    """Half of each head turns: transformers does it too, by other frequencies and an order of rows.

    Turning pairs (i, i + r/2) of the first r dimensions is turning pairs (i, i + d/2) of all d, with
    frequency 0 from the (r/2)-th on, if a head's rows of q and k are put in the order below.
    """
    torch, theirs = make("softmax-first")
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"]["partial_rotary_factor"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, params = hf.load(tmp_path)
    assert model.config.rotary_dim == 8
    tokens = tokens_of(2, 90)
    ours = np.asarray(jax.jit(model.apply)({"params": params}, tokens))

    d, r = 16, 8
    whole = theirs(torch.from_numpy(tokens)).logits.detach().numpy()
    order = [*range(0, r // 2), *range(r, r + (d - r) // 2),
             *range(r // 2, r), *range(r + (d - r) // 2, d)]
    frequencies = [1e4 ** (-2 * i / r) for i in range(r // 2)] + [0.0] * (d // 2 - r // 2)
    theirs.model.rotary_emb.inv_freq = torch.tensor(frequencies)
    for layer in theirs.model.layers:
        for projection in ("q_proj", "k_proj"):
            if hasattr(layer.self_attn, projection):
                weight = getattr(layer.self_attn, projection).weight
                heads = weight.data.reshape(-1, d, weight.shape[1])
                weight.data = heads[:, order].reshape(weight.shape)
    partial = theirs(torch.from_numpy(tokens)).logits.detach().numpy()
    error = np.abs(ours - partial).max()
    print(f"\nPARITY partial rotary: logits {error:.1e}; whole heads differ by "
          f"{np.abs(whole - partial).max():.1f}")
    assert error < 1e-4
    assert np.abs(whole - partial).max() > 0.5  # so the test has power


@pytest.mark.parametrize("case", ["softmax-first", "six-heads"])
def test_token_by_token(case, tmp_path):
    """Our cache, fed one token at a time, against our prefill and theirs with explicit positions."""
    torch, theirs = make(case)
    theirs.save_pretrained(tmp_path)
    model, params = hf.load(tmp_path)
    length = 41
    tokens = tokens_of(2, length)
    whole = np.asarray(jax.jit(model.apply)({"params": params}, tokens))

    step = jax.jit(lambda cache, token, position: model.apply(
        {"params": params}, token, position, cache=cache
    ))
    cache, ours = Cache.empty(model.config, 2, length), []
    memory, reference = None, []
    with torch.no_grad():
        for t in range(length):
            logits, cache = step(cache, tokens[:, t : t + 1], jnp.full((2, 1), t, jnp.int32))
            ours.append(np.asarray(logits[:, 0]))
            out = theirs(
                torch.from_numpy(tokens[:, t : t + 1]),
                position_ids=torch.full((2, 1), t),
                past_key_values=memory,
                use_cache=True,
            )
            memory = out.past_key_values
            reference.append(out.logits[:, 0].numpy())
    ours, reference = np.stack(ours, 1), np.stack(reference, 1)
    print(f"\nPARITY {case}: steps {np.abs(ours - reference).max():.1e} of theirs, "
          f"{np.abs(ours - whole).max():.1e} of our prefill")
    np.testing.assert_allclose(ours, whole, atol=1e-4)
    np.testing.assert_allclose(ours, reference, atol=1e-4)


def test_left_padding(tmp_path):
    """Rows of different lengths, padded on the left: theirs, and each row without padding."""
    torch, theirs = make("softmax-last")
    theirs.save_pretrained(tmp_path)
    model, params = hf.load(tmp_path)
    lengths, longest = (50, 33, 7), 50
    rows = [tokens_of(1, n, seed=n)[0] for n in lengths]
    tokens = np.stack([np.pad(row, (longest - len(row), 0)) for row in rows])
    mask = np.stack([np.arange(longest) >= longest - n for n in lengths])
    positions = np.where(mask, np.arange(longest) - (longest - np.array(lengths)[:, None]), -1)
    cache = Cache.empty(model.config, 3, longest)
    apply = jax.jit(model.apply)
    ours, _ = apply({"params": params}, tokens, jnp.asarray(positions), cache=cache)
    behind = np.stack([np.pad(row, (0, longest - len(row))) for row in rows])  # seen by nobody
    alone = apply({"params": params}, behind)
    with torch.no_grad():
        reference = theirs(
            torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            position_ids=torch.from_numpy(np.maximum(positions, 0)),
        ).logits.numpy()
    errors = [np.abs(ours[i, -n:] - reference[i, -n:]).max() for i, n in enumerate(lengths)]
    print(f"\nPARITY left padding: {max(errors):.1e} of theirs")
    for i, n in enumerate(lengths):
        np.testing.assert_allclose(ours[i, -n:], alone[i, :n], atol=1e-4)
        np.testing.assert_allclose(ours[i, -n:], reference[i, -n:], atol=1e-4)


@pytest.mark.parametrize("case", ["seven-to-one", "softmax-first"])
def test_greedy_generation(case, tmp_path):
    """Our sampler, in two slots that are refilled, against `generate`, one prompt at a time.

    And a left-padded batch at once, if the first layer is softmax attention: otherwise transformers
    takes the length of the first layer's memory, 0, for that of all, and attends to the padding.
    """
    torch, theirs = make(case)
    theirs.save_pretrained(tmp_path)
    model, params = hf.load(tmp_path)
    prompts = [tokens_of(1, n, seed=n)[0] for n in (3, 17, 30, 21)]
    sampler = Sampler(model, slots=2, max_prompt=30, max_new_tokens=24)
    ours = sampler(params, prompts, jax.random.key(0), Sampling(24, temperature=0.0))

    def generate(prompts):
        longest = max(map(len, prompts))
        tokens = np.stack([np.pad(p, (longest - len(p), 0)) for p in prompts])
        mask = np.stack([np.arange(longest) >= longest - len(p) for p in prompts])
        return theirs.generate(
            torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask.astype(np.int64)),
            max_new_tokens=24, do_sample=False, pad_token_id=0,
        )[:, longest:].numpy()  # fmt: skip

    expected = [generate([prompt])[0] for prompt in prompts]
    np.testing.assert_array_equal(ours.sequences, expected)
    if case == "softmax-first":
        np.testing.assert_array_equal(ours.sequences, generate(prompts))
    assert len({tuple(row) for row in expected}) == len(prompts)


def test_tiny_directory_is_read_by_transformers(tmp_path):
    from research.lm.hf import tiny

    path = tiny.write(tmp_path / "tiny", layout="minimax", hidden_size=32)
    theirs = read(path)
    model, params = hf.load(path)
    tokens = tokens_of(1, 40)
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        reference = theirs(torch.from_numpy(tokens)).logits.numpy()
    ours = jax.jit(model.apply)({"params": params}, tokens)
    np.testing.assert_allclose(ours, reference, atol=1e-4)
    assert re.fullmatch(r"\d+", str(theirs.config.eos_token_id))
