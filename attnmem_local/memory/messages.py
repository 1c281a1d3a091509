"""Chat messages and tools as OpenAI clients send them, checked and brought to one form."""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from .errors import BadInput

USUAL_ROLES = ("system", "user", "assistant", "tool", "function")  # other roles are known to few templates
_MARK = "zq{}zq"  # no template changes it, and no text has it


def normalised(messages) -> list[dict]:
    """Messages with a role and a content of text each; `developer` is `system`, as OpenAI defines it.

    Text parts are joined by a newline, as llama.cpp joins them. The content is None where an assistant message has none.
    Fields other than these two stay as they are. Raises BadInput, which names the message.
    """
    if not isinstance(messages, (list, tuple)):
        raise BadInput(f"chat messages are a list of objects, not {_kind(messages)}")
    return [_normalised(message, f"message {number}") for number, message in enumerate(messages, 1)]


def parse_messages(text: str) -> list[dict]:
    """Chat messages from JSON. Raises BadInput."""
    return normalised(_parse(text, "chat messages"))


def parse_tools(text: str) -> list[dict]:
    """Tools from JSON. Raises BadInput."""
    return checked_tools(_parse(text, "tools"))


def checked_tools(tools) -> list[dict]:
    """The same tools. Raises BadInput if they are not what OpenAI clients send."""
    if not (isinstance(tools, list) and tools and all(_is_tool(tool) for tool in tools)):
        raise BadInput('tools are a JSON list of objects like {"type": "function", "function": {"name": …, "parameters": …}}')
    check_json(tools, "the tools")
    return tools


def parse_date(text: str) -> str:
    """The same date, in ISO format. Raises BadInput."""
    try:
        datetime.fromisoformat(text)
    except ValueError:
        raise BadInput(f"{text!r} is no date in ISO format") from None
    return text


def tool_names(tools: list[dict] | None) -> str:
    return ", ".join(tool["function"]["name"] if _is_tool(tool) else repr(tool) for tool in tools or []) or "none"


def check_text(text: str, what: str) -> str:
    """The same text. Raises BadInput for a lone surrogate, which no UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(
            f"{what} has half a character, {text[error.start]!r}, at character {error.start}: it was cut or decoded wrongly; "
            "give it as UTF-8"
        ) from None
    return text


def check_json(value: Any, what: str) -> None:
    """Raises BadInput for what no JSON of UTF-8 can hold."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput(f"{what} cannot be written as JSON: {error}") from None
    check_text(text, what)


def marked(messages: list[dict], tools: list[dict] | None) -> tuple[list[dict], list[dict] | None, dict[str, str]]:
    """Messages and tools with a mark at the end of each content and name, and what each mark stands for.

    What a template does not write can be told by the marks that are missing in its text.
    """
    what: dict[str, str] = {}

    def mark(subject: str) -> str:
        what[text := _MARK.format(len(what))] = subject
        return text

    def named(tool: dict, subject: str) -> dict:
        function = tool["function"]
        return {**tool, "function": {**function, "name": function["name"] + mark(subject)}}

    result = []
    for number, message in enumerate(messages, 1):
        where = f"message {number}, with the role '{message['role']}'"
        calls = message.get("tool_calls")
        if calls and isinstance(calls, list) and all(map(_is_tool, calls)):
            message = {**message, "tool_calls": [named(call, f"the tool calls of {where}") for call in calls]}
        if message["content"] or not calls:
            message = {**message, "content": (message["content"] or "") + mark(where)}
        result.append(message)
    return result, tools and [named(tool, f"the tool '{tool['function']['name']}'") for tool in tools], what


def _normalised(message, which: str) -> dict:
    if not isinstance(message, Mapping):
        raise BadInput(f"{which} is {_kind(message)}, expected an object with a role and a content")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise BadInput(f"{which} has no role, as system, user or assistant")
    check_text(role, f"the role of {which}")
    which = f"{which}, with the role '{role}',"
    return {**message, "role": "system" if role == "developer" else role, "content": _content(message, which)}


def _content(message, which: str) -> str | None:
    content = message.get("content")
    if content is None:
        if message["role"] == "assistant" or message.get("tool_calls"):
            return None if message.get("tool_calls") else ""
        raise BadInput(f"{which} has no content")
    if isinstance(content, list):
        content = "\n".join(_part(part, which) for part in content)
    if not isinstance(content, str):
        raise BadInput(f"{which} has a content that is {_kind(content)}, expected text")
    return check_text(content, f"the content of {which}")


def _part(part, which: str) -> str:
    if not isinstance(part, Mapping):
        raise BadInput(f"{which} has a part that is {_kind(part)}, expected an object with a type")
    kind = part.get("type")
    if kind != "text":
        raise BadInput(f"{which} has a part of the type '{kind}', but a memory's chat takes text alone; leave that part out")
    if not isinstance(part.get("text"), str):
        raise BadInput(f"{which} has a part of the type 'text' without text")
    return part["text"]


def _is_tool(tool) -> bool:
    return isinstance(tool, dict) and isinstance(f := tool.get("function"), dict) and isinstance(f.get("name"), str)


def _parse(text: str, what: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{what} are not JSON: {error}") from None


def _kind(value) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")
