"""Images to conditions: where the object goes, and which images are refused with which words."""

import sys

import numpy as np
import pytest
from PIL import Image

from research.hunyuan3d_2 import condition
from research.hunyuan3d_2.condition import ImageError, prepare

RED = (200, 40, 30)


def box(width=400, height=300, x=(50, 250), y=(100, 200), colour=RED):
    """An opaque box on a transparent ground that is green where one does not see it; uint8 RGBA."""
    image = np.zeros((height, width, 4), np.uint8)
    image[..., 1] = 255
    image[y[0] : y[1], x[0] : x[1]] = (*colour, 255)
    return image


def span(mask, axis):
    found = np.flatnonzero((mask > 0.5).any(axis))
    return found[0], found[-1]


def close(a, b):
    return all(abs(x - y) <= 1 for x, y in zip(a, b, strict=True))


def test_the_object_goes_where_the_released_processor_puts_it():
    image, mask = prepare(box())
    assert image.shape == (512, 512, 3) and image.dtype == np.float32 and mask.shape == (512, 512)
    # Measured of the released processor for this very image.
    assert close(span(mask, 1), (148, 363)) and close(span(mask, 0), (39, 473))
    np.testing.assert_allclose(image[256, 256], np.array(RED) / 127.5 - 1, atol=1e-6)
    assert (image[:140] == 1).all() and (image[:, :30] == 1).all()  # white, and nothing green
    edge = image[(image[..., 0] < 0.99) & (mask < 0.5)]
    assert (edge[:, 1] <= edge[:, 0] + 0.02).all()


@pytest.mark.parametrize("shape", [(400, 300), (300, 400), (64, 64), (900, 20), (2500, 500)])
def test_any_object_is_centred_with_its_longer_side_85_percent(shape):
    width, height = shape
    _, mask = prepare(box(width + 13, height + 40, (3, 3 + width), (30, 30 + height)), 256)
    (top, bottom), (left, right) = span(mask, 1), span(mask, 0)
    assert abs(max(bottom - top, right - left) + 1 - 0.85 * 256) <= 2
    assert abs(top + bottom - 255) <= 2 and abs(left + right - 255) <= 2
    assert (bottom - top + 1) / (right - left + 1) == pytest.approx(height / width, abs=0.02)


def test_a_long_image_takes_no_huge_square_and_becomes_what_a_small_one_does(monkeypatch):
    """A square of its own 6,000 pixels would take 36 million, and that of a scan gigabytes."""
    small = box(600, 60, (20, 590), (15, 50))
    long = small.repeat(10, 0).repeat(10, 1)
    expected, made, new = prepare(small, 64), [], Image.new
    monkeypatch.setattr(
        Image, "new", lambda mode, size, *a: (made.append(size), new(mode, size, *a))[1]
    )
    found = prepare(long, 64)
    assert made and max(max(size) for size in made) <= 512
    for axis in (0, 1):
        assert close(span(found.mask_SS, axis), span(expected.mask_SS, axis))
    assert np.abs(found.image_SS3 - expected.image_SS3).mean() < 0.01


def test_half_transparent_pixels_mix_with_white():
    image = box()
    image[100:200, 50:250, 3] = 128
    out, mask = prepare(image)
    assert mask[256, 256] == pytest.approx(128 / 255)
    expected = (np.array(RED) * 128 + 255 * 127) / 255 / 127.5 - 1
    np.testing.assert_allclose(out[256, 256], expected, atol=0.01)


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def test_files_of_all_kinds_are_read(tmp_path):
    rgba = box()
    expected = prepare(rgba).image_SS3
    assert np.abs(prepare(save(tmp_path / "a.png", rgba)).image_SS3 - expected).max() == 0
    webp = str(save(tmp_path / "a.webp", rgba, lossless=True, exact=True))
    assert np.abs(prepare(webp).image_SS3 - expected).max() == 0
    assert np.abs(prepare(Image.fromarray(rgba)).image_SS3 - expected).max() == 0
    assert np.abs(prepare(rgba.astype(np.float32) / 255).image_SS3 - expected).max() == 0
    assert np.abs(prepare(rgba.astype(np.uint16) * 257).image_SS3 - expected).max() == 0
    palette = Image.new("P", (400, 300), 0)
    palette.putpalette([0, 0, 0, *RED])
    palette.paste(1, (50, 100, 250, 200))
    palette.save(tmp_path / "p.png", transparency=0)
    np.testing.assert_allclose(prepare(tmp_path / "p.png").image_SS3[256, 256], expected[256, 256])
    grey = Image.fromarray(rgba).convert("LA")
    grey.save(tmp_path / "la.png")
    centre = prepare(tmp_path / "la.png").image_SS3[256, 256]
    assert np.ptp(centre) == 0 and -1 < centre[0] < 0


