"""Photographs to conditions: any image becomes a centred object on white (released image processor).

An image without transparency is cut out first, by a matting function: anything that maps a PIL RGB image to an
RGBA one, such as `rembg.remove`. The object's longer side then takes 85 % of a square, centred; the square is laid on
white and resized.
"""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Matting = Callable[[Image.Image], Image.Image]
Source = str | pathlib.Path | Image.Image | np.ndarray

BORDER = 0.15  # of the square's side, that is left free
_LEAST = 16  # pixels on the longer side, of an image or of the object in it
_MOST_STRETCHED = 100  # times longer than wide: a line, not an object
_MOST_SIDE = 8  # times the result's side: of the square, which a long image would make huge


class ImageError(ValueError):
    """An image that cannot be a condition; the message says which, why, and what to do."""


class Prepared(NamedTuple):
    """`image_SS3` float32 in [-1, 1], on white; `mask_SS` float32 in [0, 1], how much a pixel is the object's."""

    image_SS3: np.ndarray
    mask_SS: np.ndarray


def prepare(
    source: Source, size: int = 512, *, matting: Matting | None = None, border: float = BORDER
) -> Prepared:
    """The object of an image as a condition: `recentre(cut_out(source, matting), size, border)`."""
    return recentre(cut_out(source, matting), size, border)


def cut_out(source: Source, matting: Matting | None = None) -> Image.Image:
    """The image as RGBA, 8 bits and upright, transparent where its object is not.

    Args:
      source: a file, a PIL image, or an array, uint8, uint16 or float in [0, 1], `[H, W]` or `[H, W, C]` with 1, 3 or 4
        channels. Grey, palette, CMYK and 16-bit images are converted, those with an EXIF orientation turned; of an
        animation the first picture counts.
      matting: cuts out the object of an image without transparent pixels; None: `rembg`, if it is installed.

    Raises:
      FileNotFoundError: the file.
      ImageError: a file that is no image, or a damaged one; an array of another kind, pixels of more than 16 bits;
        images and objects of less than 16 pixels, lines; an image that is transparent all over; one that is opaque,
        when there is no matting, or that matting fails at, or leaves opaque or empty.
    """
    name = _name(source)
    image = read(source)
    if (
        np.asarray(image.getchannel("A")).min() == 255
    ):  # whatever its mode: an opaque one says nothing
        image = _matted(image, matting, name)
    _box(image, name)
    return image


def recentre(image: Image.Image, size: int = 512, border: float = BORDER) -> Prepared:
    """The object of a `cut_out` in the middle of a square of `size` pixels, of whose side it leaves `border` free.

    An image with a side of more than 8 `size` is made that small on the way.
    """
    box = _box(image, "the image")
    width, height = box[2] - box[0], box[3] - box[1]
    side = min(max(image.size), _MOST_SIDE * size)
    scale = side * (1 - border) / max(width, height)
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    # Boxes average areas; enlarged by them, pixels would become blocks.
    resampling = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
    square = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    square.paste(
        image.crop(box).resize((width, height), resampling),
        ((side - width) // 2, (side - height) // 2),
    )
    white = Image.alpha_composite(
        Image.new("RGBA", square.size, (255, 255, 255, 255)), square
    ).convert("RGB")
    pixels = np.asarray(white.resize((size, size), Image.Resampling.BICUBIC), np.float32)
    mask = np.asarray(
        square.getchannel("A").resize((size, size), Image.Resampling.NEAREST), np.float32
    )
    return Prepared(pixels / 127.5 - 1, mask / 255)


def read(source: Source) -> Image.Image:
    """The image as RGBA, upright, 8 bits. Raises as `cut_out`, which see."""
    if isinstance(source, np.ndarray):
        return _from_array(source)
    name = _name(source)
    try:
        if isinstance(source, Image.Image):
            return _upright(source, name)
        if not pathlib.Path(source).is_file():
            raise FileNotFoundError(f"there is no image {source}")
        with Image.open(source) as image:
            return _upright(image, name)
    except (FileNotFoundError, ImageError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name} is not an image that can be read (PNG, JPEG, WebP, ... can)"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error}; make it smaller first") from error
    except Exception as error:  # decoders raise many kinds
        raise ImageError(f"{name} is damaged or cannot be read: {error}") from error


