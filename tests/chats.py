"""A tokenizer of characters, a tiny language model, and rows of short tasks in three formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.recipe import Recipe

SPECIAL = ["<unk>", "<s>", "</s>", "<|start|>", "<|end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
RECIPE: dict[str, Any] = {
    "name": "chats",
    "seed": 5,
    "method": "fedlora",
    "model": {
        "task": "causal-lm",
        "source": "config",
        "config": {
            "architecture": "llama",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
        },
    },
    "adapter": {"alpha": 8},
    "annealing": {
        "initiating": {"rounds": 0},
        "heating": {"rounds": 1, "rank": 2},
        "cooling": {"rounds": 0},
        "holding": {"rounds": 0},
    },
    "clients": {
        "per_round": 3,
        "local_steps": 2,
        "batch_size": 4,
        "optimizer": {"name": "sgd", "lr": 0.5},
    },
    "data": {"max_length": 200, "partition": {"kind": "column", "column": "domain"}},
    "runtime": {"executor": "local", "device": "cpu"},
}


def character_tokenizer(
    template: str | None = CHATML, *, begins: bool = False, ends: bool = False
) -> Any:
    """Return a tokenizer with a token for each ASCII character, and `SPECIAL`.

    `begins` and `ends`: it adds <s> and </s> to each text.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if begins or ends:
        single = "<s> " * begins + "$A" + " </s>" * ends
        made.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[3:],
        chat_template=template,
    )


def short_tasks(count: int = 24) -> list[dict[str, str]]:
    """Return rows of three domains, some with an input, some in two lines."""
    rows = []
    for k in range(count):
        domain = ("add", "upper", "name")[k % 3]
        given = {"add": f"{k} and 7", "upper": f"cat{k}\ndog", "name": ""}[domain]
        output = {"add": f"It is {k + 7}.", "upper": f"CAT{k}\nDOG", "name": f"({k})"}[domain]
        rows.append({"domain": domain, "instruction": f"Do {domain}.", "input": given})
        rows[-1]["output"] = output
    return rows


def user(row: dict[str, str]) -> str:
    """Return what the user says in a row."""
    return row["instruction"] + ("\n" + row["input"] if row["input"] else "")


def write_formats(folder: Path, rows: list[dict[str, str]]) -> None:
    """Write the rows as alpaca.jsonl, sharegpt.jsonl and openai.jsonl, and no others."""

    def chat(row: dict[str, str], name: str, role: str, text: str, names: tuple[str, str]) -> Any:
        turns = [{role: names[0], text: user(row)}, {role: names[1], text: row["output"]}]
        return {"domain": row["domain"], name: turns}

    names = (("conversations", "from", "value", ("human", "gpt")),)
    names += (("messages", "role", "content", ("user", "assistant")),)
    files = {
        "alpaca": rows,
        "sharegpt": [chat(row, *names[0]) for row in rows],
        "openai": [chat(row, *names[1]) for row in rows],
    }
    for name, content in files.items():
        write_rows(folder / f"{name}.jsonl", content)


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Write rows as lines of JSON."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat_recipe(folder: Path, source: str = "alpaca.jsonl", **overrides: Any) -> Recipe:
    """Return a recipe on a file and the tokenizer of a folder; `a__b` stands for the key a.b."""
    own = {"data.source": str(folder / source), "model.tokenizer": str(folder / "tokenizer")}
    return load_recipe(RECIPE, own | {k.replace("__", "."): v for k, v in overrides.items()})
