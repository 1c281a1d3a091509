"""For which seeds of classify.py the full prefix is better than none: what tasks.py is then measured on.

    .venv/bin/python bench/intents.py [--candidates 9] [--data FOLDER]

Ten random intents of banking77, and so a case, for every seed; its 40 rows of the choice, training rows that are in
neither the prefix nor the traces, are classified with no prefix and with the full one, by the quantized default model in
llama.cpp. Test rows are not looked at. Prints the seeds, those with the largest gain first.
"""

from pathlib import Path

import click
from classify import Classifier, make_case
from prefixes import DATA

from attnmem_local.engine.tokenizer import GgufTokenizer
from attnmem_local.library import DEFAULT_MODEL


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=DATA, help="Folder with banking77; default: ATTNMEM_DATA.")
@click.option("--candidates", default=9, show_default=True, help="Seeds to try.")
@click.option("--threads", default=2, show_default=True)
def main(data: Path, candidates: int, threads: int) -> None:
    tokenizer = GgufTokenizer(DEFAULT_MODEL)
    found = []
    for seed in range(candidates):
        case = make_case(tokenizer, data / "banking77", seed)
        none, full = (accuracy(case, prefix, threads) for prefix in ([], case.prefix.tokens))
        click.echo(f"seed {seed}: none {none:.3f}, full {full:.3f}")
        found.append((full - none, seed))
    click.echo(
        "most gained: " + ", ".join(f"seed {seed} ({gain:+.3f})" for gain, seed in sorted(found, key=lambda x: (-x[0], x[1])))
    )


def accuracy(case, prefix: list[int], threads: int) -> float:
    classifier = Classifier(case.labels, DEFAULT_MODEL, prefix=prefix, n_threads=threads, n_threads_batch=threads)
    right = sum(classifier(live) == label for live, label in case.choice)
    classifier.close()
    return right / len(case.choice)


if __name__ == "__main__":
    main()