def cut_left_half(image):
    """A matting that keeps the left half."""
    assert image.mode == "RGB"
    array = np.asarray(image.convert("RGBA")).copy()
    array[:, array.shape[1] // 2 :, 3] = 0
    return Image.fromarray(array)


def test_opaque_images_are_cut_out_whatever_their_mode(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rembg", None)  # as if it were not installed
    photo = box()
    photo[..., 3] = 255  # RGBA, and yet nothing is transparent
    for source in (photo, photo[..., :3], photo[..., 0], photo[..., :1]):
        with pytest.raises(
            ImageError, match="no transparent pixels.*alpha channel.*pip install 'rembg"
        ):
            prepare(source)
        assert close(span(prepare(source, matting=cut_left_half).mask_SS, 1), (38, 473))
    cmyk = tmp_path / "photo.jpg"
    Image.fromarray(photo[..., :3]).convert("CMYK").save(cmyk, quality=95)
    out = prepare(cmyk, matting=cut_left_half).image_SS3
    assert np.abs(out[256, 256] - (np.array(RED) / 127.5 - 1)).max() < 0.1
    deep = (photo[..., 0].astype(np.uint16) * 257).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    out = prepare(tmp_path / "deep.png", matting=cut_left_half).image_SS3
    np.testing.assert_allclose(out[256, 256], RED[0] / 127.5 - 1, atol=0.01)


def test_matting_that_finds_no_object_is_said_so():
    photo = box()[..., :3]
    with pytest.raises(ImageError, match="found no background"):
        prepare(photo, matting=lambda image: image.convert("RGBA"))
    with pytest.raises(ImageError, match="must return an RGBA image"):
        prepare(photo, matting=lambda image: image.convert("L"))
    with pytest.raises(ImageError, match="transparent all over"):
        prepare(photo, matting=lambda image: Image.new("RGBA", image.size))
    with pytest.raises(ImageError, match="the image: matting failed: KeyError: 'scissors'"):
        prepare(photo, matting=lambda image: {}["scissors"])


def test_rembg_is_used_where_it_is_installed(monkeypatch):
    module = type(sys)("rembg")
    module.remove = cut_left_half
    monkeypatch.setitem(sys.modules, "rembg", module)
    assert prepare(box()[..., :3]).mask_SS.max() == 1


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    Image.fromarray(box()).save(tmp_path / "turned.png", exif=exif)
    mask = prepare(tmp_path / "turned.png").mask_SS
    (top, bottom), (left, right) = span(mask, 1), span(mask, 0)
    assert bottom - top > 1.9 * (right - left)


def one_pixel():
    image = np.zeros((100, 100, 4), np.uint8)
    image[50, 50] = 255
    return image


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((100, 100, 4), np.uint8), "transparent all over"),
        (one_pixel(), "1 x 1 pixels, too little"),
        (box(400, 300, (0, 400), (10, 11)), "400 x 1 pixels, too little"),
        (box(8, 8, (1, 5), (1, 5)), "8 x 8 pixels; the object needs at least 16"),
        (np.zeros((30, 30, 2), np.uint8), "1, 3 or 4 channels"),
        (np.zeros((0, 30, 3), np.uint8), "not \\(0, 30, 3\\)"),
        (np.zeros((30, 30, 3), np.int64), "not int64"),
        (np.full((30, 30, 3), 200.0), "in \\[0, 1\\], these are in \\[200, 200\\]"),
        (np.full((30, 30, 4), np.nan), "in \\[0, 1\\]"),
        (Image.new("F", (30, 30)), "floating-point"),
        (Image.new("I", (30, 30), 70_000), "pixels from 70000 to 70000"),
        (Image.new("I", (30, 30), -1), "pixels from -1 to -1"),
        (Image.new("RGBA", (5, 7)), "5 x 7 pixels"),
    ],
)
def test_bad_images_are_refused_with_the_reason(image, message):
    with pytest.raises(ImageError, match=message):
        prepare(image)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no image .*absent.png"):
        prepare(tmp_path / "absent.png")
    text = tmp_path / "text.png"
    text.write_text("not an image")
    with pytest.raises(ImageError, match="text.png is not an image"):
        prepare(text)
    whole = save(
        tmp_path / "whole.png", np.random.default_rng(0).integers(0, 255, (90, 90, 4), np.uint8)
    ).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match="cut.png is damaged"):
        prepare(tmp_path / "cut.png")
    with Image.open(tmp_path / "cut.png") as image:  # which reads no pixels yet
        with pytest.raises(ImageError, match="the image is damaged"):
            prepare(image)


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp", "webp", "tif"])
def test_files_cut_off_anywhere_are_named(tmp_path, kind):
    """Where a file ends decides what its decoder raises, on opening or on reading."""
    path = tmp_path / f"cut.{kind}"
    noise = np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)
    whole = save(path, noise).read_bytes()
    for length in (*range(1, 60, 3), len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(ImageError, match=f"cut.{kind} is "):
            condition.read(path)


def test_reading_gives_rgba():
    assert condition.read(box()[..., :3]).mode == "RGBA"
