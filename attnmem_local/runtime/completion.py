"""Live tokens in the shape that llama_cpp's own completion and chat code takes."""

import llama_cpp
from llama_cpp.llama import StoppingCriteriaList
from llama_cpp.llama_chat_format import ChatFormatterResponse, chat_formatter_to_chat_completion_handler


class LivePrompt(list):
    """Live tokens, and the text of the whole prompt, which `echo` puts before the answer."""

    def __init__(self, tokens: list[int], text: str):
        super().__init__(tokens)
        self.text = text

    def __add__(self, other):
        return self.text + other if isinstance(other, str) else [*self, *other]


class RenderedChat:
    """A chat whose live tokens are there already, completed by the chat handler that llama_cpp uses for a model's own template.

    The handler sees this object as its Llama.
    """

    def __init__(self, llama: llama_cpp.Llama, live: list[int]):
        self.llama = llama
        self.live = live
        self.verbose = llama.verbose

    def complete(self, request: dict):
        """request: the arguments of Llama.create_chat_completion, all of them."""
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
