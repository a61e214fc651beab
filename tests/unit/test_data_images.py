"""Image columns as files hold them."""

from __future__ import annotations

import io
import json
import sys
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from rayfed_lora.data.dataset import load
from rayfed_lora.data.images import as_tensors
from rayfed_lora.data.place import Place
from rayfed_lora.errors import DataError
from rayfed_lora.recipe.data import Data

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (4, 5, 6))
RGB = RNG.integers(0, 256, (4, 5, 6, 3))
UINT8_LISTS = pa.list_(pa.list_(pa.uint8()))


def tensors(values, kind=None) -> np.ndarray:
    array = values if isinstance(values, pa.Array) else pa.array(values, type=kind)
    return as_tensors(pa.chunked_array([array]), Place("here")).to_numpy_ndarray()


def scaled(pixels: np.ndarray) -> np.ndarray:
    return pixels / 127.5 - 1.0


class FakeImage:
    """As much of PIL.Image.Image as is used; a grey image converts to three equal channels."""

    def __init__(self, mode: str, pixels: np.ndarray) -> None:
        self.mode, self.pixels = mode, pixels
        self.size = (pixels.shape[1], pixels.shape[0])

    def load(self) -> None:
        """All of it is there."""

    def convert(self, mode: str) -> FakeImage:
        assert mode == "RGB"
        pixels = self.pixels
        return FakeImage(mode, np.stack([pixels] * 3, -1) if pixels.ndim == 2 else pixels[..., :3])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.pixels.astype(np.uint8)


@pytest.fixture
def pillow(monkeypatch):
    """A fake Pillow that decodes JSON `[mode, pixels]`."""

    def open_image(stream) -> FakeImage:
        content = stream.read()
        if not content.startswith(b"["):
            raise OSError("cannot identify image file")
        mode, pixels = json.loads(content)
        return FakeImage(mode, np.array(pixels))

    package, module = ModuleType("PIL"), ModuleType("PIL.Image")
    module.open = open_image
    module.DecompressionBombError = type("DecompressionBombError", (Exception,), {})
    package.Image, package.ImageOps = module, ModuleType("PIL.ImageOps")
    monkeypatch.setitem(sys.modules, "PIL", package)
    monkeypatch.setitem(sys.modules, "PIL.Image", module)


def encode(mode: str, pixels: np.ndarray) -> bytes:
    return json.dumps([mode, pixels.tolist()]).encode()


def test_grey_lists_of_bytes_get_a_channel_and_are_scaled():
    images = tensors(GREY.tolist(), UINT8_LISTS)
    assert images.dtype == np.float32
    assert images.shape == (4, 1, 5, 6)
    np.testing.assert_allclose(images[:, 0], scaled(GREY), atol=1e-6)


def test_channels_last_are_moved_to_the_front():
    np.testing.assert_allclose(tensors(RGB.tolist()), scaled(RGB.transpose(0, 3, 1, 2)), atol=1e-6)


def test_channels_first_are_left_there():
    first = RGB.transpose(0, 3, 1, 2)
    np.testing.assert_allclose(tensors(first.tolist()), scaled(first), atol=1e-6)


def test_floats_are_kept_as_they_are():
    floats = RNG.normal(size=(4, 5, 6))
    np.testing.assert_allclose(tensors(floats.tolist())[:, 0], floats, rtol=1e-6)


@pytest.mark.parametrize(
    "array",
    [
        pa.array(GREY.tolist(), pa.large_list(pa.large_list(pa.int16()))),
        pa.array(GREY.tolist(), pa.list_(pa.list_(pa.uint8(), 6), 5)),
        pa.FixedShapeTensorArray.from_numpy_ndarray(GREY.astype(np.uint8)),
        pa.array([[[0] * 6] * 5, *GREY.tolist()], UINT8_LISTS).slice(1),
    ],
    ids=["large lists", "fixed-size lists", "tensors", "slice"],
)
def test_every_arrow_form_of_the_same_images_gives_the_same_tensors(array):
    np.testing.assert_allclose(tensors(array)[:, 0], scaled(GREY), atol=1e-6)


def test_images_in_several_chunks_are_put_together():
    column = pa.chunked_array([pa.array(GREY[:1].tolist()), pa.array(GREY[1:].tolist())])
    images = as_tensors(column, Place("here")).to_numpy_ndarray()
    np.testing.assert_allclose(images[:, 0], scaled(GREY), atol=1e-6)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
