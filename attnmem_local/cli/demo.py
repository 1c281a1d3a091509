"""attnmem demo"""

import os
import statistics
import time

import click

from ..library import checkout, find_model
from .terminal import printable

HANDBOOK = "build/tree/vendor/llama.cpp/tools/server/README.md"  # in the checkout
HANDBOOK_CHARACTERS = 6000
OUT = "build/demo.mem.gguf"  # in the checkout
QUESTIONS = (
    "What is this handbook about?",  # its answers are shown; the KL is over all
    "Which option sets the number of threads to use?",
    "What does the option --mlock do?",
    "How do I set the size of the prompt context?",
)
ANSWER_TOKENS = 48


@click.command()
def demo() -> None:
    """Build a memory, use it, show what it saves.

    The prefix is a real handbook: the README of llama.cpp's server.
    """
    root, model = checkout("the demo", HANDBOOK), find_model("default")
    handbook, out = root / HANDBOOK, root / OUT

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..builder.build import build_memory
    from ..builder.progress import Progress
    from ..engine.tokenizer import GgufTokenizer
    from ..evaluate.scorer import Scorer, kl
    from ..prompt.live import live_chat

    console = Console()
    text = handbook.read_text(encoding="utf-8")[:HANDBOOK_CHARACTERS]
    messages = [{"role": "system", "content": "Answer questions about this handbook.\n\n" + text}]
    progress = Progress()
    start = time.monotonic()
    memory = build_memory(model, messages, out, progress=progress)
    console.print(f"built {OUT} from the README of llama.cpp's server in {time.monotonic() - start:.0f} s\n")

    tokenizer = GgufTokenizer(model)
    asked = {question: live_chat(tokenizer, memory.prefix, [{"role": "user", "content": question}]) for question in QUESTIONS}
    runs: dict[str, dict] = {"full prefix": {"prefix": memory.prefix_tokens}, "memory": {"memory": out}, "no prefix": {}}
    first_token: dict[str, float] = {}  # from nothing loaded: model, prefix or memory, question
    scorers = {}
    for name, options in runs.items():
        start = time.monotonic()
        scorers[name] = Scorer(model, n_threads=os.cpu_count(), **options)
        next(scorers[name].decode(asked[QUESTIONS[0]], 1))
        first_token[name] = time.monotonic() - start

    per_token: dict[str, list[float]] = {name: [] for name in runs}
    divergence: dict[str, list[float]] = {name: [] for name in runs}
    for question, live in asked.items():
        answers = {}
        for name, scorer in scorers.items():
            decoded = list(scorer.decode(live, ANSWER_TOKENS))
            per_token[name] += [seconds for _, seconds in decoded[1:]]
            answers[name] = [token for token, _ in decoded]
        expected = scorers["full prefix"].log_probs(live + answers["full prefix"])[len(live) - 1 :]
        for name, scorer in scorers.items():
            divergence[name] += list(kl(expected, scorer.log_probs(live + answers["full prefix"])[len(live) - 1 :]))
        if question == QUESTIONS[0]:
            console.print(f"[bold]{question}[/bold]")
            for name, tokens in answers.items():
                console.print(Text(f"{name}: ", style="dim").append(printable(_text(scorers[name], tokens)), style="default"))

    table = Table("", *runs)
    table.add_row("prefix tokens in the context", str(len(memory.prefix_tokens)), "0", "0")
    table.add_row(
        "bytes for the prefix", f"{memory.kv_bytes() / 1e6:.1f} MB of KV", f"{memory.nbytes() / 1e6:.1f} MB of memory", "0"
    )
    table.add_row("time to first token", *(f"{first_token[name]:.2f} s" for name in runs))
    table.add_row("ms per token", *(f"{1000 * statistics.median(per_token[name]):.1f}" for name in runs))
    table.add_row("KL to the full prefix", *(f"{statistics.fmean(divergence[name]):.3f}" for name in runs))
    console.print()
    console.print(table)


def _text(scorer, tokens: list[int]) -> str:
    end = next((i for i, t in enumerate(tokens) if t == scorer.llama.token_eos()), len(tokens))
    return scorer.llama.detokenize(tokens[:end]).decode(errors="replace").strip()
