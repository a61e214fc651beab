"""Models in GGUF files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import rayfed_lora
from rayfed_lora.errors import ModelError
from rayfed_lora.models import base_models, gguf_files

WORDS = ["red", "blue", "one", "two", "go", "stop", "sun", "sea"]
HIDDEN, VOCABULARY = 32, 256


def tokens() -> tuple[list[str], list[int]]:
    """Bytes as GPT-2 writes them, and three special tokens; 3: of control."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    special, merged = ["<s>", "</s>", "<pad>"], ["re"]
    plain = list(bytes_to_unicode().values())[: VOCABULARY - len(special) - 1] + merged
    return special + plain, [3] * len(special) + [1] * len(plain)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer with random weights, whose tensors are float32."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    names, kinds = tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    writer.add_token_merges(["r e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (VOCABULARY, HIDDEN), "output": (VOCABULARY, HIDDEN)}
    shapes |= {f"blk.0.attn_{x}": (HIDDEN, HIDDEN) for x in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (48, HIDDEN), "blk.0.ffn_up": (48, HIDDEN)}
    shapes |= {"blk.0.ffn_down": (HIDDEN, 48)}
    norms = dict.fromkeys(("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"), (HIDDEN,))
    for name, shape in {**shapes, **norms}.items():
        values = rng.normal(scale=0.2, size=shape) if len(shape) > 1 else np.ones(shape)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gguf_files.constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "rayfed-lora"


def recipe(source: str, tmp_path: Path) -> dict[str, Any]:
    texts = tmp_path / "texts.jsonl"
    lines = [f'{{"text": "{a} {b} {a}"}}' for a in WORDS for b in WORDS]
    texts.write_text("\n".join(lines))
    return {
        "data": {"source": str(texts), "partition": {"kind": "iid", "clients": 2}},
        "model": {"source": source, "task": "causal-lm"},
        "annealing": {
            "initiating": {"trainable": "none"},
            "heating": {"rounds": 1, "rank": 2},
            "cooling": {"rounds": 0},
            "holding": {"rounds": 0},
        },
        "clients": {"per_round": 2, "local_steps": 1, "batch_size": 2},
        "runtime": {"executor": "local", "device": "cpu"},
    }


def test_weights_and_tokens_are_those_of_transformers(file: Path, cache: Path) -> None:
    folder = Path(base_models.location(str(file)))
    assert folder.parent == cache
    net = AutoModelForCausalLM.from_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32
    )
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(net(ids).logits, plain(ids).logits, rtol=0, atol=0)
    assert not hasattr(net.config, "quantization_config")


def test_it_is_read_once_and_a_changed_file_again(
    file: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(file.read_bytes())
    first = base_models.location(str(copy))
    assert "reading copy.gguf, once" in capsys.readouterr().err
    assert base_models.location(str(copy)) == first
    assert capsys.readouterr().err == ""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    assert base_models.location(str(copy)) != first
    # No scratch folder stays.
    assert all(not path.name.startswith(".") for path in cache.iterdir())


def test_a_run_trains_it_and_plain_peft_loads_what_it_exports(
    file: Path, cache: Path, tmp_path: Path
) -> None:
    result = rayfed_lora.run(recipe(str(file), tmp_path), str(tmp_path / "run"))
    assert result.summary["rounds"] == 1
    assert result.adapter().peft_config["default"].base_model_name_or_path


def test_one_in_a_package_is_named_by_its_file(
    file: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "weights_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('never imported')")
    (package / "tiny.gguf").write_bytes(file.read_bytes())
    monkeypatch.syspath_prepend(str(tmp_path))
    plan = rayfed_lora.plan(recipe("package:weights_of_a_test/tiny.gguf", tmp_path))
    assert plan.outline.shape.modules
    with pytest.raises(ModelError, match="expected one folder"):
        rayfed_lora.plan(recipe("package:weights_of_a_test/other.gguf", tmp_path))


def test_what_is_no_gguf_file_is_told(cache: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF not really")
    with pytest.raises(ModelError, match=r"model.source '.*broken.gguf': "):
        rayfed_lora.plan(recipe(str(broken), tmp_path))
    assert [*cache.iterdir()] == []


def test_without_the_package_the_extra_is_named(
    file: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(gguf_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'rayfed-lora\[gguf\]'"):
        base_models.location(str(file))
