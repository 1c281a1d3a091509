"""A model's chat template: the one place where chats become text, for the builder and the runtime."""

import copy
from datetime import datetime
from typing import Any

import jinja2
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from ..memory.errors import BadInput
from ..memory.messages import check_text

_OTHER_DAYS = ("2001-02-03T04:05:06", "1999-11-22T17:38:49")  # no field of a date, nor the weekday, is in both


class ChatTemplate:
    """Raises BadInput if the template is not one."""

    def __init__(self, source: str, bos: str, eos: str):
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
        """The text of normalised messages. Raises BadInput, one line, if the template refuses them.

        date: the time that strftime_now gives, in ISO format.  [default: now]
        options: what else a request may hand to the template, as tool_choice.
        """
        now = datetime.now() if date is None else datetime.fromisoformat(date)
        return self._render(messages, now.strftime, tools, add_generation_prompt, options)

    def on_other_days(self, messages: list[dict], tools: list[dict] | None = None) -> list[str]:
        """The text of these messages at two times that have nothing in common: what differs depends on the time."""
        return [self.render(messages, tools, date) for date in _OTHER_DAYS]

    def _render(self, messages: list[dict], strftime_now, tools, add_generation_prompt: bool, options: dict) -> str:
        def text(content_of_none) -> str:
            formatter = copy.copy(self._formatter)  # nothing is shared between calls
            formatter.strftime_now = strftime_now  # type: ignore[method-assign]
            formatter.add_generation_prompt = add_generation_prompt
            given: list[Any] = [m if m["content"] is not None else {**m, "content": content_of_none} for m in messages]
            try:
                prompt = formatter(messages=given, tools=tools, **options).prompt
            except Exception as error:  # a template is a program: it can fail in any way
                roles = ", ".join(m["role"] for m in messages)
                raise BadInput(f"the chat template of the model refuses a chat of the roles {roles}: {error}") from None
            return check_text(prompt, "the text of the chat")

        if all(m["content"] is not None for m in messages):
            return text(None)
        # some templates take no null, or write it as None; others know a tool call by it
        try:
            null = text(None)
        except BadInput:
            return text("")
        try:
            return null if null.count("None") <= (empty := text("")).count("None") else empty
        except BadInput:
            return null
