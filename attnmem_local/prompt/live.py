"""Recognising the prefix of a memory in a live prompt, and what to feed after it.

Texts are compared, not tokens: at the seam tokens may merge, and memories of older builds end elsewhere. What follows the
prefix's text is then tokenized alone, which is what the memory was built for.
"""

from ..memory.errors import BadInput, PrefixMismatch
from ..memory.messages import USUAL_ROLES, marked, normalised, tool_names
from ..memory.prefix import Prefix
from .prefix import held_back

_BEFORE, _AFTER = 16, 32  # characters around a difference that a message shows


def live_chat(
    tokenizer, prefix: Prefix, messages: list[dict], tools: list[dict] | None = None, add_generation_prompt: bool = True, **options
) -> list[int]:
    """Tokens of a chat after the prefix; the messages and tools of the prefix need not be repeated.

    options: what else the request hands to the template.
    Raises BadInput for a chat that is none, or that the template refuses; PrefixMismatch, which says what differs, if it does
    not begin with the prefix.
    """
    messages = normalised(messages)
    template = tokenizer.template
    if tools and prefix.tools and tools != prefix.tools:
        raise PrefixMismatch(
            f"the tools differ: the memory was built with {tool_names(prefix.tools)}, the chat has {tool_names(tools)}: "
            f"{_difference(repr(prefix.tools), repr(tools))}; leave them out, as the memory has its own, "
            "or build it with those of the chat"
        )
    tools = prefix.tools or tools or None

    def render(chat: list[dict], tools=tools) -> str:
        return template.render(chat, tools, prefix.date, add_generation_prompt, **options)

    mismatch = None
    try:
        chat = with_prefix_messages(messages, prefix.messages or [])
    except PrefixMismatch as error:
        chat, mismatch = messages, error
    for candidate in [chat, messages] if chat is not messages else [chat]:
        try:
            text = render(candidate)
        except BadInput:
            if candidate is chat and not mismatch:
                raise
            break
        if (tokens := _after(tokenizer, prefix, text)) is not None:
            _check_roles(render, candidate)
            return tokens
    if mismatch:
        raise mismatch
    raise _mismatch(tokenizer, prefix, chat, tools, render)


def live_prompt(tokenizer, prefix: Prefix, prompt: str | list[int]) -> list[int]:
    """Tokens of a prompt that goes on after the prefix, or repeats it first.

    Raises BadInput where there are none: a memory that takes in its whole text cannot go on without a prompt.
    """
    if not isinstance(prompt, str) and prompt[: len(prefix.tokens)] == prefix.tokens:
        live = prompt[len(prefix.tokens) :] or held_back(tokenizer, prefix)
    else:
        text = _rest(prompt if isinstance(prompt, str) else tokenizer.decode(prompt), prefix.text, tokenizer.bos)
        rest = prompt if text is None else text
        held = held_back(tokenizer, prefix)
        live = held + (tokenizer.encode_after(rest, prefix.tokens + held) if isinstance(rest, str) else rest)
    if not live:
        raise BadInput(
            "the prompt adds nothing to the prefix, which the memory holds to its last token; build the memory again, or ask more"
        )
    return live


def with_prefix_messages(messages: list[dict], prefix_messages: list[dict]) -> list[dict]:
    """The whole chat, of which the live messages may repeat the prefix's messages, its system messages alone, or none.

    Raises PrefixMismatch if they begin with other system messages.
    """
    if _same(messages[: len(prefix_messages)], prefix_messages):
        return [*prefix_messages, *messages[len(prefix_messages) :]]
    systems, prefix_systems = _systems(messages), _systems(prefix_messages)
    if _same(systems, prefix_systems[: len(systems)]):
        return [*prefix_messages, *messages[len(systems) :]]
    if not prefix_systems:
        first = prefix_messages[0]
        raise PrefixMismatch(
            f"the chat has a system message, {_short(systems[0])}, but the memory holds none: "
            f"its prefix begins with a message of the role '{first['role']}', {_short(first)}; "
            "leave the system message out, or build a memory that begins with it"
        )
    a, b = next(((a, b) for a, b in zip(prefix_systems, systems) if not _same([a], [b])), (None, systems[-1]))
    difference = _difference(a["content"], b["content"]) if a else f"the chat goes on with {_short(b)}"
    raise PrefixMismatch(
        f"the chat has a system message, but the memory holds another one: {difference}; "
        "leave it out, repeat that of the memory, detach the memory, or build one with this message"
    )


def drop_prefix(tokens: list[int], prefix_tokens: list[int]) -> list[int]:
    """What follows the prefix in tokens. Raises PrefixMismatch if they do not begin with it."""
    n = len(prefix_tokens)
    if tokens[:n] != prefix_tokens:
        same = next((i for i, (a, b) in enumerate(zip(tokens, prefix_tokens)) if a != b), min(len(tokens), n))
        raise PrefixMismatch(f"the text does not begin with the memory's prefix: {same} of {n} tokens agree")
    return tokens[n:]


