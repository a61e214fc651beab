"""Images are prepared as the source of the model says: the processor's numbers, by hand."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from rayfed_lora.errors import ModelError
from rayfed_lora.models.image_processor import ImageProcessor
from rayfed_lora.models.quiet import quiet
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.training.preparing import outline, prepare
from tests.fakes import make_recipe

pytest.importorskip("PIL")
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.8]
PLAIN = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": MEAN,
    "image_std": STD,
}
RESIZING = {**PLAIN, "do_resize": True, "size": {"height": 8, "width": 8}, "resample": 0}


def source(folder: Path, processor: dict[str, Any] | None, channels: int = 3) -> str:
    """Write a small model of 8 x 8 images, and its image processor."""
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_channels=channels,
    )
    torch.manual_seed(0)
    with quiet():
        ViTForImageClassification(config).save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


def images(path: Path, shape: tuple[int, ...], *, floats: bool = False) -> str:
    """Write thirty images of two classes; the first pixel of each says which it is."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, *shape))
    pixels.reshape(30, -1)[:, 0] = np.arange(30)
    values = (pixels / 255).tolist() if floats else pixels.tolist()
    rows = [{"image": value, "label": f"c{i % 2}"} for i, value in enumerate(values)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make(data: str, model: str, **config: Any) -> Recipe:
    return make_recipe(data__source=data, model__source=model, model__config=config)


def raw(data: str) -> dict[int, np.ndarray]:
    """Return the images as written, by their first pixel."""
    rows = [json.loads(line)["image"] for line in Path(data).read_text().splitlines()]
    return {int(np.ravel(image)[0]): np.array(image) for image in rows}


def test_mean_and_deviation_of_the_processor_are_used(tmp_path: Path) -> None:
    data = images(tmp_path / "data.jsonl", (8, 8, 3))
    recipe = make(data, source(tmp_path / "m", PLAIN))
    found = prepare(recipe).train.inputs["pixel_values"]
    mean, std = (np.array(x)[:, None, None] for x in (MEAN, STD))
    originals = raw(data)
    for image in found:
        first = round(float(image[0, 0, 0] * STD[0] + MEAN[0]) * 255)
        expected = (originals[first].transpose(2, 0, 1) / 255 - mean) / std
        np.testing.assert_allclose(image, expected, atol=1e-5)
    notes = outline(recipe).notes
    told = "images (3 x 8 x 8) are prepared"
    assert any(told in note and "mean 0.1, 0.2, 0.3, std 0.4" in note for note in notes)
    assert notes[: len(prepare(recipe).notes)] == prepare(recipe).notes


def test_images_of_another_size_are_resized_as_the_processor_says(tmp_path: Path) -> None:
    data = images(tmp_path / "data.jsonl", (16, 16, 3))
    recipe = make(data, source(tmp_path / "m", RESIZING))
    found = prepare(recipe).train.inputs["pixel_values"]
    assert found.shape[1:] == (3, 8, 8)
    # Nearest neighbour by half: every other pixel, from the second of each pair on.
    originals = [image[1::2, 1::2].transpose(2, 0, 1) for image in raw(data).values()]
    mean, std = (np.array(x)[:, None, None] for x in (MEAN, STD))
    expected = (np.array(originals) / 255 - mean) / std
    for image in found:
        assert np.abs(expected - image).max(axis=(1, 2, 3)).min() < 1e-5


def test_grey_images_are_repeated_for_a_model_of_three_channels(tmp_path: Path) -> None:
    data = images(tmp_path / "data.jsonl", (8, 8))
    found = prepare(make(data, source(tmp_path / "m", PLAIN))).train.inputs["pixel_values"]
    back = found * np.array(STD)[:, None, None] + np.array(MEAN)[:, None, None]
    np.testing.assert_allclose(back[:, 0], back[:, 1], atol=1e-5)
    np.testing.assert_allclose(back[:, 0], back[:, 2], atol=1e-5)


def test_the_processor_of_plus_and_minus_one_gives_what_no_processor_gives(tmp_path: Path) -> None:
    data = images(tmp_path / "data.jsonl", (8, 8))
    half = {**PLAIN, "image_mean": [0.5], "image_std": [0.5]}
    with_it = prepare(make(data, source(tmp_path / "a", half, channels=1)))
    without = prepare(make(data, source(tmp_path / "b", None, channels=1)))
    np.testing.assert_allclose(
        with_it.train.inputs["pixel_values"], without.train.inputs["pixel_values"], atol=1e-6
    )
    assert without.train.inputs["pixel_values"].min() < -0.9
    assert not any("prepared" in note for note in without.notes)


def test_built_in_images_are_prepared_too(tmp_path: Path) -> None:
    half = {**PLAIN, "image_mean": [0.0], "image_std": [1.0]}
    pixels = prepare(make("digits", source(tmp_path / "m", half, 1))).train.inputs["pixel_values"]
    # Of 17 levels: a rounding of 1/255 at most.
    assert np.abs(pixels * 16 - np.rint(pixels * 16)).max() <= 16 / 255 / 2 + 1e-6
    assert (pixels.min(), pixels.max()) == (0, 1)


def test_floats_are_kept_and_it_is_said(tmp_path: Path) -> None:
    data = images(tmp_path / "data.jsonl", (8, 8, 3), floats=True)
    workload = prepare(make(data, source(tmp_path / "m", PLAIN)))
    assert 0 <= workload.train.inputs["pixel_values"].min()
    assert any("processor is not applied" in note for note in workload.notes)


def test_a_processor_for_another_size_than_the_models_is_refused(tmp_path: Path) -> None:
    data = images(tmp_path / "data.jsonl", (8, 8, 3))
    wide = {**RESIZING, "size": {"height": 12, "width": 12}}
    recipe = make(data, source(tmp_path / "m", wide))
    for reads in (outline, prepare):
        with pytest.raises(ModelError, match=r"3 x 8 x 8 .*image processor gives 3 x 12 x 12"):
            reads(recipe)


CROPPING = {
    **PLAIN,
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 12},
    "do_center_crop": True,
    "crop_size": {"height": 12, "width": 12},
    "do_convert_rgb": False,
}


