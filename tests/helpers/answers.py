"""Opening a tiny model and getting an answer from it."""

from attnmem_local.runtime.llama import MemoryLlama

N_NEW = 12  # number of tokens in an answer


def open_llama(tiny, memory=None, **options):
    return MemoryLlama(str(tiny.path), memory=memory, verbose=False, **options)


def ask(llama, tokens, **options) -> str:
    """The greedy answer to a prompt of tokens."""
    return llama.create_completion(tokens, max_tokens=N_NEW, temperature=0, **options)["choices"][0]["text"]