def _after(tokenizer, prefix: Prefix, text: str) -> list[int] | None:
    """Tokens of what follows the prefix in a text that has BOS, None if it does not begin with it."""
    if prefix.text and text.startswith(prefix.text):
        held = held_back(tokenizer, prefix)
        return held + tokenizer.encode_after(text[len(prefix.text) :], prefix.tokens + held)
    tokens = tokenizer.encode(text, add_bos=False)  # the text of a file can be less exact than its tokens
    return tokens[len(prefix.tokens) :] if tokens[: len(prefix.tokens)] == prefix.tokens else None


def _rest(text: str, prefix: str, bos: str) -> str | None:
    """What follows a prefix in a text, which may have BOS before it and CR LF for line ends; None if it does not begin with it."""
    if not prefix:
        return None
    for begin in (text, text.removeprefix(bos)):
        if begin.startswith(prefix):
            return begin[len(prefix) :]
        *lines, last = prefix.replace("\r\n", "\n").split("\n")
        *found, rest = begin.split("\n", len(lines))
        if [line.removesuffix("\r") for line in found] == lines and rest.startswith(last):
            return rest[len(last) :]
    return None


def _same(a: list[dict], b: list[dict]) -> bool:
    """Whether these are the same messages; a name or another field changes nothing that most templates write."""

    def read(messages):
        return [(m["role"], m["content"] or "", m.get("tool_calls") or None) for m in messages]

    return read(a) == read(b)


def _systems(messages: list[dict]) -> list[dict]:
    """The system messages that a chat begins with."""
    return messages[: next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))]


def _check_roles(render, chat: list[dict]) -> None:
    """Raises BadInput for a message of an unusual role that the template leaves out: no answer would know of it."""
    if all(m["role"] in USUAL_ROLES for m in chat):
        return
    with_marks, _, what = marked(chat, None)
    text = render(with_marks)
    for mark, subject in what.items():
        if mark not in text and not any(f"'{role}'" in subject for role in USUAL_ROLES):
            raise BadInput(
                f"the chat template of the model does not write {subject}; its usual roles are {', '.join(USUAL_ROLES[:4])}"
            )


def _mismatch(tokenizer, prefix: Prefix, chat: list[dict], tools, render) -> PrefixMismatch:
    """What differs between the prefix and a rendered chat, and the remedy."""
    sides = _difference(prefix.text, render(chat))

    def fits(chat: list[dict], tools=tools) -> bool:
        try:
            return _after(tokenizer, prefix, render(chat, tools)) is not None
        except BadInput:
            return False

    if prefix.messages is None:
        return PrefixMismatch(
            f"the memory was built from plain text, which this chat does not begin with: {sides}; "
            "for chat, build it from chat messages or with --system"
        )
    if tools and not prefix.tools and fits(chat, tools=None):
        return PrefixMismatch(
            f"the tools differ: the memory was built with none, the chat has {tool_names(tools)}, "
            f"and the chat template writes them into the prefix: {sides}; leave them out, or build the memory with --tools"
        )
    if prefix.date is None and len(set(tokenizer.template.on_other_days(chat, tools))) > 1:
        return PrefixMismatch(
            "the date differs: the chat template writes the current one into the prefix, "
            f"and this memory does not keep that of its build: {sides}; build it again"
        )
    if fits([*prefix.messages, {"role": "user", "content": "A"}]):
        following = next((f"one of the role '{m['role']}'" for m in chat[len(prefix.messages) :]), "none")
        return PrefixMismatch(
            "the prefix of the memory takes in the beginning of a user's message, "
            f"but the next one of the chat is {following}: {sides}; begin with a message of the user, or build the memory again"
        )
    return PrefixMismatch(
        f"the chat template differs: it does not write the messages of the memory's prefix as where it was built: {sides}; "
        "use the model file that it was built with, or build it again"
    )


def _difference(memory: str, chat: str) -> str:
    """Both texts around the first character in which they differ."""
    at = next((i for i, (a, b) in enumerate(zip(memory, chat)) if a != b), min(len(memory), len(chat)))
    begin = max(0, at - _BEFORE)

    def excerpt(text: str) -> str:
        return repr("…" * (begin > 0) + text[begin : at + _AFTER] + "…" * (at + _AFTER < len(text)))

    return f"the memory has {excerpt(memory)}, the chat {excerpt(chat)}"


def _short(message: dict) -> str:
    content = message["content"] or ""
    return repr(content[:_AFTER] + "…" * (len(content) > _AFTER))
