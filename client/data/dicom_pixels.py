"""From a DICOM file to what a viewer would show.

Modality units (rescale slope and intercept), the task's window or else the file's own, low .. high of the task's schema, and
MONOCHROME1 turned so that more is brighter: PS3.3 C.11.1, C.11.2 and C.7.6.3.1.2. Nothing but the one file decides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wardround.client.data.identifiers import PIXELS, quietly
from wardround.client.data.image_files import LARGEST_PICTURE
from wardround.common.errors import DataRefused
from wardround.common.tasks.images import ImageSchema

if TYPE_CHECKING:
    from pydicom import Dataset


_BITS = {"PixelData": (1, 8, 16, 32), "FloatPixelData": (32,), "DoubleFloatPixelData": (64,)}  # PS3.5, 8.1.1


def has_picture(dataset: Dataset) -> bool:
    """Whether it holds pixels: a report, a plan, a directory does not."""
    return any(tag in dataset for tag in PIXELS) and "Rows" in dataset


def only_picture(dataset: Dataset, keyword: str) -> bytes:
    """Uncompressed pixels and nothing else: what lies behind the last, or in bits that no pixel uses, is gone.

    Bits above HighBit become the sign, or 0: PS3.5, 8.1.1.

    Raises:
        ValueError: the pixels are not what the header says.
    """
    from pydicom.pixels.utils import get_expected_length

    if int(dataset.BitsAllocated) not in _BITS[keyword]:
        raise ValueError("pixels of another size than the standard's")
    length = get_expected_length(dataset)
    data = bytes(dataset[keyword].value[:length])
    if len(data) < length or not length:
        raise ValueError("fewer pixels than the header says")
    return _stored_bits(data, dataset) + bytes(length % 2)


def _stored_bits(data: bytes, dataset: Dataset) -> bytes:
    allocated = int(dataset.BitsAllocated)
    stored = int(dataset.get("BitsStored") or allocated)
    high = int(dataset.get("HighBit", stored - 1))
    if not 0 < stored <= high + 1 <= allocated:
        raise ValueError("bits that cannot be")
    if stored == allocated:
        return data
    kind = np.dtype(f"<u{allocated // 8}")
    values = np.frombuffer(data, kind) & kind.type(((1 << stored) - 1) << (high + 1 - stored))
    if dataset.get("PixelRepresentation") == 1:
        above = kind.type((1 << allocated) - (1 << (high + 1)))
        values = np.where(values & kind.type(1 << high), values | above, values)
    return bytes(values.astype(kind).tobytes())


def shown(dataset: Dataset, schema: ImageSchema) -> NDArray[np.float32]:
    """(height, width) or (height, width, 3), low .. high of the schema.

    Raises:
        DataRefused: no single picture, one of a modality the task does not take, or pixels that cannot be decoded here.
    """
    if schema.modalities and dataset.get("Modality") not in schema.modalities:
        wanted = ", ".join(schema.modalities)
        raise DataRefused("a file's modality is not the task's", detail=f"{dataset.get('Modality')}; wanted {wanted}")
    try:
        with quietly(), np.errstate(all="ignore"):
            if not has_picture(dataset) or int(dataset.get("NumberOfFrames") or 1) != 1:
                raise DataRefused("a file holds no single picture")
            if not 0 < int(dataset.Rows) * int(dataset.Columns) <= LARGEST_PICTURE:
                raise DataRefused("a picture is too large", detail=f"{dataset.Columns} x {dataset.Rows} pixels")
            return _decoded(dataset, schema)
    except DataRefused:
        raise
    except Exception as error:  # every decoder has its own
        syntax = getattr(dataset, "file_meta", {}).get("TransferSyntaxUID")
        why = " ".join(str(error).split())
        detail = f"{getattr(syntax, 'name', syntax)}: {why}; docs/data.md lists decoders"
        raise DataRefused("a picture's pixels cannot be decoded", detail=detail) from None


def _decoded(dataset: Dataset, schema: ImageSchema) -> NDArray[np.float32]:
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut

    kind, stored = str(dataset.PhotometricInterpretation), dataset.pixel_array
    bits = int(dataset.BitsStored)
    if kind == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
        bits = 8 * stored.dtype.itemsize
    if stored.ndim == 3:  # pydicom has turned YBR into RGB
        most = 2.0**bits - 1
        return np.asarray(schema.low + stored.astype(np.float64) / most * (schema.high - schema.low), dtype=np.float32)
    values = apply_modality_lut(stored, dataset)
    own = _own_window(dataset)
    if schema.window is not None:
        seen = schema.windowed(values, *schema.window)
    elif own is not None:
        seen = schema.windowed(values, *own)
    else:
        values = apply_voi_lut(values, dataset) if "VOILUTSequence" in dataset else values
        inner = values[stored != dataset["PixelPaddingValue"].value] if "PixelPaddingValue" in dataset else values
        inner = inner if inner.size else values
        low, high = float(inner.min()), float(inner.max())
        seen = schema.windowed(values, (low + high) / 2, max(high - low, 1e-6))
    return np.asarray(schema.low + schema.high - seen, dtype=np.float32) if kind == "MONOCHROME1" else seen


def _own_window(dataset: Dataset) -> tuple[float, float] | None:
    """Centre and width of the file's first window for `ImageSchema.windowed`; None where it has none, or no straight one."""

    def first(keyword: str) -> Any:
        value = dataset.get(keyword)
        return value[0] if value is not None and not isinstance(value, str | int | float) and len(value) else value

    centre, width, function = first("WindowCenter"), first("WindowWidth"), str(dataset.get("VOILUTFunction") or "LINEAR")
    if centre is None or width is None or function == "SIGMOID":
        return None
    if function == "LINEAR_EXACT":
        return (float(centre), float(width)) if float(width) > 0 else None
    # LINEAR counts whole grey levels: PS3.3 C.11.2.1.2.1
    return (float(centre) - 0.5, max(float(width) - 1, 1e-6)) if float(width) >= 1 else None
