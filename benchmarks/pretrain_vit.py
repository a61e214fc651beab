"""Make the shipped image model: a small ViT trained on five of the Fashion-MNIST classes.

The other five are left to be federated. Written are the configuration and the encoder in fp16,
without the classifier, in the format of `transformers`.

    python benchmarks/pretrain_vit.py [--output FOLDER]

Source: this project.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification

from rayfed_lora import seeds
from rayfed_lora.data.client_table import batch_indices
from rayfed_lora.data.dataset import load
from rayfed_lora.recipe.data import Data

SEED = 0
LABELS = [0, 1, 2, 5, 8]
STEPS, BATCH_SIZE, LR = 1500, 64, 1e-3
CONFIG = {
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "image_size": 28,
    "patch_size": 7,
    "num_channels": 1,
}
DEFAULT_OUTPUT = Path(__file__).parents[1] / "rayfed_lora/weights/vit-fashion-mnist-5"


def tensors(table: pa.Table) -> tuple[torch.Tensor, torch.Tensor]:
    images = table["image"].combine_chunks().to_numpy_ndarray().copy()
    return torch.from_numpy(images), torch.from_numpy(table["label"].to_numpy().copy())


def train(model: ViTForImageClassification, images: torch.Tensor, labels: torch.Tensor) -> None:
    rng = seeds.generator(SEED, seeds.Purpose.BATCHES)
    batches = batch_indices(np.arange(len(labels)), BATCH_SIZE, rng, steps=STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)
    model.train()
    for step, batch in enumerate(batches, 1):
        loss = model(pixel_values=images[batch], labels=labels[batch]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        if step % 100 == 0:
            print(f"step {step}/{STEPS}: loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def accuracy(model: ViTForImageClassification, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    batches = zip(images.split(500), labels.split(500), strict=True)
    correct = sum(int((model(pixel_values=x).logits.argmax(1) == y).sum()) for x, y in batches)
    return correct / len(labels)


def save_encoder(model: ViTForImageClassification, folder: Path) -> None:
    encoder = {
        name: value.half().contiguous()
        for name, value in model.state_dict().items()
        if not name.startswith("classifier.")
    }
    config = {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "dtype": "float16",
        **CONFIG,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(encoder, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    folder = parser.parse_args().output

    torch.set_num_threads(1)
    torch.manual_seed(seeds.torch_seed(SEED, seeds.Purpose.MODEL_INIT))
    source = Data(source="fashion-mnist", labels=LABELS)
    dataset = load(source, "image-classification", SEED, validation_fraction=0.0)
    model = ViTForImageClassification(ViTConfig(**CONFIG, num_labels=len(LABELS)))
    started = time.process_time()
    train(model, *tensors(dataset.train))
    print(f"trained in {time.process_time() - started:.0f} CPU-seconds")
    print(f"test accuracy on classes {LABELS}: {accuracy(model, *tensors(dataset.test)):.4f}")
    save_encoder(model, folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"saved {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
