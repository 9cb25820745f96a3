"""A frame drawn for the eye: decoded, windowed, eight bits a sample; for looking at, not for a diagnosis.

What bytes from outside can break is caught here: codecs raise what they like. Source: PS3.18 8.3.5, PS3.3 C.11.2.1.
"""

from __future__ import annotations

import io
import math
import re
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.pixels.processing import convert_color_space
from pydicom.uid import UID

from storescp.desk.web_pixels import Layout

# A frame that is decoded is in memory, several times.
PIXELS_LIMIT = 64 << 20
_SIDE_LIMIT = 16_384
_FUNCTIONS = {"linear", "linear-exact", "sigmoid"}
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", re.ASCII)


class DrawError(Exception):
    """A frame cannot be decoded or drawn here; the message says why, and no value."""


class Wishes(NamedTuple):
    """How it is to be drawn: window center and width with a function, JPEG's quality, the largest width and height."""

    window: tuple[float, float, str] | None = None
    quality: int = 90
    viewport: tuple[int, int] | None = None


def wishes(parameters: dict[str, str]) -> Wishes:
    """Return what a URL's parameters wish for.

    Raises:
        ValueError: One is malformed or not supported; the message names it.
    """
    window = viewport = None
    if text := parameters.get("window"):
        center, width, function = [*text.split(","), "linear"][:3] if text.count(",") in {1, 2} else ("", "", "")
        numbers = [_number(part) for part in (center, width)]
        if None in numbers or function not in _FUNCTIONS or not numbers[1] or numbers[1] <= 0:
            raise ValueError("window is center,width,function: linear, linear-exact or sigmoid")
        window = (float(numbers[0] or 0), float(numbers[1]), function)
    quality = parameters.get("quality", "90")
    if not quality.isascii() or not quality.isdecimal() or not 1 <= int(quality[:9]) <= 100:
        raise ValueError("quality is a number from 1 to 100")
    if text := parameters.get("viewport"):
        sides = text.split(",")
        if len(sides) != 2 or not all(s.isascii() and s.isdecimal() and 0 < int(s[:9]) <= _SIDE_LIMIT for s in sides):
            raise ValueError("viewport is width,height; no part of an image is cut out here")
        viewport = (int(sides[0]), int(sides[1]))
    return Wishes(window, int(quality), viewport)


def is_decodable(transfer_syntax: str) -> bool:
    """Tell whether pydicom has what decodes a transfer syntax."""
    try:
        return bool(get_decoder(UID(transfer_syntax)).is_available)
    except NotImplementedError:
        return False


def native(frame: bytes, layout: Layout, transfer_syntax: str) -> tuple[bytes, str]:
    """Decode a compressed frame.

    Returns:
        The samples, little endian, and their photometric interpretation.

    Raises:
        DrawError: It cannot be done.
    """
    if layout.frame_bits > PIXELS_LIMIT * 8:
        raise DrawError("its frames are too large to be decoded")
    if not is_decodable(transfer_syntax):
        raise DrawError(f"nothing here decodes {transfer_syntax}")
    try:
        buffer, meta = get_decoder(UID(transfer_syntax)).as_buffer(
            encapsulate([frame]),
            index=0,
            raw=False,
            rows=layout.rows,
            columns=layout.columns,
            samples_per_pixel=layout.samples,
            photometric_interpretation=layout.photometric,
            bits_allocated=layout.allocated,
            bits_stored=layout.stored,
            pixel_representation=layout.signed,
            planar_configuration=layout.planar,
            number_of_frames=1,
            transfer_syntax_uid=UID(transfer_syntax),
            pixel_keyword="PixelData",
        )
    except Exception as error:
        raise DrawError(f"it does not decode: {type(error).__name__}") from error
    samples = bytes(buffer)
    if int(meta["bits_allocated"]) != layout.allocated or len(samples) < layout.rows * layout.columns * layout.samples:
        raise DrawError("it decodes to something else than it says")
    if layout.samples > 1 and int(meta.get("planar_configuration", 0) or 0) != layout.planar:
        samples = _interleaved(samples, layout, planar=layout.planar == 0)
    colours = str(meta["photometric_interpretation"])
    # Decoded, no sample is shared by two pixels any more.
    return samples, "YBR_FULL" if colours == "YBR_FULL_422" else colours


