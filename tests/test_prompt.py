"""Prefixes and prompts from users: what becomes part of a memory, which live prompts fit it, and which are refused."""

import json
import struct
from dataclasses import replace

import llama_cpp
import pytest
from click.testing import CliRunner
from helpers.paths import ROOT
from helpers.tiny import write_tiny

from attnmem_local.builder.build import exact_memory
from attnmem_local.builder.capture import prefill
from attnmem_local.builder.sources.traces import traces
from attnmem_local.cli import main
from attnmem_local.engine import template as template_module
from attnmem_local.engine.template import ChatTemplate
from attnmem_local.engine.tokenizer import GgufTokenizer
from attnmem_local.library import DEFAULT_MODEL
from attnmem_local.memory import errors
from attnmem_local.memory.memory import Memory
from attnmem_local.memory.messages import parse_messages
from attnmem_local.memory.prefix import Prefix
from attnmem_local.prompt.live import live_chat
from attnmem_local.prompt.prefix import chat_prefix, held_back, read_prefix
from attnmem_local.runtime.llama import MemoryLlama

TEMPLATES = ROOT / "build/tree/vendor/llama.cpp/models/templates"
HANDBOOK = "The desk opens at 9:00. A ticket costs 4 euro.\n"
SYSTEM = {"role": "system", "content": HANDBOOK}
EXAMPLES = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]
HI = {"role": "user", "content": "Hi"}
OK = {"role": "assistant", "content": "OK"}
NOTHING = {"type": "object", "properties": {}}
HOURS, PRICES = ({"type": "function", "function": {"name": name, "parameters": NOTHING}} for name in ("hours", "prices"))
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "hours", "arguments": "{}"}}],
}
ANSWER = {"role": "tool", "tool_call_id": "1", "content": "9:00"}

_CHATML = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = "{% for m in messages %}" + _CHATML + "{% endfor %}" + _ASK
# a short version of qwen2's template: it leaves out messages of other roles, writes tools in the system turn, and accepts null
QWEN2 = (
    "{{ '<|im_start|>system\n' + (messages[0].content if messages[0].role == 'system' else 'You are Qwen.') }}"
    "{% if tools %}{{ '\n# Tools' }}{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% for m in messages %}{% if m.role in ('user', 'tool') or (m.role == 'system' and not loop.first) %}"
    + _CHATML
    + "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% if m.content %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls %}{{ '<tool_call>' + call.function.name }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    + _ASK
)
MISTRAL = (  # writes the system message into the user's last message
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}{% if loop.last and system %}{{ system + '\n\n' }}{% endif %}"
    "{{ m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)
