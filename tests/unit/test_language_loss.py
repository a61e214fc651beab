"""The loss of a language model in chunks: that of all logits, without them in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from rayfed_lora.data.examples import COUNTED
from rayfed_lora.errors import BlockMemoryError
from rayfed_lora.federation.evaluation import joined
from rayfed_lora.models import language
from rayfed_lora.models.adapted import AdaptedModel
from rayfed_lora.models.language import LanguageLoss, language_loss
from rayfed_lora.recipe.model import Adapter
from rayfed_lora.tasks.engine import answer
from rayfed_lora.tasks.messages import Evaluate, TestClients
from rayfed_lora.training.preparing import prepare
from rayfed_lora.training.testing import Evaluator
from rayfed_lora.training.trainer import LocalTrainer
from rayfed_lora.types import AdapterState, Base, Factors, GlobalModel
from tests.tasks import initial_tensors
from tests.unit.test_language_models import make_recipe
from tests.unit.test_language_models import texts as words  # noqa: F401 - a fixture

VOCABULARY, LENGTH, WIDTH = 97, 12, 16
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
# gemma2 caps its logits, granite and cohere scale them, opt has another decoder inside of its own.
KINDS: dict[str, dict[str, Any]] = {
    "llama": SMALL | {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "gemma2": SMALL
    | {"num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 0.2, "pad_token_id": 0},
    "granite": SMALL | {"num_key_value_heads": 1, "logits_scaling": 3.0},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": WIDTH,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 32,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "opt": {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "word_embed_proj_dim": WIDTH,
        "dropout": 0.0,
    },
}


def model(kind: str) -> Any:
    torch.manual_seed(3)
    net = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind]))
    for parameter in net.parameters():
        # Logits far from uniform.
        parameter.data = parameter.data * 5 if parameter.dim() == 2 else parameter.data
    return net


def texts(rows: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=draw)
    lengths = torch.tensor([LENGTH - 3 * (row % 3) for row in range(rows)])
    return {"input_ids": ids, "attention_mask": (torch.arange(LENGTH) < lengths[:, None]).long()}


def adapted(net: Any, clients: int) -> AdaptedModel:
    found = AdaptedModel(net, Adapter(target_modules="all-linear", train_head=False))
    draw = torch.Generator().manual_seed(2)
    states = []
    for _ in range(clients):
        factors = {
            name: Factors(
                torch.randn(2, layer.in_features, generator=draw).div(4).numpy(),
                torch.randn(layer.out_features, 2, generator=draw).div(4).numpy(),
                1.0,
            )
            for name, layer in found._layers.items()
        }
        states.append(AdapterState(factors, {}))
    found.load(states, Base(), "adapter")
    found.train(True)
    return found


def plain(net: Any, inputs: dict[str, torch.Tensor], counted: torch.Tensor) -> torch.Tensor:
    """Return transformers' own loss of each text, by labels of -100 where nothing counts."""
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    labels = inputs["input_ids"].masked_fill(~counted, -100)
    logits = net(**given).logits
    return torch.stack(
        [
            functional.cross_entropy(each[:-1], own[1:], ignore_index=-100, reduction="sum")
            for each, own in zip(logits, labels, strict=True)
        ]
    )


@pytest.fixture
def few_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let five tokens be computed at once."""
    monkeypatch.setattr(language, "LOGIT_BYTES", {"cpu": 5 * 4 * VOCABULARY})


def without_all_logits(net: Any, inputs: dict[str, torch.Tensor]) -> LanguageLoss:
    """Return the loss, which fails the test where it computes more than five tokens' logits."""
    found = language_loss(net, inputs)
    assert found.in_chunks
    head = net.get_output_embeddings()
    own = head.forward

    def few(hidden: torch.Tensor) -> torch.Tensor:
        assert hidden[..., 0].numel() <= 5
        return own(hidden)

    head.forward = few
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_in_chunks_are_those_of_all_logits(kind: str, few_logits: None) -> None:
    """Three clients of two texts each; losses to 1e-6, gradients to 1e-5."""
    inputs, weights = texts(6), torch.tensor([1.0, 0.5, 2.0, 1.0, 0.1, 3.0])
    whole = adapted(model(kind), 3)
    expected = plain(whole.net, inputs, inputs["attention_mask"] > 0)
    (expected * weights).sum().backward()
    chunked = adapted(model(kind), 3)
    found = without_all_logits(chunked.net, inputs)(inputs)
    (found.losses * weights).sum().backward()
    torch.testing.assert_close(found.losses, expected, rtol=1e-6, atol=1e-5)
    assert found.tokens.tolist() == [11, 8, 5, 11, 8, 5]
    assert found.right is None
    assert len(whole.trained) >= 8
    for one, other in zip(chunked.trained, whole.trained, strict=True):
        assert other.grad is not None
        assert other.grad.abs().max() > 1e-3
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5)