def draw(samples: bytes, layout: Layout, photometric: str, kind: str, wished: Wishes) -> bytes:
    """Return a frame as image/jpeg or image/png.

    Args:
        samples: Native, little endian.
        layout: What the head says.
        photometric: What the samples are.
        kind: The media type.
        wished: How to draw.

    Raises:
        DrawError: It cannot be drawn.
    """
    if layout.frame_bits > PIXELS_LIMIT * 8:
        raise DrawError("its frames are too large to be drawn")
    try:
        image = _image(samples, layout, photometric, wished)
        if wished.viewport is not None:
            factor = min(wished.viewport[0] / image.width, wished.viewport[1] / image.height)
            image = image.resize((max(1, int(image.width * factor)), max(1, int(image.height * factor))))
        out = io.BytesIO()
        if kind == "image/png":
            image.save(out, "PNG")
        else:
            image.save(out, "JPEG", quality=wished.quality)
    except DrawError:
        raise
    except Exception as error:
        raise DrawError(f"it cannot be drawn: {type(error).__name__}") from error
    return out.getvalue()


def _image(samples: bytes, layout: Layout, photometric: str, wished: Wishes) -> Image.Image:
    shape = (layout.rows, layout.columns)
    if layout.samples == 1 and photometric in {"MONOCHROME1", "MONOCHROME2"}:
        return Image.fromarray(_grey(_pixels(samples, layout).reshape(shape), layout, photometric, wished.window))
    if layout.samples == 3 and layout.allocated == 8 and photometric in {"RGB", "YBR_FULL"}:
        plain = _interleaved(samples, layout, planar=False) if layout.planar else samples
        colours = np.frombuffer(plain, np.uint8, layout.rows * layout.columns * 3).reshape((*shape, 3))
        if photometric != "RGB":
            colours = convert_color_space(colours, photometric, "RGB")
        return Image.fromarray(colours)
    raise DrawError(f"{layout.samples} samples of {layout.allocated} bits are not drawn in this colour model")


def _pixels(samples: bytes, layout: Layout) -> np.ndarray[Any, Any]:
    count = layout.rows * layout.columns
    if layout.allocated == 1:
        bits: np.ndarray[Any, Any] = np.unpackbits(np.frombuffer(samples, np.uint8), bitorder="little")[:count]
        return bits.astype(np.float32)
    if layout.allocated not in {8, 16, 32}:
        raise DrawError(f"pixels of {layout.allocated} bits are not drawn")
    found = np.frombuffer(samples, f"<u{layout.allocated // 8}", count)
    # What lies above the stored bits is not the pixel's.
    depth = min(layout.stored or layout.allocated, layout.allocated)
    values: np.ndarray[Any, Any] = (found & np.array((1 << depth) - 1, found.dtype)).astype(np.float64)
    if layout.signed:
        values[values >= 1 << (depth - 1)] -= 1 << depth
    return values


def _grey(
    values: np.ndarray[Any, Any], layout: Layout, photometric: str, window: tuple[float, float, str] | None
) -> np.ndarray[Any, Any]:
    slope, intercept = _number(layout.slope), _number(layout.intercept)
    values = values * (1.0 if slope is None else slope) + (intercept or 0.0)
    center, width = _number(layout.center), _number(layout.width)
    if window is None and center is not None and width is not None and width >= 1:
        window = (center, width, "linear")
    if window is None:
        low, high = float(values.min()), float(values.max())
        shown = (values - low) / ((high - low) or 1.0)
    else:
        center, width, function = window
        if function == "sigmoid":
            shown = 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -500, 500)))
        elif function == "linear-exact" or width <= 1:
            shown = (values - center) / width + 0.5
        else:
            shown = (values - (center - 0.5)) / (width - 1) + 0.5
    grey = (np.clip(shown, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return 255 - grey if photometric == "MONOCHROME1" else grey


def _interleaved(samples: bytes, layout: Layout, *, planar: bool) -> bytes:
    """Return colours plane by plane as pixel by pixel; ``planar`` is the other way."""
    words = np.frombuffer(samples, f"<u{layout.allocated // 8}", layout.rows * layout.columns * layout.samples)
    shape = (-1, layout.samples) if planar else (layout.samples, -1)
    return words.reshape(shape).T.tobytes()


def _number(text: str) -> float | None:
    text = text.strip()
    if not _NUMBER.fullmatch(text):
        return None
    number = float(text)
    return number if math.isfinite(number) else None