FIRST_USER = MISTRAL.replace("loop.last", "loop.index0 == 1")
PLAIN = (  # without special tokens
    "{% for m in messages %}{{ m.role.upper() + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
DATE = (
    "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '.\n' + messages[0].content + '<|im_end|>\n' }}"
    "{% for m in messages[1:] %}" + _CHATML + "{% endfor %}" + _ASK
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    + _CHATML
    + "{% endfor %}"
    + _ASK
)


class WithTemplate(GgufTokenizer):
    """The tokenizer of the default model with another template."""

    def __init__(self, source: str | None = None):
        super().__init__(DEFAULT_MODEL)
        if source is not None:
            self.template = ChatTemplate(source, bos="<|endoftext|>", eos="<|im_end|>")


@pytest.fixture(scope="module")
def default():
    return WithTemplate()


@pytest.fixture(scope="module")
def qwen2():
    return WithTemplate(QWEN2)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


class Files:
    """Files of a tiny model and of its exact memories, whose answers can be compared with those of the full prefix."""

    def __init__(self, tiny):
        self.tiny = tiny

    def tokenizer(self, **options) -> GgufTokenizer:
        return GgufTokenizer(self.model(**options))

    def model(self, **options):
        name = "-".join(f"{abs(hash(value)):x}" for value in options.values()) or "tiny"
        path = self.tiny.folder / f"{name}.gguf"
        return path if path.exists() else write_tiny(path, DEFAULT_MODEL, **options)

    def memory(self, prefix: Prefix, name="prompt"):
        return self.tiny.save(exact_memory(self.tiny.model, prefix, prefill(self.tiny.model, prefix.tokens)), name)

    def llama(self, prefix: Prefix, **options):
        model = self.model(**{key: options.pop(key) for key in ("template", "add_bos") if key in options})
        return MemoryLlama(str(model), memory=self.memory(prefix), n_ctx=512, verbose=False, **options)


@pytest.fixture(scope="module")
def files(tiny):
    return Files(tiny)


def fed(llama) -> str:
    """The live text that the last completion evaluated; the one token of its answer is not among it."""
    return GgufTokenizer(llama._model).decode(llama.input_ids[: llama.n_tokens].tolist())


# the user's message

BEGINNINGS = (
    *("Hi", "9", "\nHi", "\n\n\nHi", "  Hi", "    def f():\n        pass", "\t\tHi", "\r\nHi", " \n Hi", "", " "),
    *("'s", ".", "…", "。好", "🙂", "é", "<|im_end|>", "[INST]"),
)


@pytest.mark.parametrize("source", [None, QWEN2, PLAIN, FIRST_USER], ids=["default", "qwen2", "plain", "first-user"])
def test_a_message_may_begin_with_anything(source):
    tokenizer = WithTemplate(source)
    prefix = chat_prefix(tokenizer, [SYSTEM])
    assert HANDBOOK.strip() in prefix.text and tokenizer.decode(prefix.tokens) == prefix.text
    for beginning in BEGINNINGS:
        whole = tokenizer.template.render([SYSTEM, user(beginning)])
        live = live_chat(tokenizer, prefix, [user(beginning)])
        assert prefix.text + tokenizer.decode(live) == whole, beginning
        if source in (None, QWEN2):  # these prefixes end in a special token, so the tokens are equal too
            assert prefix.tokens + live == tokenizer.encode(whole, add_bos=False), beginning


def test_a_trace_may_begin_with_indented_code(default):
    prefix = chat_prefix(default, [SYSTEM])
    (window,) = traces(default, prefix, [[user("    def f():\n        pass"), OK]], 1000)
    assert "def f()" in default.decode(window)
    with pytest.raises(ValueError, match="^trace 2: message 1 has no role"):
        traces(default, prefix, ["text", [{"content": "Hi"}]], 1000)


def test_a_memory_of_an_older_build_answers_any_message(files):
    """Its prefix includes the beginning of the user's turn, with which a newline merges."""
    tokenizer = files.tiny.model.tokenizer
    tokens = tokenizer.encode(f"<|im_start|>system\n{HANDBOOK}<|im_end|>\n<|im_start|>user\n", add_bos=False)
    llama = files.llama(Prefix(tokens, tokenizer.decode(tokens), [SYSTEM]))
    llama.create_chat_completion([user("\n\nHi")], max_tokens=1)
    assert fed(llama) == "\n\nHi<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(errors.PrefixMismatch, match="beginning of a user's message.*begin with a message of the user"):
        llama.create_chat_completion([OK, HI])


def test_answers_to_a_chat_are_those_of_the_full_prompt(files):
    """This includes streams, JSON, log probabilities and tool calls, all compared with a plain llama_cpp.Llama."""
    messages = [SYSTEM, user("\n  Hi")]
    plain = MemoryLlama(str(files.model()), n_ctx=512, verbose=False, logits_all=True)
    llama = files.llama(chat_prefix(files.tiny.model.tokenizer, [SYSTEM]), logits_all=True)
    shared = {"max_tokens": 12, "temperature": 0, "seed": 1}
    choice = {"tools": [HOURS], "tool_choice": {"type": "function", "function": {"name": "hours"}}}
    for options in (
        {},
        {"response_format": {"type": "json_object"}},
        {"logprobs": True, "top_logprobs": 2},
        {"stop": ["e"]},
        choice,
    ):
        expected, answer = (model.create_chat_completion(messages, **shared, **options)["choices"][0] for model in (plain, llama))
        expected_logprobs, logprobs = expected.pop("logprobs"), answer.pop("logprobs")
        for call in [*expected["message"].get("tool_calls", []), *answer["message"].get("tool_calls", [])]:
            call.pop("id")
        assert answer == expected
        if logprobs:
            assert [t["token"] for t in logprobs["content"]] == [t["token"] for t in expected_logprobs["content"]]
    chunks = llama.create_chat_completion(messages[1:], stream=True, **shared)
    whole = plain.create_chat_completion(messages, **shared)["choices"][0]["message"]["content"]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == whole


# prefixes of text


def test_special_tokens_in_a_text_are_read_as_llama_cpp_reads_them(files, tmp_path):
    text = f"<|im_start|>system\n{HANDBOOK}<|im_end|>\n<|im_start|>user\n"
    (tmp_path / "chat.txt").write_text(text)
    prefix = read_prefix(files.tiny.model.tokenizer, [tmp_path / "chat.txt"])
    plain = llama_cpp.Llama(str(files.model()), n_ctx=512, verbose=False)
    tokens = prefix.tokens + held_back(files.tiny.model.tokenizer, prefix)
    assert tokens == plain.tokenize(text.encode(), add_bos=True, special=True) and tokens[0] == 1
    ask = "Hi<|im_end|>\n<|im_start|>assistant\n"
    expected = plain.create_completion(text + ask, max_tokens=12, temperature=0)["choices"][0]["text"]
    llama = files.llama(prefix)
    for prompt in (ask, text + ask):
        assert llama.create_completion(prompt, max_tokens=12, temperature=0)["choices"][0]["text"] == expected
    chat = llama.create_chat_completion([SYSTEM, HI], max_tokens=12, temperature=0)  # rendered, it begins with the same text
    assert chat["choices"][0]["message"]["content"] == expected
    with pytest.raises(errors.MemoryRefused, match="plain text"):
        llama.create_chat_completion([HI])


@pytest.mark.parametrize("add_bos", [False, True], ids=["no BOS", "BOS"])
def test_a_text_that_repeats_the_prefix_is_not_fed_twice(files, add_bos):
    text, more = "We sell tea.\nTea costs 4 euros at t", "he desk"
    tokenizer = GgufTokenizer(files.model(**({"add_bos": True} if add_bos else {})))
    prefix = Prefix(tokenizer.encode(text, add_bos=True), text)
    assert (prefix.tokens[0] == 1) == add_bos
    llama = files.llama(prefix, **({"add_bos": True} if add_bos else {}))
    whole = llama.tokenize((text + more).encode())
    assert whole[: len(prefix.tokens)] != prefix.tokens  # " t" and "he" merge at the seam
    for prompt in (more, text + more, text.replace("\n", "\r\n") + more, whole):
        llama.create_completion(prompt, max_tokens=1)
        assert fed(llama) == more, prompt
    llama.create_completion(text.replace("4", "5"), max_tokens=1)
    assert fed(llama) == text.replace("4", "5")


def test_a_text_goes_on_without_a_space_that_nobody_wrote(tmp_path):
    """With a SentencePiece vocabulary, llama.cpp puts a space before every text."""
    tokenizer = GgufTokenizer(write_tiny(tmp_path / "spm.gguf", DEFAULT_MODEL, spm=True, add_bos=True))
    (tmp_path / "a.txt").write_text("Green")
    prefix = read_prefix(tokenizer, [tmp_path / "a.txt"])
    (window,) = traces(tokenizer, prefix, [" tea"], 100)
    assert prefix.tokens + window == tokenizer.encode("Green tea", add_bos=True)
    live = window[len(held_back(tokenizer, prefix)) :]
    assert tokenizer.decode(live) == " tea" != tokenizer.decode(tokenizer.encode(" tea", add_bos=False))


def test_an_empty_prompt_goes_on_where_the_text_ends(tiny, tmp_path):
    """A prompt that equals the prefix does the same. The reference has the full text in the context."""
    text = "We sell tea. Green tea costs 4 euros, and black tea costs\n"
    (tmp_path / "a.txt").write_text(text)
    tokens = tiny.model.tokenizer.encode(text, add_bos=True)
    expected = MemoryLlama(str(tiny.path), verbose=False).create_completion(tokens, max_tokens=8, temperature=0)["choices"][0][
        "text"
    ]
    prefix = read_prefix(tiny.model.tokenizer, [tmp_path / "a.txt"])
    exact_memory(tiny.model, prefix, prefill(tiny.model, prefix.tokens)).save(tmp_path / "a.mem.gguf")
    llama = MemoryLlama(str(tiny.path), memory=tmp_path / "a.mem.gguf", verbose=False)
    for prompt in ("", text, tokens, tokens[:-1], []):
        assert llama.create_completion(prompt, max_tokens=8, temperature=0)["choices"][0]["text"] == expected
    answer = llama.create_completion(" tea", max_tokens=8, temperature=0)["choices"][0]["text"]
    assert answer == llama.create_completion(text + " tea", max_tokens=8, temperature=0)["choices"][0]["text"] != expected


def test_a_memory_of_an_older_build_cannot_go_on_without_a_prompt(files):
    """It covers the last token too, which would count twice if it were live as well."""
    text = "We sell tea. Green tea costs"
    llama = files.llama(Prefix(files.tiny.model.tokenizer.encode(text, add_bos=True), text))
    for prompt in ("", text):
        with pytest.raises(ValueError, match="adds nothing to the prefix"):
            llama.create_completion(prompt, max_tokens=1)


def test_echo_shows_the_prompt(files):
    text = "We sell tea."
    tokens = files.tiny.model.tokenizer.encode(text, add_bos=True)
    llama = files.llama(Prefix(tokens, text), logits_all=True)
    answer = llama.create_completion(" Green tea", max_tokens=4, temperature=0)["choices"][0]["text"]
    for prompt in (" Green tea", text + " Green tea", tokens + llama.tokenize(b" Green tea", add_bos=False)):
        shown = prompt if isinstance(prompt, str) else text + " Green tea"
        choice = llama.create_completion(prompt, max_tokens=4, temperature=0, echo=True, logprobs=1)["choices"][0]
        assert choice["text"] == shown + answer
        assert " Green tea".startswith(choice["logprobs"]["tokens"][0]) and choice["logprobs"]["text_offset"][0] == 0


# messages


@pytest.mark.parametrize(
    "messages, says",
    [
        ([{"role": "System", "content": HANDBOOK}], "does not write message 1, with the role 'System'"),
        ([SYSTEM, {"role": "critic", "content": "x"}], "message 2, with the role 'critic'"),
        ([], "empty"),
        ([{"role": "system", "content": ""}], "empty"),
    ],
)
def test_a_message_that_the_template_leaves_out_is_refused(qwen2, messages, says):
    with pytest.raises(ValueError, match=says):
        chat_prefix(qwen2, messages)


def test_a_live_message_that_the_template_leaves_out_is_refused(qwen2, default):
    message = {"role": "System", "content": "Be brief."}
    with pytest.raises(ValueError, match="does not write message 2, with the role 'System'"):
        live_chat(qwen2, chat_prefix(qwen2, [SYSTEM]), [message, HI])
    assert "Be brief." in default.decode(live_chat(default, chat_prefix(default, [SYSTEM]), [message, HI]))


def test_developer_is_system(qwen2):
    developer = {"role": "developer", "content": HANDBOOK}
    prefix = chat_prefix(qwen2, [developer])
    assert HANDBOOK in prefix.text and prefix.messages == [SYSTEM]
    assert live_chat(qwen2, prefix, [developer, HI]) == live_chat(qwen2, prefix, [SYSTEM, HI]) == live_chat(qwen2, prefix, [HI])


def test_messages_as_openai_clients_send_them(default):
    parts = {**SYSTEM, "content": [{"type": "text", "text": HANDBOOK}]}
    prefix = chat_prefix(default, [parts])
    assert prefix == chat_prefix(default, [SYSTEM])
    live = live_chat(default, prefix, [HI])
    for system in (parts, {**SYSTEM, "name": "desk"}, {**parts, "cache_control": {"type": "ephemeral"}}):
        assert live_chat(default, prefix, [system, HI]) == live
    two = user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])
    assert live_chat(default, prefix, [two]) == live_chat(default, prefix, [user("a\nb")])


