"""Images in files of their own: folders of classes, and columns of paths."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayfed_lora.errors import DataError
from tests.unit.test_data_sources import IMAGES, LABELS, read, write

PIL = pytest.importorskip("PIL.Image")


def draw(path: Path, value: int, size: tuple[int, int] = (4, 3)) -> Path:
    """Write an image of one grey value; width and height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.fromarray(np.full(size[::-1], value, np.uint8)).save(path)
    return path


def values(table: pa.Table, names: tuple[str, ...]) -> list[tuple[int, str]]:
    """Return grey value and class of each image, each of which has one value."""
    pixels = table["image"].combine_chunks().to_numpy_ndarray()
    assert (pixels == pixels[:, :1, :1, :1]).all()
    greys = np.rint((pixels[:, 0, 0, 0] + 1) * 127.5).astype(int).tolist()
    return sorted(zip(greys, [names[i] for i in table["label"].to_pylist()], strict=True))


def test_a_folder_of_images_by_class_is_read(tmp_path):
    for i in range(4):
        draw(tmp_path / "cat" / f"{i}.png", i)
        draw(tmp_path / "dog" / "deep" / f"{i}.PNG", 10 + i)
    (tmp_path / "cat" / ".DS_Store").touch()
    (tmp_path / "LICENSE").touch()
    for source in (str(tmp_path), tmp_path.as_uri()):
        found = read(source, IMAGES)
        assert found.label_names == ("cat", "dog")
        rows = [*values(found.train, found.label_names), *values(found.test, found.label_names)]
        expected = [(i, "cat") for i in range(4)] + [(10 + i, "dog") for i in range(4)]
        assert sorted(rows) == expected
        assert found.train["image"].type.shape == [1, 3, 4]
        assert "LICENSE" in found.notes[0]


def test_image_folders_of_splits_are_train_and_test(tmp_path):
    for i, split in enumerate(("train", "test", "val")):
        for j, name in enumerate(("a class", "b")):
            draw(tmp_path / split / name / "x.png", 10 * i + j)
    for source in (str(tmp_path), tmp_path.as_uri()):
        found = read(source, IMAGES)
        assert values(found.train, found.label_names) == [(0, "a class"), (1, "b")]
        assert values(found.test, found.label_names) == [(10, "a class"), (11, "b")]
    other = read(str(tmp_path), IMAGES, test_source=str(tmp_path / "val"))
    assert values(other.test, other.label_names) == [(20, "a class"), (21, "b")]


@pytest.mark.parametrize("form", ["text", "uri", "absolute", "struct", "jsonl"])
def test_paths_of_images_are_relative_to_their_table(tmp_path, form, monkeypatch):
    monkeypatch.chdir("/")
    paths = [f"images/{i}.png" for i in range(6)]
    for i, path in enumerate(paths):
        draw(tmp_path / path, i)
    labels = [LABELS[i % 2] for i in range(6)]
    if form == "absolute":
        paths = [str(tmp_path / path) for path in paths]
    column = pa.array(paths)
    if form == "struct":
        bytes_of_some = [
            (tmp_path / path).read_bytes() if path > "images/2" else None for path in paths
        ]
        column = pa.array(
            [{"bytes": b, "path": p} for b, p in zip(bytes_of_some, paths, strict=True)]
        )
    name = {"struct": "a.parquet", "jsonl": "a.jsonl"}.get(form, "a.csv")
    path = write(tmp_path / name, pa.table({"file_name": column, "label": labels}))
    source = Path(path).as_uri() if form == "uri" else path
    found = read(source, IMAGES, image_column="file_name")
    rows = [*values(found.train, found.label_names), *values(found.test, found.label_names)]
    assert sorted(rows) == list(enumerate(labels))


@pytest.mark.parametrize(
    ("column", "uri", "message"),
    [
        (["a.png", "b.png"], False, r"a.csv', column 'image', row 2: file .*b.png': need an image"),
        (["a.png", None], False, "column 'image': .* null in row 2"),
        (["a.png", "https://x.org/b.png"], False, "row 2: need the path of a file.*download"),
        (["a.png", "../b.png"], True, "row 2: need a path inside the table's folder"),
        (["a.png", "rows.txt"], False, "need an image in row 2, got cannot identify"),
        (["a.png", "large.png"], False, r"2 sizes.*data\.resize"),
    ],
)
def test_paths_that_lead_to_no_image_are_an_error_that_names_the_row(
    tmp_path, column, uri, message
):
    draw(tmp_path / "a.png", 1)
    draw(tmp_path / "large.png", 1, (8, 8))
    (tmp_path / "rows.txt").write_text("no image")
    path = tmp_path / "a.csv"
    write(path, pa.table({"image": column, "label": LABELS}))
    with pytest.raises(DataError, match=message):
        read(path.as_uri() if uri else str(path), IMAGES)


def test_images_are_scaled_and_cropped_to_the_size_that_the_recipe_asks_for(tmp_path):
    for i in range(4):
        draw(tmp_path / LABELS[i % 2] / f"{i}.png", 10 * i, (5 + i, 9 - i))
    found = read(str(tmp_path), IMAGES, resize=4)
    assert found.train["image"].type.shape == [1, 4, 4]
    rows = [*values(found.train, found.label_names), *values(found.test, found.label_names)]
    assert sorted(rows) == [(10 * i, LABELS[i % 2]) for i in range(4)]


def test_a_size_for_images_that_are_not_encoded_is_an_error():
    with pytest.raises(DataError, match=r"need encoded images .* data\.resize"):
        read("digits", IMAGES, resize=4)


def test_test_images_of_another_scale_are_an_error(tmp_path):
    paths = []
    for name, values in (("train", [1, 2]), ("test", [0.5, 0.25])):
        path = tmp_path / f"{name}.json"
        rows = [{"image": [[v] * 4] * 4, "label": i} for i, v in enumerate(values)]
        path.write_text(json.dumps(rows))
        paths.append(str(path))
    with pytest.raises(DataError, match=r"test\.json'.* training images', .*numbers from 0 to 255"):
        read(paths[0], IMAGES, test_source=paths[1])
    with pytest.raises(
        DataError, match=r"train\.json'.* training images', .*floats, used unscaled"
    ):
        read(paths[1], IMAGES, test_source=paths[0])
