"""Chat messages and tools as OpenAI clients send them, checked and normalised."""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from .errors import BadInput

USUAL_ROLES = ("system", "user", "assistant", "tool", "function")  # few templates know any other
_MARK = "zq{}zq"  # rare in texts, and left alone by templates, which may trim or change spaces and punctuation


def normalised(messages) -> list[dict]:
    """The same messages, each with a role and a text as content; the role `developer` becomes `system`, as OpenAI defines it.

    Text parts are joined by newlines, as in llama.cpp. A message of tool calls alone has the content None. All other fields are
    kept. Raises BadInput, which names the message.
    """
    if not isinstance(messages, (list, tuple)):
        raise BadInput(f"chat messages must be a list of objects, not {_kind(messages)}")
    return [_normalised(message, f"message {number}") for number, message in enumerate(messages, 1)]


def parse_messages(text: str) -> list[dict]:
    """Chat messages from JSON. Raises BadInput."""
    return normalised(_parse(text, "chat messages"))


def parse_tools(text: str) -> list[dict]:
    """Tools from JSON. Raises BadInput."""
    return checked_tools(_parse(text, "tools"))


def checked_tools(tools) -> list[dict]:
    """The same tools. Raises BadInput if they do not have the form that OpenAI clients send."""
    if not (isinstance(tools, list) and tools and all(_is_tool(tool) for tool in tools)):
        raise BadInput(
            'tools must be a JSON list of objects like {"type": "function", "function": {"name": …, "parameters": …}}, at least one'
        )
    check_json(tools, "the tools")
    return tools


def parse_date(text: str) -> str:
    """The same date, in ISO format. Raises BadInput."""
    try:
        datetime.fromisoformat(text)
    except ValueError:
        raise BadInput(f"{text!r} is not a date in ISO format, such as 2026-11-25T09:00:00") from None
    return text


def tool_names(tools: list[dict] | None) -> str:
    """The names of tools for an error message, separated by commas; "none" if there are no tools."""
    return ", ".join(tool["function"]["name"] if _is_tool(tool) else repr(tool) for tool in tools or []) or "none"


def check_text(text: str, subject: str) -> str:
    """The same text. Raises BadInput for a lone surrogate, which UTF-8 cannot encode; subject: what an error calls the text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(
            f"{subject} has half a character, {text[error.start]!r}, at character {error.start}: it was cut or decoded wrongly; "
            "give it as UTF-8"
        ) from None
    return text


def check_json(value: Any, subject: str) -> None:
    """Raises BadInput for a value that cannot be written as JSON in UTF-8; subject: what an error calls the value."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput(f"{subject} cannot be written as JSON: {error}") from None
    check_text(text, subject)


def marked(messages: list[dict], tools: list[dict] | None) -> tuple[list[dict], list[dict] | None, dict[str, str]]:
    """Messages and tools with a unique mark at the end of each content and tool name, and a description of each marked item.

    Marks that are missing from the rendered text reveal the messages and tools that a template leaves out.
    """
    descriptions: dict[str, str] = {}  # mark -> the marked item, in words

    def mark(description: str) -> str:
        descriptions[text := _MARK.format(len(descriptions))] = description
        return text

    def with_marked_name(tool: dict, description: str) -> dict:
        function = tool["function"]
        return {**tool, "function": {**function, "name": function["name"] + mark(description)}}

    marked_messages = []
    for number, message in enumerate(messages, 1):
        description = f"message {number}, with the role '{message['role']}'"
        calls = message.get("tool_calls")
        if calls and isinstance(calls, list) and all(map(_is_tool, calls)):
            message = {**message, "tool_calls": [with_marked_name(call, f"the tool calls of {description}") for call in calls]}
        if message["content"] or not calls:
            message = {**message, "content": (message["content"] or "") + mark(description)}
        marked_messages.append(message)
    marked_tools = tools and [with_marked_name(tool, f"the tool '{tool['function']['name']}'") for tool in tools]
    return marked_messages, marked_tools, descriptions


def _normalised(message, subject: str) -> dict:
    if not isinstance(message, Mapping):
        raise BadInput(f"{subject} is {_kind(message)}, expected an object with a role and a content")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise BadInput(f"{subject} has no role; give one, such as system, user or assistant")
    check_text(role, f"the role of {subject}")
    subject = f"{subject}, with the role '{role}',"
    return {**message, "role": "system" if role == "developer" else role, "content": _content(message, subject)}


def _content(message, subject: str) -> str | None:
    content = message.get("content")
    if content is None:
        if message["role"] == "assistant" or message.get("tool_calls"):
            return None if message.get("tool_calls") else ""
        raise BadInput(f"{subject} has no content; give a text")
    if isinstance(content, list):
        content = "\n".join(_part(part, subject) for part in content)
    if not isinstance(content, str):
        raise BadInput(f"{subject} has a content that is {_kind(content)}, expected text")
    return check_text(content, f"the content of {subject}")


def _part(part, subject: str) -> str:
    """The text of one part of a content that is a list."""
    if not isinstance(part, Mapping):
        raise BadInput(f"{subject} has a part that is {_kind(part)}, expected an object with a type")
    kind = part.get("type")
    if kind != "text":
        raise BadInput(f"{subject} has a part of the type '{kind}', but a chat with a memory is text only; leave that part out")
    if not isinstance(part.get("text"), str):
        raise BadInput(f"{subject} has a part of the type 'text' without a text")
    return part["text"]


def _is_tool(tool) -> bool:
    """Whether this is a tool or a tool call, both of which name a function."""
    return isinstance(tool, dict) and isinstance(f := tool.get("function"), dict) and isinstance(f.get("name"), str)


def _parse(text: str, subject: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{subject} are not JSON: {error}") from None


def _kind(value) -> str:
    """The JSON type of a value in words, for errors."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")
