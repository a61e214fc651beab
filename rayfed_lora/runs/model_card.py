"""README.md of an exported model: what it is, and code that loads it.

Source: this project; metadata as on the Hugging Face Hub (https://hf.co/docs/hub/model-cards).
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rayfed_lora.recipe.model import AUTO_CLASSES
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.outcome import exported_scores

CARD_FILE = "README.md"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
BASE_KEY = "base_model_name_or_path"
_PIPELINES = {"causal-lm": "text-generation"}
_PEFT_CLASSES = {
    "text-classification": "AutoPeftModelForSequenceClassification",
    "causal-lm": "AutoPeftModelForCausalLM",
    "image-classification": "AutoPeftModel",
}
# What follows the model in the code, by task; images: with and without a processor.
_TEXT = """\
predict = pipeline("{pipeline}", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
print(predict("A text."{options}))
"""
_IMAGE = """\
image = Image.open("image.png")
inputs = AutoImageProcessor.from_pretrained(folder)(images=image, return_tensors="pt")
scores = model(**inputs).logits[0].softmax(-1).tolist()
print({model.config.id2label[i]: score for i, score in enumerate(scores)})
"""
_PIXELS = """\
# Images as in training: whole numbers 0 .. 255 as x / 127.5 - 1, floats as they are.
size, channels = model.config.image_size, model.config.num_channels
scores = model(pixel_values=torch.zeros(1, channels, size, size)).logits[0].softmax(-1).tolist()
print({model.config.id2label[i]: score for i, score in enumerate(scores)})
"""


def describe_adapter(
    config: bytes,
    folder: Path,
    own_base: Path | None,
    names: Collection[str],
    recipe: Recipe,
    summary: Mapping[str, Any],
) -> dict[str, bytes]:
    """Return adapter_config.json and README.md of an adapter for the place that it is written to.

    Args:
        config: adapter_config.json as it is.
        folder: of the adapter.
        own_base: the base that comes with the adapter; None: the adapter is for the source.
        names: of the other files in the folder.
        recipe: of the run.
        summary: of the run.

    Raises:
        ValueError: the configuration is not JSON with a base.
    """
    values = json.loads(config)
    if not isinstance(values, dict) or not isinstance(values.get(BASE_KEY), str):
        raise ValueError(f"expected an object with a text {BASE_KEY!r}")
    if own_base is not None:
        values[BASE_KEY] = str(own_base)
    elif Path(values[BASE_KEY]).is_dir():
        values[BASE_KEY] = os.path.abspath(values[BASE_KEY])
    base, task = values[BASE_KEY], recipe.model.task
    naming = "" if own_base is not None else _label_arguments(summary)
    model = [
        f"model = {AUTO_CLASSES[task]}.from_pretrained({base!r}{naming})",
        "model = PeftModel.from_pretrained(model, folder).merge_and_unload()",
    ]
    note = (
        f"`merge_and_unload` may be left out, to go on training. `peft.{_PEFT_CLASSES[task]}"
        ".from_pretrained(folder)` loads base and adapter in one call"
    )
    if own_base is None:
        note += (
            ", given the same `id2label`, `label2id` and `ignore_mismatched_sizes`" * bool(naming)
            + "."
        )
    else:
        note += (
            f", and so does `pipeline(..., model=folder)`: both find the base by the absolute path"
            f" in `{ADAPTER_FILES[0]}`. After the folders are moved, change `{BASE_KEY}` there and"
            " the paths above, or run `rayfed-lora export` again. For the Hub, export one model"
            " with `--merge`."
        )
    text = _card(recipe, summary, "peft", _code(task, folder, model, names), note)
    return {ADAPTER_FILES[0]: json.dumps(values, indent=2).encode(), CARD_FILE: text.encode()}


def describe_model(
    folder: Path, names: Collection[str], recipe: Recipe, summary: Mapping[str, Any]
) -> bytes:
    """Return the README.md of a whole model; arguments as for `describe_adapter`."""
    task = recipe.model.task
    model = [f"model = {AUTO_CLASSES[task]}.from_pretrained(folder)"]
    note = "After the folder is moved, or for a model on the Hub, change `folder` alone."
    return _card(recipe, summary, "transformers", _code(task, folder, model, names), note).encode()


def _label_arguments(summary: Mapping[str, Any]) -> str:
    """Return the arguments that give a source's model the classes of the data."""
    labels = summary.get("labels")
    if not isinstance(labels, list) or not labels:
        return ""
    names = {i: str(label) for i, label in enumerate(labels)}
    numbers = {name: i for i, name in names.items()}
    return f", id2label={names!r}, label2id={numbers!r}, ignore_mismatched_sizes=True"


def _code(task: str, folder: Path, model: list[str], names: Collection[str]) -> str:
    imports, extra, use = [AUTO_CLASSES[task]], [], _PIXELS
    if task != "image-classification":
        imports += ["AutoTokenizer", "pipeline"]
        options = ", max_new_tokens=20" if task == "causal-lm" else ""
        use = _TEXT.format(pipeline=_PIPELINES.get(task, task), options=options)
    elif "preprocessor_config.json" in names:
        imports.append("AutoImageProcessor")
        extra, use = ["from PIL import Image"], _IMAGE
    else:
        extra = ["import torch"]
    if len(model) > 1:
        extra.append("from peft import PeftModel")
    lines = [*extra, f"from transformers import {', '.join(sorted(imports))}", ""]
    return "\n".join([*lines, f"folder = {str(folder)!r}", *model, use])


def _card(recipe: Recipe, summary: Mapping[str, Any], library: str, code: str, note: str) -> str:
    model, title = recipe.model, " ".join(recipe.name.split())
    scores = exported_scores(summary)
    of_round = "the round that was kept" if "kept" in summary else "the last round"
    metrics = {
        key.removeprefix("eval_"): value
        for key, value in scores.items()
        if key.startswith("eval_") and isinstance(value, (int, float))
    }
    source = "random weights" if model.source == "config" else f"`{model.source}`"
    task = {"type": _PIPELINES.get(model.task, model.task)}
    data = {"name": recipe.data.source, "type": recipe.data.source}
    results = [{"type": name, "value": value} for name, value in metrics.items()]
    index = {"name": title, "results": [{"task": task, "dataset": data, "metrics": results}]}
    metadata: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": task["type"],
        "license": "other",
        "tags": ["federated-learning", "lora", "rayfed-lora"],
        "metrics": [*metrics],
        "model-index": [index],
    }
    local = model.source == "config" or model.source.startswith("package:")
    if not local and not Path(model.source).is_absolute() and not Path(model.source).exists():
        metadata["base_model"] = model.source
    # JSON is YAML, with every text quoted.
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items())
    table = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items())
    return f"""\
---
{front}
---

# {title}

Trained by simulated federated learning with rayfed-lora: task {model.task}, base {source}, data
`{recipe.data.source}`, method {recipe.method}, seed {recipe.seed}, {summary.get("rounds")} rounds.

## How to load it

```python
{code.rstrip()}
```

{note}

## Results of {of_round}

On the test split:

| metric | value |
|---|---|
{table}

## License

This file grants none: the licenses of the base model and of the data apply.
"""