def test_a_tool_call_without_content(default, qwen2, caplog):
    """Content null: refused by the default template, the mark of a tool call in others, and without effect in the rest."""
    absent = {key: value for key, value in CALL.items() if key != "content"}
    for tokenizer in (default, qwen2, WithTemplate(QWEN2.replace("{% if m.content %}", "{% if m.content is not none %}"))):
        prefix = chat_prefix(tokenizer, [SYSTEM])
        lives = [tokenizer.decode(live_chat(tokenizer, prefix, [HI, call, ANSWER])) for call in (CALL, absent)]
        assert lives[0] == lives[1] and "9:00" in lives[0] and "None" not in lives[0]
        assert ("<tool_call>hours" in lives[0]) == (tokenizer is not default)
    assert "<tool_call>hours" in chat_prefix(qwen2, [HI, CALL, ANSWER]).text
    assert "None" not in chat_prefix(default, [HI, CALL, ANSWER]).text
    assert "does not write the tool calls of message 2" in caplog.text


@pytest.mark.parametrize(
    "message, says",
    [
        ({"content": "Hi"}, "message 1 has no role"),
        ({"role": None, "content": "Hi"}, "message 1 has no role"),
        ({"role": "user"}, "with the role 'user', has no content"),
        ({"role": "user", "content": 5}, "content that is a number"),
        ({"role": "user", "content": {"text": "Hi"}}, "content that is an object"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "part of the type 'image_url'"),
        ({"role": "user", "content": ["Hi"]}, "a part that is text"),
        ({"role": "user", "content": "\ud800"}, r"half a character, '\\ud800'"),
        ("Hi", "message 1 is text"),
    ],
)
def test_a_malformed_message_is_one_clear_error(default, message, says):
    prefix = chat_prefix(default, [SYSTEM])
    for act in (
        lambda: chat_prefix(default, [message]),
        lambda: live_chat(default, prefix, [message]),
        lambda: traces(default, prefix, [[message]], 100),
        lambda: parse_messages(json.dumps([message])),
    ):
        with pytest.raises(ValueError, match=says) as error:
            act()
        assert type(error.value) is errors.BadInput and "\n" not in str(error.value)


