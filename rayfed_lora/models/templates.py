"""Turns to texts by a chat template, and the places of the responses in them.

Source: chat templates of transformers; Alpaca's prompt without a section for the input
(github.com/tatsu-lab/stanford_alpaca); Vicuna 1.1's (github.com/lm-sys/FastChat).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayfed_lora.data.turns import ASSISTANT
from rayfed_lora.errors import ModelError
from rayfed_lora.models.quiet import quiet
from rayfed_lora.models.wording import one_line

Turns = Sequence[Mapping[str, str]]
# Start and end of a part of a text, in characters.
Span = tuple[int, int]

ALPACA = """\
{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}\
Below is an instruction that describes a task. \
Write a response that appropriately completes the request.{% endif %}\
{{ '\n' }}{% for message in messages %}\
{% if message['role'] == 'user' %}{{ '\n### Instruction:\n' + message['content'] + '\n' }}\
{% elif message['role'] == 'assistant' %}\
{{ '\n### Response:\n' + message['content'] + (eos_token or '') + '\n' }}\
{% elif not loop.first or message['role'] != 'system' %}\
{{ raise_exception('expected turns of user and assistant, and a system turn at the start only') }}\
{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\n### Response:\n' }}{% endif %}"""
VICUNA = """\
{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}\
A chat between a curious user and an artificial intelligence assistant. \
The assistant gives helpful, detailed, and polite answers to the user's questions.{% endif %}\
{% for message in messages %}\
{% if message['role'] == 'user' %}{{ ' USER: ' + message['content'] }}\
{% elif message['role'] == 'assistant' %}\
{{ ' ASSISTANT: ' + message['content'] + (eos_token or '') }}\
{% elif not loop.first or message['role'] != 'system' %}\
{{ raise_exception('expected turns of user and assistant, and a system turn at the start only') }}\
{% endif %}{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"""
BUILT_IN: Mapping[str, str] = {"alpaca": ALPACA, "vicuna": VICUNA}

# Templates (Llama 3) may write today's date: tokens would differ from day to day.
_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro %}"
_PROBE = ({"role": "user", "text": "a"}, {"role": ASSISTANT, "text": "b"})
# Around the number of a turn; of Unicode's private use.
_OPEN, _CLOSE = "\ue000", "\ue001"


@dataclass(frozen=True)
class Rendered:
    """A text of turns.

    Attributes:
        text: with all its special tokens.
        responses: where the assistant's turns are, each with its end token, but without what stands
            before its first character.
    """

    text: str
    responses: tuple[Span, ...]


