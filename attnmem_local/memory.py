"""The Memory and its file: write, read, validate. The format is written down in docs/memory-format.md."""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, NamedTuple

import gguf
import numpy as np

from .chat import parse_date, parse_messages, parse_tools
from .content import read_content
from .errors import Invalid, NotAMemory, WrongVersion
from .files import check_space, replace_file
from .gguf_file import ALIGNMENT, GGUFFile, Value
from .prefix import Prefix

FORMAT_VERSION = 2
ADAPTER_TYPE = "attention_state_memory"
MAX_BLOCKS = 512  # as llama.cpp has
MAX_HEADS = 1024
MAX_KV_HEADS = 1 << 22  # in all layers of all segments
MAX_KIND_TENSORS = 12  # of one kind in one segment of one layer
MAX_SEGMENTS = 256
MAX_TOP_K = 1024
MAX_ABS = np.float32(1e15)  # larger numbers could overflow in a product

Q8_0 = gguf.GGMLQuantizationType.Q8_0
_Q8_0_BLOCK, _Q8_0_BYTES = gguf.GGML_QUANT_SIZES[Q8_0]

FIDELITY = ("kl_mean", "kl_none", "top1", "nll_full", "nll_memory", "nll_none", "tokens")  # measured all together

_BLOCK_NAME = re.compile(r"seg\.(\d{1,9})\.blk\.(\d{1,9})\.")


class Kind(NamedTuple):
    """A kind of entries; what its queries take from them is written down in docs/memory-format.md."""

    name: str  # in tensor names, and the field of LayerMemory
    has_lse: bool
    is_searched: bool  # may have lists and a graph


KINDS = (
    Kind("centroid", has_lse=True, is_searched=True),
    Kind("tangent", has_lse=False, is_searched=True),
    Kind("residual", has_lse=True, is_searched=True),
    Kind("token", has_lse=False, is_searched=True),
    Kind("anchor", has_lse=False, is_searched=False),
)


@dataclass
class Graph:
    """A HNSW graph over the entries of one kind in one segment of one layer; ids are local to their head, -1 fills up."""

    link0: np.ndarray  # [n, m0] int32, neighbours on level 0
    link: np.ndarray  # [n_upper, m] int32, neighbours above
    upper: np.ndarray  # [n + 1] int32, entry i has the rows upper[i]:upper[i + 1] of link, level 1 first
    entry: np.ndarray  # [n_head_kv] int32, where the search of a head begins


@dataclass
class Lists:
    """The entries of one kind in one segment of one layer as lists of neighbours, none of them empty."""

    key: np.ndarray  # table of d_k, as in Entries
    bias: np.ndarray  # [n_list] float32: a search takes the lists with the largest key·q + bias
    offset: np.ndarray  # [n_list + 1] int32, list i owns the entries offset[i]:offset[i + 1]
    head: np.ndarray  # [n_head_kv + 1] int32, head h owns the lists head[h]:head[h + 1]


@dataclass
class Entries:
    """The entries of one kind in one segment of one layer; the KV heads lie one after another.

    A table of keys or values is float16 or float32 [n, d], or Q8_0 as uint8 [n, d / 32 * 34]: see rows().
    """

    key: np.ndarray  # table of d_k, after RoPE, in GGUF order
    bias: np.ndarray  # [n] float32: lookup score key·q + bias, or logit scale·key·q + bias of tokens and anchors
    value: np.ndarray  # table of d_v
    offset: np.ndarray  # [n_head_kv + 1] int32, head h owns the entries offset[h]:offset[h + 1]
    lse: np.ndarray | None = None  # [n] float32, natural log, scale included; centroids and residuals
    lists: Lists | None = None  # not for anchors, nor is a graph
    graph: Graph | None = None

    def head(self, h: int) -> slice:
        return slice(int(self.offset[h]), int(self.offset[h + 1]))


@dataclass
class LayerMemory:
    """What one segment holds for one layer; a KV head may have entries of any of these kinds."""

    centroid: Entries | None = None
    tangent: Entries | None = None
    residual: Entries | None = None  # only for heads that have anchors
    token: Entries | None = None
    anchor: Entries | None = None


