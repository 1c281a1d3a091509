"""Reads the content of a memory file, which is not trusted: every field is checked before it is used. native/src has its twin."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .entries import KINDS, Entries, Graph, Kind, LayerMemory, Lists
from .errors import BadInput, Invalid, NotAMemory, WrongVersion
from .format import (
    ADAPTER_TYPE,
    BLOCK_NAME,
    FIDELITY,
    FORMAT_VERSION,
    MAX_ABS,
    MAX_BLOCKS,
    MAX_HEADS,
    MAX_KIND_TENSORS,
    MAX_KV_HEADS,
    MAX_SEGMENTS,
    MAX_TOP_K,
    MODEL_KEYS,
    TYPES,
)
from .gguf_file import ALIGNMENT, GGUFFile, Value
from .messages import parse_date, parse_messages, parse_tools
from .spec import ModelSpec
from .tables import block_scales


def parse_memory(content: np.ndarray) -> dict[str, Any]:
    """The fields of the Memory that a file holds. Raises a MemoryRefused that says what is wrong.

    content: uint8 [n], see read_content.
    """
    return _Parser(content).memory()


class _Parser:
    def __init__(self, content: np.ndarray):
        self.file = GGUFFile(content)
        self.n_used = 0

    def value(self, key: str, kind: type) -> Any:
        """The value of a key: kind is str, int, float or list (of int). Numbers are finite."""
        if (found := self.file.keys.get(key)) is None:
            raise Invalid(f"the key '{key}' is missing")
        if found.type != TYPES[kind]:
            raise Invalid(f"the key '{key}' has type {found.type}, expected {TYPES[kind]}")
        value: Any = found.value
        if kind is float and not np.isfinite(value):
            raise Invalid(f"the key '{key}' is not a finite number")
        return value.tolist() if kind is list else value

    def group(self, prefix: str, kinds: tuple[type, ...], but: str | None = None) -> dict:
        """All values below a prefix of keys, which are of these kinds; but: the name of one that is not."""
        of_type = {TYPES[kind]: kind for kind in kinds}
        return {
            key[len(prefix) :]: self.value(key, of_type.get(found.type, kinds[0]))
            for key, found in self.file.keys.items()
            if key.startswith(prefix) and key != f"{prefix}{but}"
        }

    def tensor(self, name: str, types: tuple[str, ...], shape: tuple) -> np.ndarray:
        """A tensor that must be there, of one or two dimensions; one of None may be anything."""
        if (found := self.tensors.get(name)) is None:
            raise Invalid(f"the tensor '{name}' is missing")
        if found.type not in types:
            raise Invalid(f"the tensor '{name}' has type {found.type}, expected {' or '.join(types)}")
        expected = (1, 1, *shape)[-4:] if len(shape) == 2 else (1, 1, 1, *shape)
        if any(b is not None and a != b for a, b in zip(found.shape, expected)):
            raise Invalid(f"the tensor '{name}' has shape {found.shape}, expected {expected}")
        array = found.data if len(shape) == 2 else found.data[0]
        if found.type == "q8_0":
            bounded = np.isfinite(block_scales(array))  # 127 times the largest is far below MAX_ABS
        elif found.type == "i32":
            bounded = np.True_  # offsets and ids have their own checks
        else:
            bounded = (np.abs(array) <= MAX_ABS) | (name.endswith(".centroid.lse") & (array == -np.inf))
        if not bounded.all():
            raise Invalid(f"the tensor '{name}' has a value that is not finite or too large")
        self.n_used += 1
        return array

    def table(self, name: str, n: int | None, d: int) -> np.ndarray:
        """A table of keys or values that must be there."""
        return self.tensor(name, ("f16", "f32", "q8_0"), (n, d))

    def memory(self) -> dict[str, Any]:
        what = [self.file.keys.get(key) for key in ("general.type", "adapter.type")]
        if what != [Value("str", "adapter"), Value("str", ADAPTER_TYPE)]:
            raise NotAMemory("the GGUF file is not an attention-state memory")
        if (version := self.value("attnmem.version", int)) != FORMAT_VERSION:
            raise WrongVersion(
                f"the memory has format version {version}, this build reads version {FORMAT_VERSION}; build it again"
            )
        if (alignment := self.value("general.alignment", int)) != ALIGNMENT:
            raise Invalid(f"the tensors are aligned to {alignment} bytes, expected {ALIGNMENT}")
        spec = self.spec()
        tokens = self.value("attnmem.prefix.tokens", list)
        if min(tokens, default=0) < 0:
            raise Invalid(f"the prefix has token {min(tokens)}")
        n_segments = self.value("attnmem.segment.count", int)
        segment_offset = self.value("attnmem.segment.offset", list)
        if not 1 <= n_segments <= MAX_SEGMENTS or len(segment_offset) != n_segments + 1:
            raise Invalid(f"{n_segments} segments with {len(segment_offset)} offsets")
        _check_offsets("attnmem.segment.offset", np.array(segment_offset), len(tokens))
        if (n_heads := n_segments * spec.block_count * spec.head_count_kv) > MAX_KV_HEADS:
            raise Invalid(f"{n_heads} KV heads in all segments, expected at most {MAX_KV_HEADS}")
        strings = self.group("attnmem.prefix.", (str,), but="tokens")
        fidelity = self.group("attnmem.fidelity.", (float,))
        if fidelity and (missing := set(FIDELITY) - fidelity.keys()):
            raise Invalid(f"the key 'attnmem.fidelity.{min(missing)}' is missing")
        memory: dict[str, Any] = dict(
            model=spec,
            prefix_tokens=tokens,
            prefix_text=self.value("attnmem.prefix.text", str),
            prefix_messages=_parsed(strings, "messages", parse_messages),
            prefix_tools=_parsed(strings, "tools", parse_tools),
            prefix_date=_parsed(strings, "date", parse_date),
            token_top_k=self.top_k(),
            segment_offset=segment_offset,
            build=self.group("attnmem.build.", (str, int, float)),
            fidelity=fidelity,
        )
        self.tensors = self.file.read_tensors(len(KINDS) * MAX_KIND_TENSORS * n_segments * spec.block_count)
        layers: list[dict[int, LayerMemory]] = [{} for _ in range(n_segments)]
        memory["layers"] = layers
        for s, il in sorted({tuple(map(int, m.groups())) for name in self.tensors if (m := BLOCK_NAME.match(name))}):
            if s < n_segments and il < spec.block_count and (layer := self.layer(f"seg.{s}.blk.{il}.", spec)):
                layers[s][il] = layer
        if memory["token_top_k"] is None and any(layer.token for segment in layers for layer in segment.values()):
            raise Invalid("the key 'attnmem.token.top_k' is missing")
        if self.n_used != len(self.tensors):
            raise Invalid(
                f"the memory has {len(self.tensors)} tensors, of which this build knows only {self.n_used}; it may need a newer one"
            )
        return memory

    def spec(self) -> ModelSpec:
        spec = ModelSpec(**{name: self.value(key, ModelSpec.__annotations__[name]) for name, key in MODEL_KEYS.items()})
        for name, limit in (("block_count", MAX_BLOCKS), ("head_count", MAX_HEADS), ("head_count_kv", MAX_HEADS)):
            if not 1 <= (n := getattr(spec, name)) <= limit:
                raise Invalid(f"the key '{MODEL_KEYS[name]}' is {n}, expected 1 to {limit}")
        if spec.head_count % spec.head_count_kv:
            raise Invalid(f"{spec.head_count} heads cannot share {spec.head_count_kv} KV heads")
        for name in ("scale", "rope_freq_base", "rope_freq_scale"):
            if not 0 < (x := getattr(spec, name)) <= MAX_ABS:
                raise Invalid(f"the key '{MODEL_KEYS[name]}' is {x:g}, expected more than 0 and at most {MAX_ABS:g}")
        return spec

    def top_k(self) -> int | None:
        if "attnmem.token.top_k" not in self.file.keys:
            return None
        if not 1 <= (top_k := self.value("attnmem.token.top_k", int)) <= MAX_TOP_K:
            raise Invalid(f"the key 'attnmem.token.top_k' is {top_k}, expected 1 to {MAX_TOP_K}")
        return top_k

    def layer(self, prefix: str, spec: ModelSpec) -> LayerMemory | None:
        entries = {kind.name: self.entries(f"{prefix}{kind.name}.", spec, kind) for kind in KINDS}
        layer = LayerMemory(**entries)
        if layer.residual is not None:
            n_anchors = np.diff(layer.anchor.offset) if layer.anchor is not None else np.zeros(spec.head_count_kv)
            if ((np.diff(layer.residual.offset) > 0) & (n_anchors == 0)).any():
                raise Invalid(f"'{prefix}residual' has a head without anchors to correct")
        return layer if any(e is not None for e in entries.values()) else None

    def entries(self, prefix: str, spec: ModelSpec, kind: Kind) -> Entries | None:
        if prefix + "key" not in self.tensors:
            return None
        key = self.table(prefix + "key", None, spec.key_length)
        n = len(key)
        has_lists = kind.is_searched and prefix + "list" in self.tensors
        offset, entry, *lists = self.tensor(prefix + "head", ("i32",), (3 if has_lists else 2, spec.head_count_kv + 1))
        entries = Entries(
            key=key,
            bias=self.tensor(prefix + "bias", ("f32",), (n,)),
            value=self.table(prefix + "value", n, spec.value_length),
            lse=self.tensor(prefix + "lse", ("f32",), (n,)) if kind.has_lse else None,
            offset=offset,
        )
        _check_offsets(prefix + "head", offset, n)
        if kind.is_searched and prefix + "link0" in self.tensors:
            entries.graph = self.graph(prefix, entries, entry[:-1])
        if has_lists:
            entries.lists = self.lists(prefix, spec, entries, *lists)
        return entries

    def lists(self, prefix: str, spec: ModelSpec, entries: Entries, head: np.ndarray) -> Lists:
        key = self.table(prefix + "list_key", None, spec.key_length)
        n = len(key)
        bias = self.tensor(prefix + "list_bias", ("f32",), (n,))
        offset = self.tensor(prefix + "list", ("i32",), (n + 1,))
        _check_offsets(prefix + "list", offset, len(entries.key))
        _check_offsets(prefix + "head", head, n)
        if (offset[1:] == offset[:-1]).any() or (offset[head] != entries.offset).any():
            raise Invalid(f"a list in '{prefix}list' is empty or leaves its head")
        return Lists(key, bias, offset, head)

    def graph(self, prefix: str, entries: Entries, entry: np.ndarray) -> Graph:
        integer = ("i32",)
        n = len(entries.key)
        graph = Graph(
            link0=self.tensor(prefix + "link0", integer, (n, None)),
            link=self.tensor(prefix + "link", integer, (None, None)),
            upper=self.tensor(prefix + "upper", integer, (n + 1,)),
            entry=entry,
        )
        _check_offsets(prefix + "upper", graph.upper, min(max(int(graph.upper[-1]), 0), len(graph.link)))
        for h in range(len(graph.entry)):
            head = entries.head(h)
            n_h = head.stop - head.start
            levels = np.diff(graph.upper[head.start : head.stop + 1])
            rows = np.arange(graph.upper[head.start], graph.upper[head.stop])
            links = graph.link[rows]
            level_of_row = rows - np.repeat(graph.upper[head], levels)
            ok = n_h == 0 or 0 <= graph.entry[h] < n_h
            ok = ok and bool(((graph.link0[head] >= -1) & (graph.link0[head] < n_h)).all())
            ok = ok and bool(((links >= -1) & (links < n_h)).all())
            ok = ok and bool((levels[np.maximum(links, 0)] > level_of_row[:, None])[links >= 0].all())
            if not ok:
                raise Invalid(f"a link of the graph '{prefix}link0' of head {h} leaves its table")
        return graph


def _parsed(strings: dict[str, str], name: str, parse: Callable[[str], Any]) -> Any:
    """The parsed text of an optional key, None if there is none."""
    if name not in strings:
        return None
    try:
        return parse(strings[name])
    except BadInput as error:
        raise Invalid(f"the key 'attnmem.prefix.{name}': {error}") from None


def _check_offsets(name: str, offset: np.ndarray, n: int) -> None:
    if offset[0] != 0 or offset[-1] != n or (offset[1:] < offset[:-1]).any():
        raise Invalid(f"the offsets in '{name}' do not ascend from 0 to {n}")