def test_a_prompt_that_is_not_unicode_is_one_clear_error(files):
    text = "We sell tea."
    llama = files.llama(Prefix(files.tiny.model.tokenizer.encode(text, add_bos=True), text))
    with pytest.raises(ValueError, match="half a character") as error:
        llama.create_completion("caf\udce9")
    assert type(error.value) is errors.BadInput


# the beginning of a chat


def test_the_system_message_of_a_memory_with_examples_may_be_repeated_alone(default):
    prefix = chat_prefix(default, [SYSTEM, *EXAMPLES])
    live = live_chat(default, prefix, [HI])
    assert live_chat(default, prefix, [SYSTEM, HI]) == live_chat(default, prefix, [SYSTEM, *EXAMPLES, HI]) == live
    assert default.decode(live).startswith("user\nHi")
    two = chat_prefix(default, [SYSTEM, {"role": "system", "content": "Be brief."}])
    assert live_chat(default, two, [SYSTEM, HI]) == live_chat(default, two, [HI])


def test_a_question_that_repeats_an_example_is_not_mistaken_for_the_prefix(default):
    prefix = chat_prefix(default, EXAMPLES)
    assert default.decode(live_chat(default, prefix, EXAMPLES[:1])).startswith("user\n2+2")


@pytest.mark.parametrize(
    "messages, live, says",
    [
        (
            [SYSTEM],
            [{"role": "system", "content": HANDBOOK.replace("4", "5")}, HI],
            "another one: the memory has '… A ticket costs 4 euro.*the chat '… A ticket costs 5 euro.*leave it out",
        ),
        (
            [SYSTEM, *EXAMPLES],
            [SYSTEM, {"role": "system", "content": "Be brief."}, HI],
            "another one: the chat goes on with 'Be brief.'",
        ),
        (
            EXAMPLES,
            [SYSTEM, HI],
            "system message, 'The desk.*the memory holds none.*role 'user', '2\\+2'.*leave the system message out",
        ),
    ],
)
def test_a_chat_with_another_system_message_says_so(default, messages, live, says):
    with pytest.raises(errors.PrefixMismatch, match=says):
        live_chat(default, chat_prefix(default, messages), live)


