"""Chat templates: the text is transformers' own, and the responses are found in any of them."""

from __future__ import annotations

from typing import Any

import pytest

from rayfed_lora.data.place import Place
from rayfed_lora.errors import DataError, ModelError
from rayfed_lora.models.conversations import chat_template, tokenise_turns
from rayfed_lora.models.templates import ALPACA, VICUNA, ChatTemplate, Rendered
from rayfed_lora.recipe.data import Data
from tests.chats import CHATML, character_tokenizer


def turns(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(texts)
    found = [{"role": r, "text": t} for r, t in zip(roles, texts, strict=False)]
    return found if system is None else [{"role": "system", "text": system}, *found]


TALK = turns("hi", "yo", "so?", " ok .")
# The system's text goes into the user's first turn; roles must alternate; texts are stripped.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system + ' ' if loop.first and system"
    " else '') + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# The last turn of the assistant begins with an empty thought (Qwen 3).
THINKING = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<t></t>' }}{% endif %}"
    "{{ m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
NO_END = "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '\n' }}{% endfor %}"
UPPER = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + (m['content'] | upper) + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
HEAD = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n"
)
VICUNA_HEAD = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives"
    " helpful, detailed, and polite answers to the user's questions."
)
# By template: the text of TALK, and the responses in it.
CASES: dict[str, tuple[str, str, list[str]]] = {
    "chatml": (
        CHATML,
        "<|start|>user\nhi<|end|>\n<|start|>assistant\nyo<|end|>\n"
        "<|start|>user\nso?<|end|>\n<|start|>assistant\n ok .<|end|>\n",
        ["yo<|end|>", " ok .<|end|>"],
    ),
    "llama2": (
        LLAMA2,
        "<s>[INST] hi [/INST] yo </s><s>[INST] so? [/INST] ok . </s>",
        ["yo </s>", "ok . </s>"],
    ),
    "thinking": (
        THINKING,
        "<|start|>user\nhi<|end|>\n<|start|>assistant\nyo<|end|>\n"
        "<|start|>user\nso?<|end|>\n<|start|>assistant\n<t></t> ok .<|end|>\n",
        ["yo<|end|>", " ok .<|end|>"],
    ),
    # The end token that the template lacks stands behind the last response.
    "no end": (
        NO_END,
        "[user] hi\n[assistant] yo\n[user] so?\n[assistant]  ok .</s>",
        ["yo", " ok .</s>"],
    ),
    # Responses are changed: found by the texts of the parts of the conversation.
    "upper": (
        UPPER,
        "<user>HI</s><assistant>YO</s><user>SO?</s><assistant> OK .</s>",
        ["YO</s>", " OK .</s>"],
    ),
    "alpaca": (
        ALPACA,
        HEAD + "\n### Instruction:\nhi\n\n### Response:\nyo</s>\n"
        "\n### Instruction:\nso?\n\n### Response:\n ok .</s>\n",
        ["yo</s>", " ok .</s>"],
    ),
    "vicuna": (
        VICUNA,
        VICUNA_HEAD + " USER: hi ASSISTANT: yo</s> USER: so? ASSISTANT:  ok .</s>",
        ["yo</s>", " ok .</s>"],
    ),
}


def rendered(text: str, row: Any, tokenizer: Any = None, *, own: bool = True) -> Rendered:
    found = ChatTemplate(tokenizer or character_tokenizer(None), text, own=own).render([row])[0]
    assert isinstance(found, Rendered)
    return found


@pytest.mark.parametrize("name", list(CASES))
def test_responses_are_found_with_their_end_tokens(name: str) -> None:
    template, text, responses = CASES[name]
    found = rendered(template, TALK)
    assert found.text == text
    assert [found.text[slice(*span)] for span in found.responses] == responses


