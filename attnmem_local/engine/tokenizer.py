"""Tokenizing texts and chats, for the builder and the runtime."""

import ctypes
import os
from abc import ABC, abstractmethod
from functools import cached_property

import llama_cpp
from llama_cpp._internals import LlamaModel

from ..memory.errors import BadInput
from ..memory.messages import check_text
from .template import ChatTemplate

_SPECIAL = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
_NEVER_MERGED = "☺"  # assumed not to be part of any longer token, so that it merges with no neighbour


class Tokenizer(ABC):
    """A vocabulary and a chat template. Special tokens in a text are parsed, as in a prompt of llama.cpp."""

    @abstractmethod
    def encode(self, text: str, add_bos: bool) -> list[int]:
        """Tokens of a text. Raises BadInput if it is not valid Unicode."""

    @abstractmethod
    def decode(self, tokens: list[int]) -> str: ...

    @abstractmethod
    def is_special(self, token: int) -> bool:
        """Whether texts are split at this token before any merging, so that text after it cannot change tokens before it."""

    @property
    @abstractmethod
    def bos(self) -> str: ...

    @property
    @abstractmethod
    def template(self) -> ChatTemplate:
        """The model's chat template. Raises BadInput if there is none, or if it is broken."""

    def encode_after(self, text: str, tokens: list[int]) -> list[int]:
        """Tokens of a text that continues given tokens, which stay as they are."""
        return self.encode(text, add_bos=False)

    def render(self, messages: list[dict], add_generation_prompt: bool) -> list[int]:
        """Tokens of a whole chat."""
        return self.encode(self.template.render(messages, add_generation_prompt=add_generation_prompt), add_bos=False)


class GgufTokenizer(Tokenizer):
    """The tokenizer and chat template of a GGUF, as applied by llama.cpp."""

    def __init__(self, model: str | os.PathLike | LlamaModel):
        """model: a GGUF file, or a model that is loaded already."""
        if not isinstance(model, LlamaModel):
            parameters = llama_cpp.llama_model_default_params()
            parameters.vocab_only = True
            model = LlamaModel(path_model=str(model), params=parameters, verbose=False)
        self._model = model

    def encode(self, text: str, add_bos: bool) -> list[int]:
        return self._model.tokenize(check_text(text, "the text").encode(), add_bos, True)

    def encode_after(self, text: str, tokens: list[int]) -> list[int]:
        is_start = not tokens or self.is_special(tokens[-1])
        if is_start or self._model.vocab_type() != llama_cpp.LLAMA_VOCAB_TYPE_SPM:
            return self.encode(text, add_bos=False)
        # with SentencePiece, llama.cpp puts a space before every text; here it would fall into the middle of one
        before = self.encode(_NEVER_MERGED, add_bos=False)
        return self.encode(_NEVER_MERGED + text, add_bos=False)[len(before) :]

    def decode(self, tokens: list[int]) -> str:
        return b"".join(map(self._piece, tokens)).decode(errors="replace")

    def _piece(self, token: int) -> bytes:
        """The bytes of a token of any length; LlamaModel.detokenize loses tokens of more than 32 bytes."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama_cpp.llama_token_to_piece(self._model.vocab, token, buffer, size, 0, True)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def is_special(self, token: int) -> bool:
        return bool(self._model.token_get_attr(token) & _SPECIAL) and bool(self._piece(token).strip())

    @property
    def bos(self) -> str:
        return self._text(self._model.token_bos())

    @cached_property
    def template(self) -> ChatTemplate:
        source = llama_cpp.llama_model_chat_template(self._model.model, None)
        if source is None:
            raise BadInput("this model has no chat template; build the memory from plain text, and prompt with text")
        return ChatTemplate(source.decode(errors="replace"), bos=self.bos, eos=self._text(self._model.token_eos()))

    def _text(self, token: int) -> str:
        """The text of a token; empty for -1, which llama.cpp gives for a special token that the model lacks."""
        return self._model.token_get_text(token) if token != -1 else ""