def test_another_template_is_told_from_another_text(default):
    prefix = chat_prefix(default, [SYSTEM])
    with pytest.raises(
        errors.PrefixMismatch, match="chat template differs.*memory has '<|im_start|>system.*the chat 'SYSTEM: The desk"
    ):
        live_chat(WithTemplate(PLAIN), prefix, [HI])


def test_a_system_message_that_the_template_strips_is_the_same(default):
    tokenizer = WithTemplate(CHATML.replace("m.content", "(m.content | trim)"))
    prefix = chat_prefix(tokenizer, [SYSTEM])
    assert live_chat(tokenizer, prefix, [{"role": "system", "content": HANDBOOK.strip()}, HI]) == live_chat(tokenizer, prefix, [HI])


# templates


def test_a_template_that_moves_the_system_message_is_refused_and_the_way_out_works():
    tokenizer = WithTemplate(MISTRAL)
    with pytest.raises(errors.Unsupported, match="moves the prefix once the chat goes on.*json of chat messages"):
        chat_prefix(tokenizer, [SYSTEM])
    document = [user(HANDBOOK), OK]
    for source, messages in ((MISTRAL, document), (FIRST_USER, [SYSTEM])):
        tokenizer = WithTemplate(source)
        prefix = chat_prefix(tokenizer, messages)
        for chat in ([HI], [HI, OK, HI]):
            assert prefix.text + tokenizer.decode(live_chat(tokenizer, prefix, chat)) == tokenizer.template.render(
                [*messages, *chat]
            )


