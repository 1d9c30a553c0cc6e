"""The tower against transformers' Dinov2Model on random weights, and its preprocessing against torch's resizing."""

import jax
import numpy as np
import pytest

from research.vision import dinov2, hf

pytestmark = [
    pytest.mark.parity,
    # Their own affair; warnings of ours stay errors.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(torch|transformers)"),
    pytest.mark.filterwarnings("ignore::FutureWarning:(torch|transformers)"),
    pytest.mark.filterwarnings("ignore::UserWarning:(torch|transformers)"),
]


def make(swiglu: bool):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=56, use_swiglu_ffn=swiglu
    )
    torch.manual_seed(0)
    model = transformers.Dinov2Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return torch, model


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("size", [(56, 56), (84, 42)])
def test_tokens_are_those_of_transformers(swiglu, size, tmp_path):
    torch, theirs = make(swiglu)
    theirs.save_pretrained(tmp_path)
    model, params = hf.load(tmp_path)
    pixels = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        want = theirs(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).last_hidden_state.numpy()
    with jax.default_matmul_precision("highest"):
        got = np.asarray(model.apply({"params": params}, pixels))
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("swiglu", [False, True])
def test_transformers_reads_what_is_saved(swiglu, tmp_path):
    torch, theirs = make(swiglu)
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = hf.load(tmp_path / "theirs")
    hf.save(tmp_path / "ours", model, params)
    import transformers

    back, report = transformers.Dinov2Model.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (name, a), (_, b) in zip(theirs.named_parameters(), back.named_parameters(), strict=True):
        if "mask_token" not in name:
            np.testing.assert_array_equal(a.detach().numpy(), b.detach().numpy(), err_msg=name)


@pytest.mark.parametrize(("old", "new"), [(512, 518), (512, 126), (64, 64)])
def test_images_are_resized_as_by_torch(old, new):
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(0).uniform(-1, 1, (1, old, old, 3)).astype(np.float32)
    unit = torch.from_numpy((image.transpose(0, 3, 1, 2) + 1) / 2)
    want = torch.nn.functional.interpolate(unit, (new, new), mode="bilinear", antialias=True, align_corners=False)
    want = (want.numpy().transpose(0, 2, 3, 1) - dinov2.MEAN) / dinov2.STD
    np.testing.assert_allclose(dinov2.preprocess(image, new), want, atol=1e-5)