@pytest.mark.parametrize(
    "processor",
    [{**RESIZING, "size": {"height": 12, "width": 12}}, CROPPING],
    ids=["height and width", "shorter side and crop"],
)
def test_images_are_prepared_in_the_size_that_the_recipe_gives_the_model(
    processor: dict[str, Any], tmp_path: Path
) -> None:
    data = images(tmp_path / "data.jsonl", (8, 8, 3))
    recipe = make(data, source(tmp_path / "m", processor), image_size=8)
    found = prepare(recipe).train.inputs["pixel_values"]
    # Images of that size stay what they are.
    back = found * np.array(STD)[:, None, None] + np.array(MEAN)[:, None, None]
    originals = {i: image.transpose(2, 0, 1) for i, image in raw(data).items()}
    for image in np.rint(back * 255):
        np.testing.assert_array_equal(image, originals[int(image[0, 0, 0])])
    told = r"\(3 x 8 x 8\) are prepared .*the size is model\.config\.image_size, 8$"
    assert any(re.search(told, note) for note in outline(recipe).notes)


def test_images_are_prepared_in_chunks_without_a_second_copy_of_the_result() -> None:
    class Enlarging:
        def __call__(self, images: list[np.ndarray], **_: Any) -> dict[str, np.ndarray]:
            assert len(images) <= 256
            large = np.array(images).repeat(16, axis=2).repeat(16, axis=3)
            return {"pixel_values": large.astype(np.float32)}

    given = np.random.default_rng(0).integers(0, 256, (2100, 1, 4, 4)).astype(np.float32)
    tracemalloc.start()
    found = ImageProcessor(Enlarging(), 1, "its image processor")(given / 127.5 - 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(found[:, :, ::16, ::16], given)
    # The result is 34 MB; a chunk of it 4 MB, of several types.
    assert found.nbytes < peak < 1.5 * found.nbytes


def test_a_plan_prepares_one_image_to_learn_the_size_and_three_to_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = images(tmp_path / "data.jsonl", (16, 16, 3))
    recipe = make(data, source(tmp_path / "m", RESIZING))
    asked: list[int] = []
    of = ImageProcessor.__call__

    def counted(pixels: ImageProcessor, given: np.ndarray) -> np.ndarray:
        asked.append(len(given))
        return of(pixels, given)

    monkeypatch.setattr(ImageProcessor, "__call__", counted)
    outline(recipe)
    # And three for a try.
    assert asked == [1, 3]


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_a_processor_that_needs_timm_says_what_to_install(tmp_path: Path) -> None:
    data = images(tmp_path / "data.jsonl", (8, 8, 3))
    model = source(tmp_path / "m", {"image_processor_type": "TimmWrapperImageProcessor"})
    with pytest.raises(ModelError, match=r"cannot be read: .*; pip install timm torchvision$"):
        prepare(make(data, model))


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="is installed")
def test_a_processor_that_needs_torchvision_says_what_to_install(tmp_path: Path) -> None:
    data = images(tmp_path / "data.jsonl", (8, 8, 3))
    model = source(tmp_path / "m", {"image_processor_type": "DINOv3ViTImageProcessor"})
    with pytest.raises(ModelError, match=r"cannot be read: .*; pip install torchvision$"):
        prepare(make(data, model))


def test_a_processor_of_other_inputs_is_not_one_of_images(tmp_path: Path) -> None:
    data = images(tmp_path / "data.jsonl", (8, 8, 3))
    model = source(tmp_path / "m", None)
    file = tmp_path / "m/processor_config.json"
    file.write_text('{"processor_class": "SomeProcessor"}')
    assert not any("prepared" in note for note in prepare(make(data, model)).notes)
    file.write_text(json.dumps({"image_processor": PLAIN}))
    assert any("mean 0.1, 0.2, 0.3" in note for note in prepare(make(data, model)).notes)
    file.write_text("{")
    with pytest.raises(ModelError, match=r"image processor \(processor_config.json\) cannot be"):
        prepare(make(data, model))


def test_without_a_processor_another_size_is_refused(tmp_path: Path) -> None:
    data = images(tmp_path / "data.jsonl", (16, 16, 3))
    with pytest.raises(ModelError, match=r"3 x 8 x 8 .*the data have 3 x 16 x 16"):
        prepare(make(data, source(tmp_path / "m", None)))


@pytest.mark.parametrize("content", ["{", '{"image_processor_type": "NoSuchProcessor"}'])
def test_a_processor_that_cannot_be_read_is_refused(content: str, tmp_path: Path) -> None:
    data = images(tmp_path / "data.jsonl", (8, 8, 3))
    model = source(tmp_path / "m", None)
    (tmp_path / "m/preprocessor_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"image processor \(preprocessor_config.json\) cannot be"):
        prepare(make(data, model))


def test_a_processor_without_pillow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = images(tmp_path / "data.jsonl", (8, 8, 3))
    model = source(tmp_path / "m", PLAIN)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModelError, match=r"Pillow.*pip install 'rayfed-lora\[hub\]'"):
        prepare(make(data, model))
