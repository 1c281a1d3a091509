"""attnmem run"""

import sys
from pathlib import Path

import click

from ..prompt.texts import decode
from .answer import say_if_cut, write
from .common import (
    ctx_option,
    memories_and_model,
    memories_option,
    memory_type,
    model_option,
    positive,
    temp_option,
    threads_option,
)


@click.command()
@click.argument("words", nargs=-1, metavar="[MEMORY] PROMPT")
@model_option(None)
@memories_option
@click.option("-n", "--predict", type=positive, default=256, show_default=True, help="Maximum number of tokens to generate.")
@temp_option(0.0)
@threads_option
@ctx_option
@click.pass_context
def run(
    context: click.Context,
    words: tuple[str, ...],
    model: Path | None,
    more: tuple[Path, ...],
    predict: int,
    temp: float,
    threads: int | None,
    ctx: int,
) -> None:
    """Answer a prompt with a memory.

    With the memory of a chat, PROMPT is the user's message; with the memory of a text, the answer is how the text and PROMPT
    go on. A PROMPT of "-" is read from standard input. If the answer is cut short, a note on standard error says why.

    Memories may also be given by -M alone: attnmem run -M handbook -M prices "…"
    """
    memory, prompt = _memory_and_prompt(context, words, bool(more))
    if prompt == "-":
        prompt = decode(sys.stdin.buffer.read(), "standard input")
    else:
        prompt = decode(prompt.encode("utf-8", "surrogateescape"), "PROMPT")
    memories, model = memories_and_model(memory, more, model)

    from ..conversation import answer, open_llama

    llama = open_llama(model, memories, ctx, threads)
    given = answer(llama, prompt, predict, temp)
    write(given)
    click.echo()
    say_if_cut(given, llama)


def _memory_and_prompt(context: click.Context, words: tuple[str, ...], has_memories: bool) -> tuple[Path | None, str]:
    """What the words stand for. Raises UsageError."""
    if len(words) == 2:
        return memory_type.convert(words[0], click.Argument(["memory"]), context), words[1]
    if len(words) == 1 and has_memories:
        return None, words[0]
    if len(words) == 1:
        raise click.UsageError(
            f"a memory and a prompt are needed, only '{words[0]}' is given: {context.command_path} MEMORY PROMPT"
        )
    if not words:
        raise click.UsageError("no prompt is given")
    raise click.UsageError(f"a memory and a prompt are needed, {len(words)} words are given; put the prompt in quotes")