@pytest.mark.parametrize("name", list(CASES))
def test_tokens_are_those_that_transformers_gives_to_a_conversation(name: str) -> None:
    template, _, responses = CASES[name]
    tokenizer = character_tokenizer(template, begins=True, ends=True)
    found = next(
        tokenise_turns(tokenizer, ChatTemplate(tokenizer, template, own=True), [TALK], Place(""))
    )
    messages = [{"role": t["role"], "content": t["text"]} for t in TALK]
    expected = tokenizer.apply_chat_template(messages, return_dict=False)
    if name == "no end":
        expected = [*expected[:-1], tokenizer.eos_token_id]  # in place of a newline
    assert found.ids.tolist() == expected
    kept = [int(i) for i, c in zip(found.ids, found.counted, strict=True) if c]
    assert tokenizer.decode(kept, clean_up_tokenization_spaces=False) == "".join(responses)


@pytest.mark.parametrize("name", ["alpaca", "vicuna"])
def test_a_begin_token_stands_once_where_the_tokenizer_adds_one(name: str) -> None:
    template, text, _ = CASES[name]
    begins = character_tokenizer(None, begins=True, ends=True)
    plain, with_begin = (rendered(template, TALK, t, own=False) for t in (None, begins))
    assert plain.text == text
    assert with_begin.text == "<s>" + text
    written = rendered("{{ bos_token }}" + template, TALK, begins, own=False)
    assert written == with_begin


def test_a_system_turn_takes_the_place_of_the_heading() -> None:
    row = turns("hi", "yo", system="Be brief.")
    assert rendered(ALPACA, row).text.startswith("Be brief.\n\n### Instruction:\nhi\n")
    assert rendered(VICUNA, row).text == "Be brief. USER: hi ASSISTANT: yo</s>"
    assert rendered(LLAMA2, row).text == "<s>[INST] Be brief. hi [/INST] yo </s>"


def test_a_response_that_repeats_the_prompt_is_counted_where_it_stands() -> None:
    found = rendered(CHATML, turns("yo", "yo"))
    start, stop = found.responses[0]
    assert found.text[:start] == "<|start|>user\nyo<|end|>\n<|start|>assistant\n"
    assert found.text[start:stop] == "yo<|end|>"


def test_a_row_that_a_template_rejects_is_named() -> None:
    tokenizer = character_tokenizer(LLAMA2)
    template = ChatTemplate(tokenizer, LLAMA2, own=True)
    twice = [*turns("hi"), *turns("again", "yo")]
    with pytest.raises(DataError, match=r"x, row 2 \('hi'\): need turns .*roles must alternate"):
        list(tokenise_turns(tokenizer, template, [TALK, twice], Place("x")))


def test_a_date_in_a_template_is_the_same_every_day() -> None:
    template = "{{ strftime_now('%d %b %Y') }}: " + CHATML
    assert rendered(template, TALK).text == "26 Jul 2024: " + CASES["chatml"][1]


def test_templates_are_found_by_name_text_and_file(tmp_path: Any) -> None:
    (tmp_path / "mine.jinja").write_text(NO_END)
    tokenizer = character_tokenizer(None)

    def text(name: str) -> str:
        return chat_template(Data(template=name), tokenizer)[0].text

    assert text("vicuna") == VICUNA
    assert text(NO_END) == NO_END
    assert text(str(tmp_path / "mine.jinja")) == NO_END
    found, notes = chat_template(Data(), tokenizer)
    assert found.text == ALPACA
    assert notes == ("the tokenizer has no chat template: data.template alpaca is used",)
    assert chat_template(Data(), character_tokenizer(CHATML))[0].text == CHATML
    with pytest.raises(DataError, match=r"data\.template 'alpacca': .*did you mean 'alpaca'"):
        text("alpacca")
    with pytest.raises(ModelError, match=r"data\.template: expected a template that renders"):
        text("{% for m in messages %}")


def test_a_template_cannot_leave_its_sandbox() -> None:
    with pytest.raises(ModelError, match=r"SecurityError"):
        ChatTemplate(character_tokenizer(), "{{ messages.__class__.__mro__ }}", own=False)