def reordered(entries: Entries, heads: list[np.ndarray]) -> Entries:
    """The entries of each head in another order; without lists and graph, which hold for one order."""
    order = np.concatenate([own + first for own, first in zip(heads, entries.offset)])
    parts = {part: getattr(entries, part) for part in ("key", "bias", "value", "lse")}
    return Entries(offset=entries.offset, **{part: None if array is None else array[order] for part, array in parts.items()})


def rows(table: np.ndarray) -> np.ndarray:
    """A table of keys or values as float32 [n, d]."""
    if table.dtype != np.uint8:
        return table.astype(np.float32)
    blocks = np.ascontiguousarray(table).reshape(-1, _Q8_0_BYTES)
    x = _block_scales(table).astype(np.float32) * blocks[:, 2:].view(np.int8)
    return x.reshape(len(table), table.shape[1] // _Q8_0_BYTES * _Q8_0_BLOCK)


def quantize_rows(x: np.ndarray) -> np.ndarray:
    """float32 [n, d] as Q8_0 [n, d / 32 * 34]. Raises OverflowError where a scale does not fit into float16."""
    if x.shape[1] % _Q8_0_BLOCK:
        raise ValueError(f"rows of {x.shape[1]} values do not divide into Q8_0 blocks of {_Q8_0_BLOCK}")
    table = gguf.quants.quantize(x, Q8_0)
    if not np.isfinite(_block_scales(table)).all():
        raise OverflowError(f"a value of {np.abs(x).max():.3g} does not fit into Q8_0")
    return table


def _block_scales(table: np.ndarray) -> np.ndarray:
    """The scales of a Q8_0 table: float16 [n * d / 32, 1]."""
    return np.ascontiguousarray(table.reshape(-1, _Q8_0_BYTES)[:, :2]).view(np.float16)


@dataclass
class ModelSpec:
    """What a memory and the model it runs on must agree on."""

    architecture: str  # as in GGUF: llama, qwen2, ...
    block_count: int
    head_count: int
    head_count_kv: int
    key_length: int
    value_length: int
    scale: float  # of the attention logits
    rope_freq_base: float
    rope_freq_scale: float
    fingerprint_norms: str
    fingerprint_vocab: str

    def __post_init__(self):
        """Numbers as the file keeps them, in float32: what is read back is equal."""
        for name in ("scale", "rope_freq_base", "rope_freq_scale"):
            setattr(self, name, float(np.float32(getattr(self, name))))

    def kv_bytes_per_token(self) -> int:
        """Of a F16 KV cache."""
        return self.block_count * self.head_count_kv * (self.key_length + self.value_length) * 2


@dataclass
class Memory:
    """An attention-state memory of one prefix."""

    model: ModelSpec
    prefix_tokens: list[int]
    prefix_text: str
    layers: list[dict[int, LayerMemory]]  # [segment][layer]
    segment_offset: list[int]  # [n_segment + 1], segment s stands for prefix_tokens[segment_offset[s]:segment_offset[s + 1]]
    prefix_messages: list[dict] | None = None  # chat messages that were rendered to the prefix
    prefix_tools: list[dict] | None = None  # tools that were rendered with them
    prefix_date: str | None = None  # ISO format; when, if the text of the prefix tells
    token_top_k: int | None = None  # how many of the `token` entries a query attends; needed with any
    build: dict[str, str | int | float] = field(default_factory=dict)  # how it was built
    fidelity: dict[str, float] = field(default_factory=dict)  # what was measured when it was built

    @property
    def prefix(self) -> Prefix:
        return Prefix(self.prefix_tokens, self.prefix_text, self.prefix_messages, self.segment_offset, self.prefix_tools, self.prefix_date)

    def nbytes(self) -> int:
        """Bytes of all tables."""
        return sum(array.nbytes for _, array in _tensors(self))

    def kv_bytes(self) -> int:
        """Bytes of the F16 KV cache of the prefix that the memory replaces."""
        return len(self.prefix_tokens) * self.model.kv_bytes_per_token()

    def n_entries(self, kind: str) -> np.ndarray:
        """Entries of a kind per segment, layer and KV head: int64 [n_segment, n_layer, n_head_kv]."""
        n = np.zeros((len(self.layers), self.model.block_count, self.model.head_count_kv), dtype=np.int64)
        for s, layers in enumerate(self.layers):
            for il, layer in layers.items():
                if (entries := getattr(layer, kind)) is not None:
                    n[s, il] = np.diff(entries.offset)
        return n

    def save(self, path: str | os.PathLike) -> None:
        """Write the file; the old one stays until the new one is whole. Raises OSError."""
        check_space(path, self.nbytes())
        with replace_file(path) as part:
            _write(self, part)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Memory":
        """Read and check a file. Raises a MemoryRefused that names what is wrong."""
        return _Parser(read_content(path)).memory()


def _tensors(memory: Memory):
    """Names and arrays of all tensors, in file order."""
    for s, layers in enumerate(memory.layers):
        for il, layer in sorted(layers.items()):
            for kind in KINDS:
                if (entries := getattr(layer, kind.name)) is None:
                    continue
                parts = {part: getattr(entries, part) for part in ("key", "bias", "value", "lse")}
                parts["head"] = np.zeros((2 if entries.lists is None else 3, len(entries.offset)), dtype=entries.offset.dtype)
                parts["head"][0] = entries.offset
                if (lists := entries.lists) is not None:
                    parts["head"][2] = lists.head
                    parts |= {"list_key": lists.key, "list_bias": lists.bias, "list": lists.offset}
                if (graph := entries.graph) is not None:
                    parts["head"][1, :-1] = graph.entry
                    parts |= {"link0": graph.link0, "link": graph.link, "upper": graph.upper}
                for part, array in parts.items():
                    if array is not None:
                        yield f"seg.{s}.blk.{il}.{kind.name}.{part}", array


_TYPES = {str: "str", int: "u32", float: "f32", list: "arr[i32]"}  # of values in the file

# keys of the fields of ModelSpec
_MODEL_KEYS = {
    "architecture": "general.architecture",
    "block_count": "attnmem.block_count",
    "head_count": "attnmem.attention.head_count",
    "head_count_kv": "attnmem.attention.head_count_kv",
    "key_length": "attnmem.attention.key_length",
    "value_length": "attnmem.attention.value_length",
    "scale": "attnmem.attention.scale",
    "rope_freq_base": "attnmem.rope.freq_base",
    "rope_freq_scale": "attnmem.rope.freq_scale",
    "fingerprint_norms": "attnmem.fingerprint.norms",
    "fingerprint_vocab": "attnmem.fingerprint.vocab",
}


def _write(memory: Memory, path: Path) -> None:
    writer = gguf.GGUFWriter(path, memory.model.architecture)
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
    writer.add_custom_alignment(ALIGNMENT)
    writer.add_type("adapter")
    writer.add_string("adapter.type", ADAPTER_TYPE)
    writer.add_uint32("attnmem.version", FORMAT_VERSION)
    for name, key in _MODEL_KEYS.items():
        if name != "architecture":  # written by GGUFWriter itself
            value = getattr(memory.model, name)
            add[type(value)](key, value)
    writer.add_array("attnmem.prefix.tokens", [int(t) for t in memory.prefix_tokens])
    writer.add_key_value("attnmem.prefix.text", memory.prefix_text, gguf.GGUFValueType.STRING)  # add_string leaves out an empty text
    if memory.prefix_messages is not None:
        writer.add_string("attnmem.prefix.messages", json.dumps(memory.prefix_messages, ensure_ascii=False))
    if memory.prefix_tools is not None:
        writer.add_string("attnmem.prefix.tools", json.dumps(memory.prefix_tools, ensure_ascii=False))
    if memory.prefix_date is not None:
        writer.add_string("attnmem.prefix.date", memory.prefix_date)
    writer.add_uint32("attnmem.segment.count", len(memory.layers))
    writer.add_array("attnmem.segment.offset", [int(i) for i in memory.segment_offset])
    if memory.token_top_k is not None:
        writer.add_uint32("attnmem.token.top_k", memory.token_top_k)
    is_measured = np.isfinite(list(memory.fidelity.values())).all()  # one token of live text has no perplexity
    for group, values in (("build", memory.build), ("fidelity", memory.fidelity if is_measured else {})):
        for name, value in values.items():
            add[type(value)](f"attnmem.{group}.{name}", value)
    for name, array in _tensors(memory):
        writer.add_tensor(name, np.ascontiguousarray(array), raw_dtype=Q8_0 if array.dtype == np.uint8 else None)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


class _Parser:
    """Turns the content of a file into a Memory; every field is checked before it is used. native/src has its twin."""

    def __init__(self, content: np.ndarray):
        self.file = GGUFFile(content)
        self.n_used = 0

    def value(self, key: str, kind: type):
        """The value of a key: kind is str, int, float or list (of int). Numbers are finite."""
        if (found := self.file.keys.get(key)) is None:
            raise Invalid(f"the key '{key}' is missing")
        if found.type != _TYPES[kind]:
            raise Invalid(f"the key '{key}' has type {found.type}, expected {_TYPES[kind]}")
        if kind is float and not np.isfinite(found.value):
            raise Invalid(f"the key '{key}' is not a finite number")
        return found.value.tolist() if kind is list else found.value

    def group(self, prefix: str, kinds: tuple[type, ...], but: str | None = None) -> dict:
        """All values below a prefix of keys, which are of these kinds; but: the name of one that is not."""
        of_type = {_TYPES[kind]: kind for kind in kinds}
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
            bounded = np.isfinite(_block_scales(array))  # 127 times the largest is far below MAX_ABS
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

    def memory(self) -> Memory:
        what = [self.file.keys.get(key) for key in ("general.type", "adapter.type")]
        if what != [Value("str", "adapter"), Value("str", ADAPTER_TYPE)]:
            raise NotAMemory("the GGUF file is not an attention-state memory")
        if (version := self.value("attnmem.version", int)) != FORMAT_VERSION:
            raise WrongVersion(f"the memory has format version {version}, this build reads version {FORMAT_VERSION}; build it again")
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
        memory = Memory(
            model=spec,
            prefix_tokens=tokens,
            prefix_text=self.value("attnmem.prefix.text", str),
            prefix_messages=_parsed(strings, "messages", parse_messages),
            prefix_tools=_parsed(strings, "tools", parse_tools),
            prefix_date=_parsed(strings, "date", parse_date),
            token_top_k=self.top_k(),
            segment_offset=segment_offset,
            layers=[],
            build=self.group("attnmem.build.", (str, int, float)),
            fidelity=fidelity,
        )
        self.tensors = self.file.read_tensors(len(KINDS) * MAX_KIND_TENSORS * n_segments * spec.block_count)
        memory.layers = [{} for _ in range(n_segments)]
        for s, il in sorted({tuple(map(int, m.groups())) for name in self.tensors if (m := _BLOCK_NAME.match(name))}):
            if s < n_segments and il < spec.block_count and (layer := self.layer(f"seg.{s}.blk.{il}.", spec)):
                memory.layers[s][il] = layer
        if memory.token_top_k is None and any(layer.token for layers in memory.layers for layer in layers.values()):
            raise Invalid("the key 'attnmem.token.top_k' is missing")
        if self.n_used != len(self.tensors):
            raise Invalid(
                f"the memory has {len(self.tensors)} tensors, of which only {self.n_used} are known to this build; it may need a newer one"
            )
        return memory

    def spec(self) -> ModelSpec:
        spec = ModelSpec(**{name: self.value(key, ModelSpec.__annotations__[name]) for name, key in _MODEL_KEYS.items()})
        for name, limit in (("block_count", MAX_BLOCKS), ("head_count", MAX_HEADS), ("head_count_kv", MAX_HEADS)):
            if not 1 <= (n := getattr(spec, name)) <= limit:
                raise Invalid(f"the key '{_MODEL_KEYS[name]}' is {n}, expected 1 to {limit}")
        if spec.head_count % spec.head_count_kv:
            raise Invalid(f"{spec.head_count} heads cannot share {spec.head_count_kv} KV heads")
        for name in ("scale", "rope_freq_base", "rope_freq_scale"):
            if not 0 < (x := getattr(spec, name)) <= MAX_ABS:
                raise Invalid(f"the key '{_MODEL_KEYS[name]}' is {x:g}, expected more than 0 and at most {MAX_ABS:g}")
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
    except ValueError as error:
        raise Invalid(f"the key 'attnmem.prefix.{name}': {error}") from None


def _check_offsets(name: str, offset: np.ndarray, n: int) -> None:
    if offset[0] != 0 or offset[-1] != n or (offset[1:] < offset[:-1]).any():
        raise Invalid(f"the offsets in '{name}' do not ascend from 0 to {n}")
