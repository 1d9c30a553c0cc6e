"""Logits, gradients, weights and generation against transformers' own Qwen2, Qwen3 and Llama."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.lm import hf
from research.lm.sampler import Sampler, Sampling

pytestmark = [
    pytest.mark.parity,
    # Their own affair; warnings of ours stay errors.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(torch|transformers)"),
    pytest.mark.filterwarnings("ignore::FutureWarning:(torch|transformers)"),
    pytest.mark.filterwarnings("ignore::UserWarning:(torch|transformers)"),
]

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # short, so that all three kinds of wavelength occur
}
BASE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # large enough that attention and gates are far from linear
}
CASES = {
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen2-untied-one-group": ("qwen2", {"num_key_value_heads": 6}),
    "qwen2-head-dim": ("qwen2", {"head_dim": 14, "num_key_value_heads": 1}),
    "qwen2-llama3-rope": ("qwen2", {"rope_scaling": LLAMA3}),
    "qwen3": ("qwen3", {"head_dim": 16, "rope_theta": 1e6}),
    "qwen3-tied-head-dim": ("qwen3", {"head_dim": 10, "tie_word_embeddings": True}),
    "llama": ("llama", {"rms_norm_eps": 1e-5}),
    "llama-tied-rope": ("llama", {
        "tie_word_embeddings": True, "rope_theta": 5e5, "rope_scaling": LLAMA3, "head_dim": 32,
    }),
    "llama-multi-query": ("llama", {"num_key_value_heads": 1, "rope_scaling": LLAMA3}),
}


def make(kind: str, changes: dict, seed: int = 0):
    """A random model of transformers, in which every parameter matters."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config,
              "llama": transformers.LlamaConfig}[kind](**BASE | changes)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # ones and zeros would hide a mix-up
            parameter.data += 0.3 * torch.randn_like(parameter)
    return torch, model


def read(path):
    """A model from a directory (`.to(bfloat16)` would round its rotary frequencies too)."""
    transformers = pytest.importorskip("transformers")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def tokens_of(rows: int, length: int, vocab: int = BASE["vocab_size"]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab, (rows, length))


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case, tmp_path):
    torch, theirs = make(*CASES[case])
    theirs.save_pretrained(tmp_path)
    model, params = hf.load(tmp_path)
    tokens = tokens_of(2, 100)
    weights = np.random.default_rng(1).normal(size=(2, 100)).astype(np.float32)

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
    assert ours.dtype == jnp.float32
    error = np.abs(np.asarray(ours) - logits.detach().numpy()).max()
    named = dict(theirs.named_parameters())
    errors = {
        name: relative(grad, named[name].grad)
        for name, grad in hf.tensors(model, grads, CASES[case][0])
    }
    worst = max(errors, key=errors.get)
    print(f"\nPARITY {case}: logits {error:.1e} of {np.abs(np.asarray(ours)).max():.0f}, "
          f"gradients {errors[worst]:.1e} of the largest ({worst})")
    assert set(errors) == set(named)
    assert error < 1e-4
    assert all(x < 1e-4 for x in errors.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["qwen2-tied", "qwen3", "llama-tied-rope"])
def test_there_and_back(case, dtype, tmp_path):
    """transformers → ours → transformers: the same weights and logits, bit for bit."""
    torch, theirs = make(*CASES[case])
    theirs.to(getattr(torch, dtype)).save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    model, params = hf.load(tmp_path / "theirs")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {dtype}
    hf.save(tmp_path / "ours", model, params, max_shard_bytes=30_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1

    theirs, again = read(tmp_path / "theirs"), read(tmp_path / "ours")
    assert str(again.dtype) == str(theirs.dtype) == f"torch.{dtype}"
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    tokens = torch.from_numpy(tokens_of(2, 80))
    assert torch.equal(theirs(tokens).logits, again(tokens).logits)
    for key in ("rms_norm_eps", "tie_word_embeddings", "max_position_embeddings"):
        assert getattr(again.config, key) == getattr(theirs.config, key)


def test_older_config_keys_give_the_same_model(tmp_path):
    """rope_theta and rope_scaling as transformers 4 writes them, against rope_parameters."""
    _, theirs = make(*CASES["llama-tied-rope"])
    theirs.save_pretrained(tmp_path)
    model, _ = hf.load(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert "rope_theta" in config["rope_parameters"]  # else this test shows nothing
    config |= {"rope_scaling": config.pop("rope_parameters")}
    config["rope_theta"] = config["rope_scaling"].pop("rope_theta")
    path.write_text(json.dumps(config))
    assert hf.load(tmp_path)[0].config == model.config


@pytest.mark.parametrize("case", ["qwen2-tied", "llama-multi-query"])
def test_bfloat16_computation_is_as_close_as_theirs(case, tmp_path):
    """In bfloat16 both stray from float32; ours by no more than twice as much as theirs."""
    torch, theirs = make(*CASES[case])
    theirs.to(torch.bfloat16).save_pretrained(tmp_path)
    tokens = tokens_of(2, 60)
    exact_model, exact_params = hf.load(tmp_path, dtype="float32")
    exact = exact_model.apply({"params": exact_params}, tokens)
    model, params = hf.load(tmp_path, compute_dtype="bfloat16")
    ours = model.apply({"params": params}, tokens)
    assert ours.dtype == jnp.float32
    reference = read(tmp_path)(torch.from_numpy(tokens)).logits.detach().float().numpy()
    assert 0 < relative(ours, exact) < 2 * relative(reference, exact)


@pytest.mark.parametrize("case", ["qwen2-tied", "qwen3", "llama-tied-rope"])
def test_greedy_generation(case, tmp_path):
    """Token by token what `generate` of transformers gives, with prompts of different lengths."""
    torch, theirs = make(*CASES[case])
    theirs.save_pretrained(tmp_path)
    model, params = hf.load(tmp_path)
    prompts = [tokens_of(1, n)[0] for n in (3, 17, 30)]
    stop = 7
    sampler = Sampler(model, slots=2, max_prompt=30, max_new_tokens=40)
    ours = sampler(
        params, prompts, jax.random.key(0), Sampling(40, temperature=0.0, stop_ids=(stop,))
    )
    lengths = set()
    for i, prompt in enumerate(prompts):
        rows = theirs.generate(
            torch.from_numpy(prompt)[None], attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=40, do_sample=False, eos_token_id=stop, pad_token_id=0,
        )
        expected = rows[0, len(prompt):].numpy()
        np.testing.assert_array_equal(ours.sequences[i], expected)
        assert ours.stopped[i] == (expected[-1] == stop)
        lengths.add(len(expected))
    assert max(lengths) > 5