class ChatTemplate:
    """A template with a tokenizer's special tokens."""

    def __init__(self, tokenizer: Any, text: str, *, own: bool) -> None:
        """Try a template on a short conversation.

        Args:
            tokenizer: transformers' tokenizer.
            text: of the template, in Jinja, as transformers renders it.
            own: whether it is the tokenizer's own, which is used exactly as it is; others begin
                with the begin token where the tokenizer puts one before a text.

        Raises:
            ModelError: the template cannot be rendered.
        """
        self._tokenizer, self.text, self.own = tokenizer, text, own
        self._eos: str | None = tokenizer.eos_token
        try:
            rendered = self._render([_PROBE])[0]
        except Exception as error:  # of Jinja and of transformers, of many types
            raise ModelError(
                f"data.template: expected a template that renders a turn of the user and one of the"
                f" assistant, got {one_line(error)}"
            ) from error
        begin = _begin_token(tokenizer)
        if not own and begin is not None and not rendered.startswith(begin):
            self.text = "{{ bos_token }}" + text
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        names = "|".join(map(re.escape, sorted({*special, *tokenizer.all_special_tokens})))
        tail = rendered.rpartition(_PROBE[1]["text"])[2]
        found = re.match(rf"\s*({names})", tail) if names else None
        # What ends a turn of the assistant, if the template writes anything.
        self._end = self._eos if found is None else found[1]

    def render(self, conversations: Sequence[Turns]) -> list[Rendered | str]:
        """Return each conversation's text; where it has none, the reason.

        A last response without an end token gets the tokenizer's, if it has one.
        """
        marked = [_marked(turns) for turns in conversations]
        try:
            texts = self._render([*conversations, *marked])
        except Exception:
            if len(conversations) > 1:
                return [each for turns in conversations for each in self.render([turns])]
            return [self._one(conversations[0])]
        half = len(conversations)
        pairs = zip(conversations, texts[:half], texts[half:], strict=True)
        return [self._placed(turns, text, with_marks) for turns, text, with_marks in pairs]

    def _one(self, turns: Turns) -> Rendered | str:
        try:
            text = self._render([turns])[0]
        except Exception as error:  # of Jinja, of many types
            return f"the template fails: {one_line(error)}"
        return self._placed(turns, text, "")

    def _render(self, conversations: Sequence[Turns], *, prompts: bool = False) -> list[str]:
        template = self.text
        if "strftime_now" in template:
            template = _DATE + template
        chats = [[{"role": t["role"], "content": t["text"]} for t in c] for c in conversations]
        with quiet():
            rendered: list[str] = self._tokenizer.apply_chat_template(
                chats, chat_template=template, tokenize=False, add_generation_prompt=prompts
            )
        return rendered

    def _placed(self, turns: Turns, text: str, with_marks: str) -> Rendered | str:
        found = _by_marks(turns, text, with_marks)
        if found is None:
            found = self._by_prefixes(turns, text)
        if found is None:
            return "the template changes turns so that responses cannot be found in its text"
        ended = [self._with_end(text, span) for span in found]
        last = len(ended) > 0 and turns[-1]["role"] == ASSISTANT
        if last and self._eos is not None and not self._is_ended(text, ended[-1]):
            start, stop = ended[-1]
            text = text[: max(stop, len(text.rstrip()))] + self._eos
            ended[-1] = (start, len(text))
        return Rendered(text, tuple(ended))

    def _with_end(self, text: str, span: Span) -> Span:
        """Return a response with the end token behind it."""
        if self._end is None or self._is_ended(text, span):
            return span
        found = re.compile(rf"\s*{re.escape(self._end)}").match(text, span[1])
        return span if found is None else (span[0], found.end())

    def _is_ended(self, text: str, span: Span) -> bool:
        ends = [token for token in (self._end, self._eos) if token is not None]
        return text[: span[1]].endswith(tuple(ends))

    def _by_prefixes(self, turns: Turns, text: str) -> list[Span] | None:
        """Return the responses where the text of each part of a conversation begins the text."""
        spans = []
        try:
            for i, turn in enumerate(turns):
                if turn["role"] != ASSISTANT:
                    continue
                before = self._render([turns[:i]], prompts=True)[0]
                after = self._render([turns[: i + 1]])[0].rstrip()
                if not (text.startswith(before) and after.startswith(before)):
                    return None
                if not text.startswith(after):
                    return None
                spans.append((len(before), len(after)))
        except Exception:  # of Jinja, of many types: not a template for parts of conversations
            return None
        return spans


def _marked(turns: Turns) -> Turns:
    """Return turns with a mark in place of each response."""
    return [
        {**t, "text": f"{_OPEN}{i}{_CLOSE}"} if t["role"] == ASSISTANT else t
        for i, t in enumerate(turns)
    ]


def _by_marks(turns: Turns, text: str, with_marks: str) -> list[Span] | None:
    """Return the responses where a text is the one with marks, and responses in their place."""
    spans, place = [], 0
    for i, turn in enumerate(turns):
        if turn["role"] != ASSISTANT:
            continue
        mark = f"{_OPEN}{i}{_CLOSE}"
        before, found, with_marks = with_marks.partition(mark)
        if not found or mark in with_marks or not text.startswith(before, place):
            return None
        place += len(before)
        response = turn["text"]
        # Templates may strip a text.
        forms = (response, response.strip(), response.lstrip(), response.rstrip())
        rest = with_marks[: with_marks.find(_OPEN)] if _OPEN in with_marks else with_marks
        fitting = (f for f in forms if text.startswith(f + rest, place))
        own = next(fitting, None)
        if own is None:
            return None
        spans.append((place, place + len(own)))
        place += len(own)
    return spans if text[place:] == with_marks else None


def _begin_token(tokenizer: Any) -> str | None:
    """Return the begin token of a tokenizer that puts one before each text."""
    ids = tokenizer("a")["input_ids"]
    begins = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token if begins else None
