"""Many-shot intent classification on banking77: the cases, and the classifier.

A row reads `Query: …\\nIntent: …\\n`, with the label as the data set spells it. The rules:
    intents   those whose training rows are told best by the words of the 77 labels alone (told_by_words). Chosen after
              random ones, on which a model of 135M with the full prefix does little better than without. With these
              the full prefix is not clearly better than none either: the rule is still to be found.
    prefix    training rows, one per intent in random order, then again, until the next row would pass 2,048 tokens
    traces    500 other training rows, in the same rounds, joined to windows of at most 384 tokens
    tests     rows of the test file with these intents, drawn at random by the seed
"""

import csv
import hashlib
import json
import math
import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from attnmem_local.evaluate import Scorer, log_softmax
from attnmem_local.prefix import Prefix
from labels import most_probable

CACHE = Path(__file__).parents[1] / "build/tasks-cache"
N_PREFIX, N_TRACES, N_TESTS, WINDOW = 2048, 500, 400, 384
N_ROWS = 75  # training rows that an intent must have


@dataclass(frozen=True)
class Case:
    seed: int
    prefix: Prefix
    half: list[int]  # tokens of the first half of the demonstrations
    traces: list[list[int]]  # token windows of joined rows
    labels: list[list[int]]  # tokens of each intent, with the line end that closes a row: no label begins another
    tests: list[tuple[list[int], int]]  # tokens of the live text up to `Intent:`, and the index of its label

    @cached_property
    def folder(self) -> Path:
        """Where what was computed for this case is kept."""
        what = [self.prefix.tokens, self.traces, self.labels, self.tests]
        folder = CACHE / f"{self.seed}-{hashlib.blake2b(json.dumps(what).encode(), digest_size=6).hexdigest()}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def build_windows(self) -> list[list[int]]:
        return self.traces

    def __hash__(self) -> int:
        return hash(self.folder)


def row(text: str, intent: str) -> str:
    return f"Query: {' '.join(text.split())}\nIntent: {intent}\n"


def make_case(tokenizer, data: Path, seed: int, n_intents: int, n_tests: int = N_TESTS) -> Case:
    """One case of banking77; data: the folder with train.csv and test.csv."""
    rng = random.Random(seed)
    train, test = (_by_intent(data / name, rng) for name in ("train.csv", "test.csv"))
    told = told_by_words(train)
    intents = sorted((i for i in sorted(train) if len(train[i]) >= N_ROWS), key=told.get, reverse=True)[:n_intents]
    rows = [row(*pair) for pair in _rounds({i: train[i] for i in intents}, rng)]

    def tokens(text: str, bos: bool = False) -> list[int]:
        return tokenizer.encode(text, add_bos=bos)

    n = next(n for n in range(1, len(rows)) if len(tokens("".join(rows[: n + 1]), True)) > N_PREFIX)
    text = "".join(rows[:n])
    if len(rows) < n + N_TRACES:
        raise ValueError(f"{n_intents} intents have too few training rows")
    windows = [""]
    for trace in rows[n : n + N_TRACES]:
        if len(tokens(windows[-1] + trace)) > WINDOW:
            windows.append("")
        windows[-1] += trace
    tests = [(text, i) for i, intent in enumerate(intents) for text in test[intent]]
    live = [(tokens(row(text, "")[: -len(" \n")]), i) for text, i in rng.sample(tests, min(n_tests, len(tests)))]
    labels = [tokens(f" {intent}\n") for intent in intents]
    half = tokens("".join(rows[: n // 2]), True)
    return Case(seed, Prefix(tokens(text, True), text), half, [tokens(w) for w in windows], labels, live)


def told_by_words(train: dict[str, list[str]]) -> dict[str, float]:
    """Share of each intent's rows whose label has, of all labels, the most and rarest words in common with the row."""

    def words(text: str) -> set[str]:
        return {word[:5] for word in re.findall(r"[a-z]{3,}", text.lower())}  # a word's first letters stand for its stem

    labels = {intent: words(intent) for intent in train}
    count = Counter(word for found in labels.values() for word in found)

    def best(text: str) -> str | None:
        found = words(text)
        score = {i: sum(math.log(len(labels) / count[w]) for w in sorted(labels[i] & found)) for i in labels}
        return max(sorted(score), key=score.get) if any(score.values()) else None

    return {intent: sum(best(text) == intent for text in texts) / len(texts) for intent, texts in train.items()}


def _by_intent(path: Path, rng: random.Random) -> dict[str, list[str]]:
    """Texts of each intent in random order."""
    texts: dict[str, list[str]] = {}
    with open(path, encoding="utf-8", newline="") as f:
        for found in csv.DictReader(f):
            texts.setdefault(found["category"], []).append(found["text"])
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
        """context: what a Scorer takes: prefix, memory and options of the runtime, such as n_threads."""
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