@pytest.mark.parametrize(
    "name",
    [
        *("Qwen-Qwen3-0.6B", "Qwen-Qwen2.5-7B-Instruct", "meta-llama-Llama-3.2-3B-Instruct", "openai-gpt-oss-120b"),
        *("mistralai-Mistral-Nemo-Instruct-2407", "google-gemma-2-2b-it"),
    ],
)
def test_chats_of_real_models_go_on(name):
    """Templates from llama.cpp's tests. The last two accept a document in a user's message, but not as a system message."""
    tokenizer = WithTemplate((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))
    for messages in ([SYSTEM], [user(HANDBOOK), OK]):
        try:
            prefix = chat_prefix(tokenizer, messages, date="2020-02-03T04:05:06")
        except ValueError as error:
            assert messages == [SYSTEM] and ("Mistral" in name or "gemma" in name) and "json of chat messages" in str(error)
            continue
        for chat in ([user("\n\n  Hi")], [HI, OK, HI]):
            live = tokenizer.decode(live_chat(tokenizer, prefix, chat))
            assert prefix.text + live == tokenizer.template.render([*messages, *chat], date=prefix.date)
    assert HANDBOOK.strip() in prefix.text and len(live) < 300


def test_a_model_without_system_role_names_the_way_out():
    tokenizer = WithTemplate(NO_SYSTEM)
    with pytest.raises(ValueError, match="takes no system message; give the text as a .json.*System role not supported"):
        chat_prefix(tokenizer, [SYSTEM])
    with pytest.raises(ValueError, match="ends with a user's message.*end it with an answer of the assistant"):
        chat_prefix(tokenizer, [*EXAMPLES, HI])
    prefix = chat_prefix(tokenizer, [user(HANDBOOK), OK])
    assert live_chat(tokenizer, prefix, [HI, OK, HI])
    with pytest.raises(ValueError, match="refuses a chat of the roles user, assistant, user, user: Roles must alternate"):
        live_chat(tokenizer, prefix, [HI, HI])


