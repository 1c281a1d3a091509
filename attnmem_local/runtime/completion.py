"""Adapters that pass live tokens through llama_cpp's completion and chat code, which expects texts."""

import llama_cpp
from llama_cpp.llama import StoppingCriteriaList
from llama_cpp.llama_chat_format import ChatFormatterResponse, chat_formatter_to_chat_completion_handler


class LivePrompt(list):
    """Live tokens that also carry the text of the whole prompt, which `echo` puts before the answer."""

    def __init__(self, tokens: list[int], text: str):
        super().__init__(tokens)
        self.text = text

    def __add__(self, other):
        return self.text + other if isinstance(other, str) else [*self, *other]


class RenderedChat:
    """A chat that is rendered and tokenized already, completed by llama_cpp's chat handler for the model's own template.

    This object poses as the handler's Llama, so that the live tokens take the place of what the handler would tokenize.
    """

    def __init__(self, llama: llama_cpp.Llama, live: list[int]):
        self.llama = llama
        self.live = live
        self.verbose = llama.verbose

    def complete(self, request: dict):
        """request: all arguments of Llama.create_chat_completion, by name."""
        return chat_formatter_to_chat_completion_handler(self._format)(llama=self, **request)  # type: ignore[arg-type]

    def tokenize(self, text: bytes, add_bos: bool, special: bool) -> list[int]:
        return self.live

    def create_completion(self, prompt: list[int], **options):
        return llama_cpp.Llama.create_completion(self.llama, prompt, **options)

    def _format(self, **_) -> ChatFormatterResponse:
        eos = self.llama.token_eos()

        def ends(tokens, logits) -> bool:
            return tokens[-1] == eos

        stop = [self.llama._model.token_get_text(eos)] if eos != -1 else []
        return ChatFormatterResponse(prompt="", stop=stop, stopping_criteria=StoppingCriteriaList([ends]), added_special=True)