def _name(source: Source) -> str:
    return str(source) if isinstance(source, (str, pathlib.Path)) else "the image"


def _upright(image: Image.Image, name: str) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if max(image.size) < _LEAST:
        raise ImageError(
            f"{name} is {image.width} x {image.height} pixels; the object needs at least {_LEAST} on its longer side"
        )
    if image.mode.startswith("I"):  # 16 bits, in whatever mode this version of Pillow keeps them
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ImageError(
                f"{name} has pixels from {pixels.min()} to {pixels.max()}; save it with 8 or 16 bits"
            )
        return _from_array(pixels.astype(np.uint16))
    if image.mode == "F":
        raise ImageError(
            f"{name} has floating-point pixels, of unknown range; save it with 8 or 16 bits"
        )
    return image.convert("RGBA")


def _from_array(array: np.ndarray) -> Image.Image:
    pixels = array[..., None] if array.ndim == 2 else array
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4) or not all(pixels.shape):
        raise ImageError(
            f"an image must be [H, W], or [H, W, C] with 1, 3 or 4 channels, not {array.shape}"
        )
    if max(pixels.shape[:2]) < _LEAST:
        raise ImageError(
            f"the image is {pixels.shape[1]} x {pixels.shape[0]} pixels; the object needs at least {_LEAST} on its "
            "longer side"
        )
    if pixels.dtype == np.uint16:
        pixels = (pixels.astype(np.float32) / 257 + 0.5).astype(np.uint8)
    elif np.issubdtype(pixels.dtype, np.floating):
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise ImageError(
                f"float pixels must be in [0, 1], these are in [{pixels.min():g}, {pixels.max():g}]"
            )
        pixels = (pixels * 255 + 0.5).astype(np.uint8)
    elif pixels.dtype != np.uint8:
        raise ImageError(f"pixels must be uint8, uint16 or float, not {pixels.dtype}")
    if pixels.shape[-1] == 1:
        pixels = np.repeat(pixels, 3, -1)
    return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGBA")


def _matted(image: Image.Image, matting: Matting | None, name: str) -> Image.Image:
    if matting is None:
        try:
            from rembg import remove as matting
        except ModuleNotFoundError as error:
            raise ImageError(
                f"{name} has no transparent pixels, so what its object is cannot be told. Give it an alpha channel, or "
                "install what cuts objects out: pip install 'rembg[cpu]' (downloads a network on first use)"
            ) from error
    try:
        cut = matting(image.convert("RGB"))
    except Exception as error:  # of one image; others may be cut out
        raise ImageError(f"{name}: matting failed: {type(error).__name__}: {error}") from error
    if not isinstance(cut, Image.Image) or cut.size != image.size or cut.mode != "RGBA":
        raise ImageError(f"{name}: matting must return an RGBA image of the same size, got {cut!r}")
    if np.asarray(cut.getchannel("A")).min() == 255:
        raise ImageError(f"{name}: matting found no background; give the image an alpha channel")
    return cut


def _box(image: Image.Image, name: str) -> tuple[int, int, int, int]:
    """Of what is not fully transparent."""
    box = image.getchannel("A").getbbox()
    if box is None:
        raise ImageError(f"{name} shows nothing: it is transparent all over")
    width, height = box[2] - box[0], box[3] - box[1]
    if max(width, height) < _LEAST or max(width, height) > _MOST_STRETCHED * min(width, height):
        raise ImageError(
            f"{name}: its object, what is not transparent, is {width} x {height} pixels, too little to tell a shape; "
            "are there stray pixels?"
        )
    return box