def test_a_memory_works_on_the_next_day(files, monkeypatch):
    class Clock(template_module.datetime):
        @classmethod
        def now(cls):
            return cls(2031, 5, 6)

    tokenizer = files.tokenizer(template=DATE)
    prefix = chat_prefix(tokenizer, [SYSTEM], date="2026-11-25T23:59:58")
    assert "25 Nov 2026" in prefix.text and prefix.date == "2026-11-25T23:59:58"
    monkeypatch.setattr(template_module, "datetime", Clock)
    assert "06 May 2031" in tokenizer.template.render([SYSTEM, HI])
    llama = files.llama(prefix, template=DATE)
    assert llama.memories[0].memory.prefix_date == prefix.date
    llama.create_chat_completion([HI], max_tokens=1)
    assert fed(llama) == "user\nHi<|im_end|>\n<|im_start|>assistant\n"
    llama = files.llama(replace(prefix, date=None), template=DATE)  # a memory of an older build
    with pytest.raises(errors.PrefixMismatch, match="the date differs.*25 Nov 2026.*06 May 2031.*build it again"):
        llama.create_chat_completion([HI], max_tokens=1)
    # a date after the prefix is not part of it, so it may change
    assert chat_prefix(WithTemplate(CHATML + "{{ strftime_now('%Y') }}"), [SYSTEM]).date is None


def test_a_template_that_writes_something_else_each_time_is_refused():
    with pytest.raises(errors.Unsupported, match="another text each time"):
        chat_prefix(WithTemplate("{{ range(9999) | random }}" + CHATML), [SYSTEM])


def test_a_broken_template_is_one_line_that_names_it(tmp_path):
    broken = write_tiny(tmp_path / "broken.gguf", DEFAULT_MODEL, template="{% for m in messages %}")
    with pytest.raises(ValueError, match="chat template of the model is broken") as error:
        chat_prefix(GgufTokenizer(broken), [SYSTEM])
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="chat template of '.*broken.gguf' is broken"):
        MemoryLlama(str(broken), verbose=False)


def test_another_chat_format_is_refused(files):
    llama = files.llama(chat_prefix(files.tiny.model.tokenizer, [SYSTEM]), chat_format="llama-2")
    with pytest.raises(errors.MemoryRefused, match="leave out chat_format"):
        llama.create_chat_completion([HI])


# tools


def test_tools_are_part_of_a_prefix(files, qwen2):
    prefix = chat_prefix(files.tokenizer(template=QWEN2), [SYSTEM], tools=[HOURS])
    assert '"hours"' in prefix.text
    llama = files.llama(prefix, template=QWEN2)
    for tools in ([HOURS], None, [], [dict(reversed(HOURS.items()))]):
        llama.create_chat_completion([HI], tools=tools, max_tokens=1)
        assert fed(llama) == "user\nHi<|im_end|>\n<|im_start|>assistant\n"
    choice = {"type": "function", "function": {"name": "hours"}}
    answer = llama.create_chat_completion([HI], tool_choice=choice, max_tokens=4)["choices"][0]
    assert answer["message"]["tool_calls"][0]["function"]["name"] == "hours"
    with pytest.raises(
        errors.PrefixMismatch, match="tools differ: the memory was built with hours, the chat has prices.*leave them out"
    ):
        llama.create_chat_completion([HI], tools=[PRICES])
    with pytest.raises(errors.PrefixMismatch, match="built with none, the chat has hours.*--tools"):
        live_chat(qwen2, chat_prefix(qwen2, [SYSTEM]), [HI], [HOURS])
    assert '"hours"' in chat_prefix(qwen2, [], tools=[HOURS]).text