def test_only_the_tokens_that_count_are_computed_and_count(few_logits: None) -> None:
    inputs = texts(4)
    # Responses begin at the fourth token; the last text has none left.
    counted = torch.zeros_like(inputs["input_ids"])
    counted[:3, 4:] = 1
    net = model("llama")
    expected = plain(net, inputs, (counted > 0) & (inputs["attention_mask"] > 0))
    loss = without_all_logits(net, inputs)
    with torch.no_grad():
        found = loss({**inputs, COUNTED: counted}, scored=True)
    torch.testing.assert_close(found.losses, expected, rtol=1e-6, atol=1e-5)
    assert found.tokens.tolist() == [8, 5, 2, 0]


def test_scores_in_chunks_are_those_of_all_logits(few_logits: None) -> None:
    inputs, net = texts(5), model("llama")
    with torch.no_grad():
        logits = net(**inputs).logits[:, :-1].argmax(dim=2)
        found = without_all_logits(net, inputs)(inputs, scored=True)
    hits = (logits == inputs["input_ids"][:, 1:]) & (inputs["attention_mask"][:, 1:] > 0)
    assert found.right is not None
    assert found.right.tolist() == hits.sum(dim=1).tolist()


def test_an_output_layer_that_is_trained_gets_its_gradient_in_chunks_too(few_logits: None) -> None:
    """A full-model round; the output layer of gpt2 is its embedding."""
    inputs = texts(3)
    whole, chunked = model("gpt2"), model("gpt2")
    plain(whole, inputs, inputs["attention_mask"] > 0).sum().backward()
    without_all_logits(chunked, inputs)(inputs).losses.sum().backward()
    for (name, one), other in zip(chunked.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_a_model_whose_logits_are_made_otherwise_has_them_all(few_logits: None) -> None:
    class Odd(torch.nn.Module):
        base_model_prefix = ""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = model("llama"), None

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.inner.get_output_embeddings()  # type: ignore[no-any-return]

        def forward(self, **inputs: torch.Tensor) -> Any:
            out = self.inner(**inputs)
            # Depends on the other tokens: no chunk of them can have it.
            out.logits = out.logits - out.logits.mean(dim=1, keepdim=True)
            return out

    inputs, net = texts(3), Odd()
    loss = LanguageLoss(net, inputs)
    assert not loss.in_chunks
    expected = plain(net, inputs, inputs["attention_mask"] > 0)
    torch.testing.assert_close(loss(inputs).losses, expected)


def test_a_test_takes_as_many_texts_at_once_as_tokens_and_vocabulary_allow() -> None:
    loss = LanguageLoss(model("llama"), texts(2))
    # 2^30 bytes are 2^28 logits in float32: over 100 tokens and 97 words, 27,672 texts.
    assert loss.most_texts(100, torch.device("cpu")) == 2**28 // (100 * 97)
    assert loss.most_texts(2**28, torch.device("cpu")) == 1


@pytest.mark.parametrize("split", ["test", "clients"])
def test_a_test_for_which_memory_is_short_is_halved_to_the_same_predictions(
    words: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    split: str,
) -> None:
    recipe = make_recipe(words, evaluation__client_fraction=0.5, data__test_fraction=0.5)
    trainer = LocalTrainer(recipe, prepare(recipe))
    start = GlobalModel(AdapterState({}, initial_tensors(trainer, "adapter")), Base(), "adapter")
    task: Any = Evaluate(start, "test", (slice(0, 30),))
    if split == "clients":
        task = TestClients(start, ((0, 1, 2, 3),))
    whole = answer(trainer, task)
    monkeypatch.setattr(Evaluator, "predictions", few_at_once(Evaluator.predictions))
    with pytest.raises(BlockMemoryError, match="do not fit into memory: no room for"):
        trainer.run(task)
    found = answer(trainer, task)
    if split == "clients":
        assert found == whole
        return
    assert len(found) == 4
    np.testing.assert_allclose(joined(found).losses, joined(whole).losses, rtol=1e-6)


def few_at_once(predictions: Any) -> Any:
    def checked(self: Evaluator, examples: Any) -> Any:
        if len(examples.labels) > 8:
            raise torch.OutOfMemoryError(f"no room for {len(examples.labels)}")
        return predictions(self, examples)

    return checked