def test_image_files_load_with_their_labels(tmp_path, suffix):
    path = tmp_path / f"images{suffix}"
    pixels = RNG.integers(0, 256, (20, 4, 4))
    table = pa.table({"pixels": pixels.tolist(), "target": list(range(2)) * 10})
    if suffix == ".parquet":
        parquet.write_table(table, path)
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in table.to_pylist()))
    else:
        path.write_text(json.dumps(table.to_pylist()))
    dataset = load(Data(source=str(path), test_fraction=0.5), "image-classification", 0, 0.0)
    # rows keep their order within a part, and labels alternate, so that parts can be matched by set
    found = {
        (row.tobytes(), label)
        for part in (dataset.train, dataset.test)
        for row, label in zip(
            part["image"].combine_chunks().to_numpy_ndarray(),
            part["label"].to_pylist(),
            strict=True,
        )
    }
    reference = (pixels.astype(np.float32) / np.float32(127.5) - np.float32(1))[:, None]
    assert found == {(image.tobytes(), i % 2) for i, image in enumerate(reference)}


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([[[1, 2], [3, 4]], None], "null in row 2"),
        ([[[1, 2], [3, 4]], [[1, 2], None]], "null inside an image"),
        ([[[1, 2], [3, 4]], [[1, 2], [3, None]]], "null inside an image"),
        ([[[1, 2], [3, 4]], [[1, 2]]], "lists of 2 and 1 .* row 2"),
        ([[[1, 2], [3, 4]], [[1, 2], [3]]], "lists of 2 and 1 .* row 2"),
        ([[[0, 256]]], "from 0 to 255, got 0 to 256"),
        ([[[-1, 0]]], "from 0 to 255, got -1 to 0"),
        ([[[0.0, float("nan")]]], "finite pixels"),
        ([[["a"]]], "nested lists of numbers or as encoded bytes, got string after 2 levels"),
        ([[[]]], "got null after 2 levels"),
        ([[1, 2, 3, 4]], "H x W .* got 4"),
        ([1, 2], "got single numbers"),
        (np.zeros((1, 5, 6, 7), int).tolist(), "got 5 x 6 x 7"),
        (np.zeros((1, 3, 6, 3), int).tolist(), "number of channels .* got 3 x 6 x 3"),
    ],
)
def test_images_that_cannot_be_used_are_an_error_that_says_why(images, message):
    with pytest.raises(DataError, match=f"^here.*{message}"):
        tensors(images)


def test_images_without_pixels_are_an_error():
    with pytest.raises(DataError, match="got 1 x 0"):
        tensors([[[]], [[]]], UINT8_LISTS)


@pytest.mark.parametrize("form", ["struct", "binary", "large binary"])
def test_encoded_grey_images_are_decoded(pillow, form):
    encoded = [encode("L", image) for image in GREY]
    array = {
        "struct": pa.array([{"bytes": e, "path": None} for e in encoded]),
        "binary": pa.array(encoded),
        "large binary": pa.array(encoded, pa.large_binary()),
    }[form]
    np.testing.assert_allclose(tensors(array)[:, 0], scaled(GREY), atol=1e-6)


def test_encoded_colour_images_are_decoded_and_grey_ones_among_them_made_colour(pillow):
    images = tensors([encode("RGB", RGB[0]), encode("L", GREY[0])])
    np.testing.assert_allclose(images[0], scaled(RGB[0].transpose(2, 0, 1)), atol=1e-6)
    np.testing.assert_allclose(images[1], scaled(np.stack([GREY[0]] * 3)), atol=1e-6)


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        ([encode("L", GREY[0]), b"broken"], "need an image in row 2, got cannot identify"),
        ([encode("L", GREY[0]), encode("L", GREY[1][:4])], r"2 sizes, .* \(6, 4\) and \(6, 5\)"),
    ],
)
def test_encoded_images_that_cannot_be_used_are_an_error(pillow, encoded, message):
    with pytest.raises(DataError, match=message):
        tensors(encoded)


def test_images_that_pillow_would_clip_and_truncated_ones_are_an_error():
    pil = pytest.importorskip("PIL.Image")

    def png(pixels: np.ndarray) -> bytes:
        file = io.BytesIO()
        pil.fromarray(pixels).save(file, "png")
        return file.getvalue()

    grey = GREY[0].astype(np.uint8)
    np.testing.assert_allclose(tensors([png(grey)])[0, 0], scaled(GREY[0]), atol=1e-6)
    with pytest.raises(DataError, match="8 bits a channel, got mode 'I;16' in row 2"):
        tensors([png(grey), png(GREY[0].astype(np.uint16) * 200)])
    large = png(RNG.integers(0, 256, (64, 64)).astype(np.uint8))
    with pytest.raises(DataError, match="need an image in row 2, got"):
        tensors([large, large[: len(large) // 2]])


def test_an_encoded_image_without_bytes_is_an_error():
    images = pa.array([{"bytes": b"x", "path": "a"}, {"bytes": None, "path": "b"}])
    with pytest.raises(DataError, match=r"field 'bytes': .* null in row 2"):
        tensors(images)


def test_encoded_images_without_pillow_are_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"Pillow.*pip install 'rayfed-lora\[hub\]'"):
        tensors([b"anything"])