def test_tools_that_the_template_leaves_out_are_refused(default):
    with pytest.raises(ValueError, match="does not write the tool 'hours'"):
        chat_prefix(default, [SYSTEM], tools=[HOURS])
    assert live_chat(default, chat_prefix(default, [SYSTEM]), [HI], [HOURS])  # live tools may be left out, as in llama_cpp


def test_build_and_update_take_a_file_of_tools(files, tmp_path):
    model = files.model(template="{{ strftime_now('%Y') }}" + QWEN2)
    for name, value in {"hours.json": [HOURS], "prices.json": [PRICES], "bad.json": [{"name": "hours"}]}.items():
        (tmp_path / name).write_text(json.dumps(value))
    (tmp_path / "handbook.md").write_text(HANDBOOK)
    out = tmp_path / "out.mem.gguf"

    def attnmem(command, *args):
        before = [command] if command == "build" else [command, out]
        options = ["-m", model, "-o", out, "-q", "repeat"]
        return CliRunner().invoke(main, [*map(str, [*before, tmp_path / "handbook.md", *options, *args])])

    refused = attnmem("build", "--system", "--tools", tmp_path / "bad.json")
    assert refused.exit_code and "bad.json" in refused.output and "tools must be a JSON list" in " ".join(refused.output.split())
    refused = attnmem("build", "--tools", tmp_path / "hours.json")
    assert refused.exit_code and "tools need a chat" in refused.output
    assert attnmem("build", "--system", "--tools", tmp_path / "hours.json", "--bytes", 10**6).exit_code == 0
    built = Memory.load(out)
    assert built.prefix_tools == [HOURS] and '"hours"' in built.prefix_text and built.prefix_date
    assert attnmem("update", "--tools", tmp_path / "prices.json").exit_code == 0
    updated = Memory.load(out)
    assert updated.prefix_tools == [PRICES] and '"prices"' in updated.prefix_text and updated.prefix_date == built.prefix_date


# the file


def test_both_readers_refuse_malformed_tools_and_dates(files, tiny):
    memory = replace(tiny.exact(), prefix_messages=[SYSTEM], prefix_tools=[HOURS], prefix_date="2026-11-25T10:00:00")
    path = tiny.save(memory, "tools")
    assert Memory.load(path).prefix == memory.prefix
    llama = MemoryLlama(str(tiny.path), memory=path, verbose=False)
    assert (llama.memories[0].memory.prefix_tools, llama.memories[0].memory.prefix_date) == ([HOURS], memory.prefix_date)
    for changed in ({"prefix_tools": [{"name": "hours"}]}, {"prefix_date": "yesterday"}):
        path = tiny.save(replace(memory, **changed), "bad")
        for read in (Memory.load, llama.load_memory):
            with pytest.raises(errors.Invalid, match=f"attnmem.prefix.{next(iter(changed)).removeprefix('prefix_')}"):
                read(path)
    path = tiny.save(replace(memory, prefix_date="20261125"), "bad")
    string = struct.pack("<IQ8s", 8, 8, b"20261125")
    array = struct.pack("<IIQI", 9, 4, 1, 20261125)  # one u32; as many bytes as the string
    assert path.read_bytes().count(b"attnmem.prefix.date" + string) == 1
    path.write_bytes(path.read_bytes().replace(string, array))
    for read in (Memory.load, llama.load_memory):
        with pytest.raises(errors.Invalid, match="attnmem.prefix.date"):
            read(path)
