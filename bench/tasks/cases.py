"""Many-shot intent classification on banking77: the cases, and the classifier.

A row reads `Query: …\\nIntent: …\\n`, with the label as the data set spells it. The rules:
    intents   N_INTENTS drawn by the seed, of those with at least N_ROWS training rows
    prefix    training rows, one per intent in random order, then again, until the next row would pass 2,048 tokens
    traces    500 other training rows, in the same rounds, each by itself
    choice    40 more training rows, to find seeds for which the full prefix is better than none
    tests     rows of the test file with these intents in random order, 200 at most
"""

import csv
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from attnmem_local.evaluate.scorer import Scorer, log_softmax
from attnmem_local.memory.prefix import Prefix

from ..common.cases import case_folder
from ..common.labels import most_probable

N_INTENTS = 10  # with 40 test rows each
N_PREFIX, N_TRACES, N_CHOICE, N_TESTS = 2048, 500, 40, 200
N_ROWS = 75  # training rows that an intent must have


@dataclass(frozen=True)
class Case:
    seed: int
    prefix: Prefix
    half: list[int]  # tokens of the first half of the demonstrations
    traces: list[list[int]]  # tokens of whole rows
    labels: list[list[int]]  # tokens of each intent up to the end of its row, so that no label begins another
    choice: list[tuple[list[int], int]]  # tokens of the live text up to `Intent:`, and the index of its label
    tests: list[tuple[list[int], int]]  # the same

    @cached_property
    def folder(self) -> Path:
        """Where results for this case are kept."""
        return case_folder(f"banking77-{self.seed}", [self.prefix.tokens, self.traces, self.labels, self.tests])

    @property
    def build_windows(self) -> list[list[int]]:
        return self.traces

    def __hash__(self) -> int:
        return hash(self.folder)


def row(text: str, intent: str) -> str:
    return f"Query: {' '.join(text.split())}\nIntent: {intent}\n"


def make_case(tokenizer, data: Path, seed: int, n_tests: int = N_TESTS) -> Case:
    """One case of banking77; data: the folder with train.csv and test.csv."""
    rng = random.Random(seed)
    train, test = (_by_intent(data / name, rng) for name in ("train.csv", "test.csv"))
    intents = sorted(rng.sample(sorted(i for i in train if len(train[i]) >= N_ROWS), N_INTENTS))
    pairs = list(_rounds({i: train[i] for i in intents}, rng))
    rows = [row(*pair) for pair in pairs]

    def tokens(text: str, bos: bool = False) -> list[int]:
        return tokenizer.encode(text, add_bos=bos)

    def question(text: str, intent: str) -> tuple[list[int], int]:
        return tokens(row(text, "")[: -len(" \n")]), intents.index(intent)

    n = next(n for n in range(1, len(rows)) if len(tokens("".join(rows[: n + 1]), True)) > N_PREFIX)
    text = "".join(rows[:n])
    tests = [(text, intent) for intent in intents for text in test[intent]]
    return Case(
        seed,
        Prefix(tokens(text, True), text),
        half=tokens("".join(rows[: n // 2]), True),
        traces=[tokens(trace) for trace in rows[n : n + N_TRACES]],
        labels=[tokens(f" {intent}\n") for intent in intents],
        choice=[question(*pair) for pair in pairs[n + N_TRACES :][:N_CHOICE]],
        tests=[question(*pair) for pair in rng.sample(tests, len(tests))[:n_tests]],
    )


def _by_intent(path: Path, rng: random.Random) -> dict[str, list[str]]:
    """Texts of each intent in random order."""
    texts: dict[str, list[str]] = {}
    with open(path, encoding="utf-8", newline="") as f:
        for line in csv.DictReader(f):
            texts.setdefault(line["category"], []).append(line["text"])
    for intent in sorted(texts):
        rng.shuffle(texts[intent])
    return texts


def _rounds(texts: dict[str, list[str]], rng: random.Random):
    """Pairs of text and intent: each intent once in random order, then again, while all have texts left."""
    for i in range(min(map(len, texts.values()))):
        for intent in rng.sample(sorted(texts), len(texts)):
            yield texts[intent][i], intent


class Classifier:
    """The most probable label after live text, in the llama.cpp runtime."""

    def __init__(self, labels: list[list[int]], model_path, **context):
        """labels: tokens of each. context: what a Scorer takes: prefix, memory, options of the runtime such as n_threads."""
        self.labels = [tuple(label) for label in labels]
        self.scorer = Scorer(model_path, n_live=256, **context)

    def __call__(self, live: list[int]) -> int:
        return most_probable(self.labels, live, self._log_probs)

    def _log_probs(self, tokens, n_past: int, last: bool) -> np.ndarray:
        llama, start = self.scorer.llama, self.scorer.n_prefix + n_past
        llama._ctx.kv_cache_seq_rm(-1, start, -1)
        llama._batch.set_batch(batch=tokens, n_past=start, logits_all=not last)
        llama._ctx.decode(llama._batch)
        shape = (1 if last else len(tokens), llama.n_vocab())
        return log_softmax(np.ctypeslib.as_array(llama._ctx.get_logits(), shape=shape))

    def close(self) -> None:
        self.scorer.close()
