"""The prefixes that are measured: what is compressed, what a builder may see, and what is scored.

Whatever compresses a prefix sees it and the build text, never the windows.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from attnmem_local.engine.tokenizer import GgufTokenizer
from attnmem_local.evaluate.dequantize import write_f32
from attnmem_local.library import DEFAULT_MODEL
from attnmem_local.memory.prefix import Prefix
from attnmem_local.prompt.live import live_chat
from attnmem_local.prompt.prefix import chat_prefix

from .paths import BOOK, BUILD, SERVER_README, SYSTEM_MESSAGE

F32_MODEL = BUILD / "default-f32.gguf"


@dataclass(frozen=True)
class Size:
    prefix: int = 2048  # tokens of a text prefix
    segment: int = 384  # tokens of one passage of the text that follows
    segments: int = 22
    held_out: tuple[int, ...] = (3, 9)  # passages that are scored; all others are build text
    stretch: int = 500  # tokens of one of the stretches of a continuation
    stretches: int = 4
    system: int | None = None  # tokens of the system message; None: the whole document
    questions: int = 8
    answer: int = 96  # tokens of an answer at most
    study: int = 24  # windows of self-study


FULL = Size()
QUICK = Size(
    prefix=128, segment=64, segments=4, held_out=(1,), stretch=32, stretches=2, system=256, questions=1, answer=16, study=4
)


@dataclass
class Window:
    """Live text after the prefix; the first n_given tokens (a question, say) are given, the others are scored."""

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
    build_text: list[list[int]] | None  # None: what the model itself writes, as in a build without traces
    size: Size
    frame: tuple[int, int] = (0, 0)  # first and last tokens of the prefix that belong to a chat template, not to the document

    @cached_property
    def folder(self) -> Path:
        """Where results for this case are kept; its name depends on all tokens."""
        inputs = [self.prefix.tokens, [(w.tokens, w.n_given) for w in self.windows], self.build_text]
        return case_folder(self.name, inputs)

    @cached_property
    def build_windows(self) -> list[list[int]]:
        """Token windows that a builder may see; self-study writes them once."""
        if self.build_text is not None:
            return self.build_text
        path = self.folder / "build-windows.json"
        if not path.exists():
            from .builder import study_windows

            path.write_text(json.dumps(study_windows(self.prefix, self.size.study)))
        return json.loads(path.read_text())


def case_folder(name: str, inputs) -> Path:
    digest = hashlib.blake2b(json.dumps(inputs).encode(), digest_size=6).hexdigest()
    folder = BUILD / f"{name}-{digest}"
    folder.mkdir(exist_ok=True)
    return folder


def f32_model() -> Path:
    """The default model without quantization: the runtime's noise on it is a KL of 1e-6."""
    if not F32_MODEL.exists():
        write_f32(DEFAULT_MODEL, F32_MODEL)
    return F32_MODEL


def document(path: Path, n: int) -> tuple[GgufTokenizer, list[int]]:
    """The first n tokens of a text file, and the tokenizer of the default model."""
    tokenizer = GgufTokenizer(DEFAULT_MODEL)
    return tokenizer, tokenizer.encode(path.read_text(encoding="utf-8")[: 16 * n], add_bos=True)[:n]


def _text(name: str, path: Path, size: Size) -> Case:
    """A document; later passages of it are build text, two of them are held out."""
    n = size.prefix + size.segment * size.segments
    tokenizer, tokens = document(path, n)
    passages = [tokens[i : i + size.segment] for i in range(size.prefix, n, size.segment)]
    return Case(
        name,
        Prefix(tokens[: size.prefix], tokenizer.decode(tokens[: size.prefix])),
        [Window(passages[i]) for i in size.held_out],
        [passage for i, passage in enumerate(passages) if i not in size.held_out],
        size,
    )


def readme(size: Size) -> Case:
    """The README of llama.cpp's server."""
    return _text("readme", SERVER_README, size)


def novel(size: Size) -> Case:
    """Pride and Prejudice."""
    return _text("novel", BOOK, size)


def continuation(size: Size) -> Case:
    """The README without traces, scored on the text that follows it at once, in stretches at a growing distance."""
    n = size.prefix + size.stretch * size.stretches
    tokenizer, tokens = document(SERVER_README, n)
    prefix, live = tokens[: size.prefix], tokens[size.prefix :]
    windows = [Window(live[: start + size.stretch], start) for start in range(0, len(live), size.stretch)]
    return Case("continuation", Prefix(prefix, tokenizer.decode(prefix)), windows, None, size)


QUESTIONS = (
    "To which file should the review findings be written, and may other files be created?",
    "Into which three categories are findings sorted, and what does each of them mean?",
    "Which security vulnerabilities do you look for in code?",
    "What do you check in frontend code written with React?",
    "Name the red flags when reviewing code, with the reason for each.",
    "Which fields does every review finding have?",
    "What do you do when critical context is missing from the code that I send you?",
    "Review this Python function:\n\ndef find(db, name):\n"
    '    return db.execute("SELECT * FROM users WHERE name = \'" + name + "\'")',
)


def chat(size: Size) -> Case:
    """A system message, and questions with the answers that the model gives when it has the full prefix."""
    tokenizer = GgufTokenizer(DEFAULT_MODEL)
    text = SYSTEM_MESSAGE.read_text(encoding="utf-8")
    if size.system is not None:
        text = tokenizer.decode(tokenizer.encode(text, add_bos=False)[: size.system])
    prefix = chat_prefix(tokenizer, [{"role": "system", "content": text}])
    other = chat_prefix(tokenizer, [{"role": "system", "content": "?" + text[::-1]}]).tokens
    questions = [live_chat(tokenizer, prefix, [{"role": "user", "content": question}]) for question in QUESTIONS[: size.questions]]
    windows = [Window(q + a, len(q)) for q, a in zip(questions, _answers(prefix, questions, size.answer))]
    return Case("chat", prefix, windows, None, size, (_n_common(prefix.tokens, other), _n_common(prefix.tokens[::-1], other[::-1])))


def _answers(prefix: Prefix, questions: list[list[int]], n: int) -> list[list[int]]:
    """Greedy answers of the full-prefix model up to the end of its turn, kept on disk."""
    from attnmem_local.evaluate.scorer import Scorer

    path = case_folder("answers", [prefix.tokens, questions, n]) / "answers.json"
    if not path.exists():
        scorer = Scorer(f32_model(), prefix.tokens, n_live=max(map(len, questions)) + n)
        answers = [scorer.greedy(question, n) for question in questions]
        end = scorer.llama.token_eos()
        scorer.close()
        path.write_text(json.dumps([a[: a.index(end) + 1] if end in a else a for a in answers]))
    return json.loads(path.read_text())


def _n_common(a: Sequence[int], b: Sequence[int]) -> int:
    return next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)


CASES = {"readme": readme, "novel": novel, "chat": chat, "continuation": continuation}
