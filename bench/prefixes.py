"""The prefixes that are measured: what is compressed, what a builder may see, and what is scored.

Compression sees the prefix and the build text, never the windows.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

from attnmem_local.engine.tokenizer import GgufTokenizer
from attnmem_local.evaluate.dequantize import write_f32
from attnmem_local.library import DEFAULT_MODEL
from attnmem_local.memory.prefix import Prefix
from attnmem_local.prompt.live import drop_prefix
from attnmem_local.prompt.prefix import chat_prefix

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"
CACHE = BUILD / "fidelity-cache"
F32_MODEL = BUILD / "default-f32.gguf"
README = BUILD / "tree/vendor/llama.cpp/tools/server/README.md"
DATA = Path(os.environ.get("ATTNMEM_DATA", ROOT / "../shared/data"))
BOOK = "books/pride_and_prejudice.unwrapped.txt"
SYSTEM_MESSAGE = "system_prompts/code_review_agent_role.md"


@dataclass(frozen=True)
class Size:
    prefix: int = 2048  # tokens of a text prefix
    segment: int = 384  # tokens of one segment of the text that follows
    segments: int = 22
    held_out: tuple[int, ...] = (3, 9)  # segments that are scored; all others are build text
    system: int | None = None  # tokens of the system message, None: all that the document has
    questions: int = 8
    answer: int = 96  # tokens of an answer at most
    study: int = 24  # windows of self-study


FULL, QUICK = Size(), Size(512, 128, 4, (1,), 512, 1, 24, 4)


@dataclass
class Window:
    """Live text after the prefix; the first n_given tokens (a question) are given, the others are scored."""

    tokens: list[int]
    n_given: int = 0

    @property
    def scored(self) -> slice:
        """Positions whose next token is scored."""
        return slice(max(self.n_given - 1, 0), len(self.tokens))


@dataclass(eq=False)
class Case:
    name: str
    prefix: Prefix
    windows: list[Window]
    build_text: list[list[int]] | None  # None: only what self-study writes
    frame: tuple[int, int] = (0, 0)  # first and last tokens of the prefix that are not the document but a chat template
    size: Size = field(default=FULL)

    @cached_property
    def folder(self) -> Path:
        """Where what was computed for this case is kept."""
        what = [self.prefix.tokens, [(w.tokens, w.n_given) for w in self.windows], self.build_text]
        folder = CACHE / f"{self.name}-{hashlib.blake2b(json.dumps(what).encode(), digest_size=6).hexdigest()}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def build_windows(self) -> list[list[int]]:
        """The token windows that a builder may see; self-study writes them once."""
        if self.build_text is not None:
            return self.build_text
        from attnmem_local.builder.build import STUDY_WINDOW, WINDOW
        from attnmem_local.builder.capture import prefill
        from attnmem_local.builder.sources.repeat_prefill import repeat_prefill
        from attnmem_local.builder.sources.self_study import self_study

        path = self.folder / "build-windows.json"
        if not path.exists():
            model = builder()
            kv = prefill(model, self.prefix.tokens)
            windows = repeat_prefill(self.prefix, WINDOW)
            windows += self_study(model, self.prefix, kv, self.size.study, STUDY_WINDOW, seed=0)
            path.write_text(json.dumps(windows))
        return json.loads(path.read_text())


def f32_model() -> Path:
    if not F32_MODEL.exists():
        write_f32(DEFAULT_MODEL, F32_MODEL)
    return F32_MODEL


@lru_cache(maxsize=1)
def builder():
    """The BuildModel of the default model."""
    from attnmem_local.builder.model import load_model

    return load_model(DEFAULT_MODEL)


def _text(name: str, path: Path, size: Size) -> Case:
    """A document, and its own continuation as build text and held-out text."""
    tokenizer = GgufTokenizer(DEFAULT_MODEL)
    n = size.prefix + size.segment * size.segments
    tokens = tokenizer.encode(path.read_text(encoding="utf-8")[: 16 * n], add_bos=True)[:n]
    segments = [tokens[i : i + size.segment] for i in range(size.prefix, n, size.segment)]
    return Case(
        name,
        Prefix(tokens[: size.prefix], tokenizer.decode(tokens[: size.prefix])),
        [Window(segments[i]) for i in size.held_out],
        [s for i, s in enumerate(segments) if i not in size.held_out],
        size=size,
    )


def readme(size: Size = FULL) -> Case:
    return _text("readme", README, size)


def novel(size: Size = FULL) -> Case:
    return _text("novel", DATA / BOOK, size)


QUESTIONS = (
    "To which file should the review findings be written, and may other files be created?",
    "Into which three categories are findings sorted, and what does each of them mean?",
    "Which security vulnerabilities do you look for in code?",
    "What do you check in frontend code written with React?",
    "Name the red flags when reviewing code, with the reason for each.",
    "Which fields does every review finding have?",
    "What do you do when critical context is missing from the code that I send you?",
    'Review this Python function:\n\ndef find(db, name):\n    return db.execute("SELECT * FROM users WHERE name = \'" + name + "\'")',
)


def chat(size: Size = FULL) -> Case:
    """A system message, and questions with the answers that the model gives when it has the full prefix."""
    tokenizer = GgufTokenizer(DEFAULT_MODEL)
    text = (DATA / SYSTEM_MESSAGE).read_text(encoding="utf-8")
    if size.system is not None:
        text = tokenizer.decode(tokenizer.encode(text, add_bos=False)[: size.system])
    prefix = chat_prefix(tokenizer, [{"role": "system", "content": text}])
    other = chat_prefix(tokenizer, [{"role": "system", "content": "?" + text[::-1]}]).tokens
    questions = [
        drop_prefix(tokenizer.render([*prefix.messages, {"role": "user", "content": question}], True), prefix.tokens)
        for question in QUESTIONS[: size.questions]
    ]
    return Case(
        "chat",
        prefix,
        [Window(q + a, len(q)) for q, a in zip(questions, _answers(prefix, questions, size.answer))],
        None,
        (_n_common(prefix.tokens, other), _n_common(prefix.tokens[::-1], other[::-1])),
        size,
    )


def _answers(prefix: Prefix, questions: list[list[int]], n: int) -> list[list[int]]:
    """Greedy answers of the full-prefix model up to the end of its turn, kept on disk."""
    from attnmem_local.evaluate.scorer import Scorer

    key = hashlib.blake2b(json.dumps([prefix.tokens, questions, n]).encode(), digest_size=6).hexdigest()
    path = CACHE / f"answers-{key}.json"
    if not path.exists():
        scorer = Scorer(f32_model(), prefix.tokens, n_live=max(map(len, questions)) + n)
        answers = [scorer.greedy(question, n) for question in questions]
        end = scorer.llama.token_eos()
        scorer.close()
        answers = [a[: a.index(end) + 1] if end in a else a for a in answers]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(answers))
    return json.loads(path.read_text())


def _n_common(a: list[int], b: list[int]) -> int:
    return next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)


CASES = {"readme": readme, "novel": novel, "chat": chat}
