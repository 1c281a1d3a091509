"""A model's chat template, which turns all chats into text, for the builder and the runtime alike."""

import copy
from datetime import datetime
from typing import Any

import jinja2
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from ..memory.errors import BadInput
from ..memory.messages import check_text

_OTHER_DAYS = ("2001-02-03T04:05:06", "1999-11-22T17:38:49")  # two times that differ in every field and in the weekday


class ChatTemplate:
    """A Jinja template that renders messages and tools as text."""

    def __init__(self, source: str, bos: str, eos: str):
        """source: the template. bos, eos: texts of these tokens. Raises BadInput if the template has a syntax error."""
        try:
            self._formatter = Jinja2ChatFormatter(source, eos_token=eos, bos_token=bos)
        except jinja2.TemplateSyntaxError as error:
            raise BadInput(f"the chat template of the model is broken: {error}, in line {error.lineno}") from None

    def render(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        date: str | None = None,
        add_generation_prompt: bool = True,
        **options,
    ) -> str:
        """The text of normalised messages. Raises BadInput if the template refuses them.

        date: the time for strftime_now in the template, in ISO format.  [default: now]
        options: further variables of a request for the template, such as tool_choice.
        """
        now = datetime.now() if date is None else datetime.fromisoformat(date)
        return self._render(messages, now.strftime, tools, add_generation_prompt, options)

    def on_other_days(self, messages: list[dict], tools: list[dict] | None = None) -> list[str]:
        """The text of the messages at two unrelated times; if the two differ, the template writes the time."""
        return [self.render(messages, tools, date) for date in _OTHER_DAYS]

    def _render(self, messages: list[dict], strftime_now, tools, add_generation_prompt: bool, options: dict) -> str:
        def text(content_of_none) -> str:
            formatter = copy.copy(self._formatter)  # a copy, as the formatter keeps these settings
            formatter.strftime_now = strftime_now  # type: ignore[method-assign]
            formatter.add_generation_prompt = add_generation_prompt
            filled: list[Any] = [m if m["content"] is not None else {**m, "content": content_of_none} for m in messages]
            try:
                prompt = formatter(messages=filled, tools=tools, **options).prompt
            except Exception as error:  # a template is a program and can fail in any way
                roles = ", ".join(m["role"] for m in messages)
                raise BadInput(f"the chat template of the model refuses a chat of the roles {roles}: {error}") from None
            return check_text(prompt, "the text of the chat")

        if all(m["content"] is not None for m in messages):
            return text(None)
        # content None marks a tool call in some templates; others refuse it or write "None", and need an empty text instead
        try:
            with_null = text(None)
        except BadInput:
            return text("")
        try:
            with_empty = text("")
        except BadInput:
            return with_null
        return with_null if with_null.count("None") <= with_empty.count("None") else with_empty
