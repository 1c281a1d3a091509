"""Tokens of text and of chats, for the builder and for whoever scores text."""

import os
from typing import Protocol

import llama_cpp
from llama_cpp._internals import LlamaModel
from llama_cpp.llama_chat_format import Jinja2ChatFormatter


class Tokenizer(Protocol):
    def encode(self, text: str, add_bos: bool) -> list[int]: ...
    def decode(self, tokens: list[int]) -> str: ...
    def render(self, messages: list[dict], add_generation_prompt: bool) -> list[int]: ...


class GgufTokenizer:
    """The tokenizer and chat template of a GGUF, as llama.cpp itself applies them."""

    def __init__(self, path: str | os.PathLike):
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        self._model = LlamaModel(path_model=str(path), params=parameters, verbose=False)
        self._template = self._model.metadata().get("tokenizer.chat_template")

    def encode(self, text: str, add_bos: bool) -> list[int]:
        return self._model.tokenize(text.encode(), add_bos, False)

    def decode(self, tokens: list[int]) -> str:
        return self._model.detokenize(tokens, special=True).decode(errors="replace")

    def render(self, messages: list[dict], add_generation_prompt: bool) -> list[int]:
        if self._template is None:
            raise ValueError("this model has no chat template; build the memory from text")
        formatter = Jinja2ChatFormatter(
            self._template,
            bos_token=self._text(self._model.token_bos()),
            eos_token=self._text(self._model.token_eos()),
            add_generation_prompt=add_generation_prompt,
        )
        return self._model.tokenize(formatter(messages=messages).prompt.encode(), False, True)

    def _text(self, token: int) -> str:
        return self._model.token_get_text(token) if token != -1 else ""
