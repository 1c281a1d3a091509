"""Random mutations of a memory file: most change its parts, some its bytes.

A mutation changes the container and returns a description. The order of draws from rng is part of what a file number means.
"""

import copy
import struct

import numpy as np

from .container import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STRING,
    TENSOR_F16,
    TENSOR_F32,
    TENSOR_I32,
    TENSOR_Q8_0,
    U8,
    U16,
    U32,
    U64,
    Container,
    Tensor,
    Value,
    array,
    scalar,
    string,
    text,
)  # fmt: skip

_DTYPES = {TENSOR_F32: np.float32, TENSOR_F16: np.float16, TENSOR_I32: np.int32}
_COUNTS = (0, 1, 2, 3, 255, 1 << 16, 1 << 20, 1 << 30, 1 << 31, 1 << 32, 1 << 61, 1 << 62, (1 << 64) - 1)
_BAD_TEXT = (
    b"\0", b"\0y", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\x1b[2J", b"[red]", b"[/INST]",
    "\u2028é😀".encode(), b"\n", b'"', b"%s%n",
)  # fmt: skip
_JSON = (
    b"", b"[]", b"{}", b"null", b"5", b"[1]", b"[" * 5000,
    b'[{"role": "system"}]', b'[{"role": "system", "content": 5}]', b'[{"role": 1, "content": "x"}]',
    b'[{"role": "system", "content": "x"}]', b'[{"role": "system", "content": "\\ud800"}]', b'[{"role": "user", "content": null}]',
    b"NaN", b'"x"',
)  # fmt: skip
_KEYS = (
    "general.type", "general.name", "general.alignment", "adapter.type", "attnmem.version", "attnmem.unknown",
    "attnmem.token.top_k",
    "attnmem.prefix.text", "attnmem.prefix.messages", "attnmem.prefix.tools", "attnmem.prefix.date", "attnmem.prefix.unknown",
    "attnmem.build.x", "attnmem.build.", "attnmem.build.[red]", "attnmem.fidelity.kl_mean", "attnmem.fidelity.kl_none",
    "attnmem.fidelity.unknown", "split.count", "tokenizer.ggml.tokens",
)  # fmt: skip
_PARTS = ("key", "bias", "value", "lse", "head", "link0", "link", "upper", "list_key", "list_bias", "list")
_KINDS = ("centroid", "tangent", "residual", "token", "anchor")


def mutated(content: bytes, parsed: Container, rng: np.random.Generator) -> tuple[bytes, list[str]]:
    """A mutated copy of a file, and a description of each mutation."""
    file = copy.deepcopy(parsed)
    done = []
    for _ in range(rng.choice([0, 1, 2, 3], p=[0.1, 0.6, 0.2, 0.1])):
        mutation = _pick(rng, _MUTATIONS)
        try:
            done.append(f"{mutation.__name__}: {mutation(rng, file)}")
        except (ValueError, IndexError, OverflowError, struct.error) as error:  # caused by an earlier mutation
            done.append(f"{mutation.__name__}: {error}")
    data = file.bytes() if done else content
    if not done or rng.random() < 0.05:
        data, description = _bytes(rng, data)
        done.append(description)
    return data, done


def _pick(rng, options):
    return options[rng.integers(len(options))]


def _number(rng) -> float:
    return _pick(
        rng, (np.nan, np.inf, -np.inf, 0.0, -0.0, -1.0, 1e-45, 1e-30, 0.5, 7.0, 1e4, 9e14, 1.1e15, -1e20, 3e38, -3e38, 1e300)
    )


def _integer(rng, near: int = 0) -> int:
    fixed = (0, 1, -1, -2, 2, 64, 1024, 1025, 1 << 15, (1 << 31) - 1, 1 << 31, -(1 << 31), (1 << 32) - 1)
    return _pick(rng, (near - 1, near + 1, near * 2, *fixed, int(rng.integers(1 << 12))))


def _bad_text(rng, data: bytes) -> bytes:
    i = _pick(rng, (0, len(data), int(rng.integers(len(data) + 1))))
    return _pick(
        rng, (data[:i] + _pick(rng, _BAD_TEXT) + data[i:], data[:i], b"", data.upper(), b"x" * 10_000, _pick(rng, _BAD_TEXT))
    )


def _value(rng) -> Value:
    """A random value of any type, or of an unknown one."""
    kind = rng.integers(14)
    if kind == STRING:
        return string(_pick(rng, (b"x", *_BAD_TEXT, *_JSON)))
    if kind == ARRAY:
        item, n = int(rng.integers(14)), int(rng.integers(5))
        items = b"".join(text(b"x\0" * i) for i in range(n)) if item == STRING else bytes(8 * n)
        return array(item, items, _pick(rng, (n, n, _pick(rng, _COUNTS))))
    if kind == 13:
        return Value(_pick(rng, (13, 99, 1 << 31)), bytes(8))
    if kind in (F32, F64):
        with np.errstate(over="ignore"):
            return scalar(kind, float(np.float32(_number(rng))))
    low, high = {
        U8: (0, 8), BOOL: (0, 8), I8: (7, 7), U16: (0, 16), I16: (15, 15), U32: (0, 32), I32: (31, 31), U64: (0, 63), I64: (63, 62),
    }[kind]  # the value is at least -(2 ** low), or 0 if low is 0, and less than 2 ** high  # fmt: skip
    return scalar(kind, int(np.clip(_integer(rng), -(1 << low) if low else 0, (1 << high) - 1)))


# mutations of keys


def _key_index(rng, file: Container) -> int:
    return int(rng.integers(len(file.keys))) if file.keys else file.keys.append((b"x", _value(rng))) or 0


def key_missing(rng, file):
    return file.keys.pop(_key_index(rng, file))[0]


def key_twice(rng, file):
    key, value = file.keys[_key_index(rng, file)]
    file.keys.insert(_key_index(rng, file), (key, _pick(rng, (value, _value(rng)))))
    return key


def key_name(rng, file):
    i = _key_index(rng, file)
    key, value = file.keys[i]
    file.keys[i] = _pick(rng, (_bad_text(rng, key), key + b"\0", _pick(rng, _KEYS).encode())), value
    return key, file.keys[i][0][:40]


def key_type(rng, file):
    i = _key_index(rng, file)
    file.keys[i] = file.keys[i][0], _value(rng)
    return file.keys[i]


def key_value(rng, file):
    """Change a value, but in most cases keep its type."""
    i = _key_index(rng, file)
    key, value = file.keys[i]
    old = value.payload
    if value.type == STRING:
        is_json = key.endswith((b"messages", b"tools")) and rng.random() < 0.5
        data = _pick(rng, _JSON) if is_json else _bad_text(rng, old[8:])
        value = string(data) if rng.random() < 0.8 else Value(STRING, text(data, _pick(rng, (len(data) + 1, *_COUNTS))))
    elif value.type == U32:
        value = scalar(U32, _integer(rng, struct.unpack("<I", old)[0]) % (1 << 32))
    elif value.type == F32:
        with np.errstate(over="ignore"):
            factor = _pick(rng, (_number(rng), -1, 1 + 1e-3, 1 + 1e-6))
            value = scalar(F32, np.float32(factor * _pick(rng, (1, struct.unpack("<f", old)[0]))))
    elif value.type == ARRAY and len(old) > 12:
        item, n = struct.unpack_from("<IQ", old)
        items = bytearray(old[12:])
        change = rng.integers(4)
        if change == 0:
            n = _pick(rng, (n - 1, n + 1, *_COUNTS))
        elif change == 1:
            item = int(rng.integers(14))
        elif change == 2:
            items = items[: 4 * int(rng.integers(len(items) // 4 + 1))]
            n = len(items) // 4
        else:
            struct.pack_into("<I", items, 4 * int(rng.integers(len(items) // 4)) if items else 0, _integer(rng, n) % (1 << 32))
        value = array(item, bytes(items), n)
    else:
        value = _value(rng)
    file.keys[i] = key, value
    return key, value.type, value.payload[:24]


def key_added(rng, file):
    key = _pick(rng, _KEYS).encode()
    file.keys = [(k, v) for k, v in file.keys if k != key]
    file.keys.insert(int(rng.integers(len(file.keys) + 1)), (key, _value(rng)))
    return key


def key_order(rng, file):
    rng.shuffle(file.keys)
    return ""


def alignment(rng, file):
    new = _pick(rng, (0, 1, 2, 4, 8, 16, 32, 128, 3, 96, 1 << 31))
    file.keys = [(k, scalar(U32, new) if k == b"general.alignment" else v) for k, v in file.keys]
    if 0 < new <= 128 and rng.random() < 0.8:
        file.alignment = new
    return new


def header(rng, file):
    if rng.random() < 0.3:
        file.version = _pick(rng, (0, 1, 2, 4, 1 << 16, 1 << 31))
        return file.version
    which, n = _pick(rng, (("keys", len(file.keys)), ("tensors", len(file.tensors))))
    file.counts[which] = _pick(rng, (max(n - 1, 0), n + 1, *_COUNTS))
    return file.counts


# mutations of tensors


def _tensor(rng, file: Container) -> Tensor:
    if not file.tensors:
        file.tensors.append(Tensor(b"seg.0.blk.0.anchor.key", [16, 1], TENSOR_F16, bytes(32)))
    return _pick(rng, file.tensors)


def _family(rng, file: Container) -> list[Tensor]:
    """One tensor in most cases, else the same part of all tables, or all parts of one table."""
    t = _tensor(rng, file)
    *_, part = fields = t.name.split(b".")
    choice = rng.integers(8)
    if choice == 0:
        return [u for u in file.tensors if u.name.endswith(b"." + part)]
    if choice == 1:
        return [u for u in file.tensors if u.name.split(b".")[:-1] == fields[:-1]]
    return [t]


def tensor_missing(rng, file):
    family = _family(rng, file)
    file.tensors = [t for t in file.tensors if not any(t is u for u in family)]
    return [t.name for t in family[:3]]


def tensor_twice(rng, file):
    t = copy.copy(_tensor(rng, file))
    if rng.random() < 0.5:
        t.name = _other_name(rng, t.name)
    file.tensors.insert(int(rng.integers(len(file.tensors) + 1)), t)
    return t.name[:80]


def _other_name(rng, name: bytes) -> bytes:
    fields = name.split(b".")
    change = rng.integers(5)
    if change == 0 or len(fields) < 6:
        return _bad_text(rng, name)
    if change == 1:
        return name + _pick(rng, (b"\0", b"\0a", b" ", b".", b"x" * 36, b"x" * 48))
    if change == 2:
        fields[_pick(rng, (1, 3))] = _pick(rng, (b"0", b"1", b"2", b"00", b"+1", b"-1", b"9", b"255", b"4294967296", "٠".encode()))
    elif change == 3:
        fields[4] = _pick(rng, _KINDS).encode()
    else:
        fields[5] = _pick(rng, _PARTS).encode()
    return b".".join(fields)


def tensor_name(rng, file):
    t = _tensor(rng, file)
    old, t.name = t.name, _other_name(rng, t.name)
    return old, t.name[:80]


def tensor_dims(rng, file):
    family = _family(rng, file)
    axis, change, new = rng.integers(4), rng.integers(6), _pick(rng, (0, 0, 1, 2, 3, -1, 32, 1 << 31, 1 << 62, (1 << 64) - 1))
    keep_data = rng.random() < 0.3
    for i, t in enumerate(file.tensors):
        if not any(t is u for u in family):
            continue
        dims = list(t.dims)
        if change == 0:
            dims += [_pick(rng, (1, 1, 1, 0, 2))] * (1 + axis % 3)
        elif change == 1:
            dims = dims[::-1]
        elif change == 2:
            dims = dims[:-1]
        elif change == 3 and dims:
            dims[axis % len(dims)] += int(_pick(rng, (-1, 1)))
        elif dims:
            dims[axis % len(dims)] = new
        file.tensors[i] = t = Tensor(t.name, dims, t.type, t.data, t.offset)
        file.tensors[i] = t if keep_data else t.sized()
    return [t.name for t in family[:3]], change, new


def tensor_type(rng, file):
    family = _family(rng, file)
    new = int(_pick(rng, (TENSOR_F32, TENSOR_F16, TENSOR_Q8_0, TENSOR_I32, rng.integers(48), 1 << 31)))
    keep_data = rng.random() < 0.3
    for t in family:
        if t.type in _DTYPES and new in _DTYPES and not keep_data:
            with np.errstate(all="ignore"):
                t.data = np.frombuffer(t.data, _DTYPES[t.type]).astype(_DTYPES[new]).tobytes()
        t.type = new
    return [t.name for t in family[:3]], new


def tensor_offset(rng, file):
    t, other = _tensor(rng, file), _tensor(rng, file)
    before = 0
    for u in file.tensors:
        if u is other:
            break
        before += len(u.data) + -len(u.data) % file.alignment
    t.offset = _pick(rng, (before, before + 1, before + 4, before + 64, max(before - 64, 0), *_COUNTS))
    return t.name, t.offset


def tensor_order(rng, file):
    rng.shuffle(file.tensors)
    return ""


def tensor_numbers(rng, file):
    """Change a few numbers of a tensor, or all."""
    family = _family(rng, file)
    how = rng.integers(8)
    for t in family:
        if not t.data:
            continue
        if t.type == TENSOR_Q8_0:
            blocks = np.frombuffer(t.data, np.uint8).reshape(-1, 34).copy()
            rows = slice(None) if how == 0 else rng.integers(len(blocks), size=_pick(rng, (1, 2, 9)))
            if how < 5:
                scale = np.array([_pick(rng, (np.nan, np.inf, -np.inf, 0, 1e-7, 60000, -1, 1e-3))], np.float16)
                blocks[rows, :2] = scale.view(np.uint8)
            else:
                blocks[rows, 2:] = rng.integers(256, size=blocks[rows, 2:].shape)
            t.data = blocks.tobytes()
            continue
        if t.type not in _DTYPES:
            continue
        x = np.frombuffer(t.data[: len(t.data) // 4 * 4], _DTYPES[t.type]).copy()
        places = rng.integers(len(x), size=_pick(rng, (1, 1, 2, 9)))
        with np.errstate(all="ignore"):
            if t.type == TENSOR_I32:
                if how < 4:
                    x[places] = np.array([_integer(rng, int(x[i])) for i in places], np.int64).astype(np.int32)
                elif how == 4:
                    x[places] = x[rng.permutation(places)]
                elif how == 5:
                    x[:] = _pick(rng, (0, -1, 1))
                elif how == 6:
                    x += _pick(rng, (-1, 1))
                else:
                    x = rng.permutation(x)
            elif how < 4:
                x[places] = np.array([_number(rng) for _ in places]).astype(x.dtype)
            elif how == 4:
                x[:] = x.dtype.type(_number(rng))
            elif how == 5:
                x *= x.dtype.type(_pick(rng, (-1, 1e-3, 1e3, 1e10)))
            elif how == 6:
                x = rng.permutation(x)
            else:
                x = (x + rng.standard_normal(len(x)) * _pick(rng, (1e-3, 1, 30))).astype(x.dtype)
        t.data = x.tobytes()
    return [t.name for t in family[:3]], how


def graph_width(rng, file):
    """Change the number of neighbours per row of a graph, also to 0; old neighbours stay in front."""
    links = [t for t in file.tensors if t.name.endswith((b".link0", b".link")) and len(t.dims) == 2]
    if not links:
        return "none"
    prefix = _pick(rng, links).name.rsplit(b".", 1)[0]
    widths = {b"link0": _pick(rng, (0, 0, 1, 3, 17, 40)), b"link": _pick(rng, (0, 0, 1, 3, 17, 40))}
    for t in links:
        if t.name.startswith(prefix + b"."):
            x = np.frombuffer(t.data, np.int32).reshape(t.dims[1], -1)
            width = widths[t.name.rsplit(b".", 1)[1]]
            x = np.pad(x[:, :width], ((0, 0), (0, max(0, width - x.shape[1]))), constant_values=-1)
            t.dims, t.data = [width, t.dims[1]], np.ascontiguousarray(x).tobytes()
    return prefix, widths


# mutations of bytes


def _bytes(rng, content: bytes) -> tuple[bytes, str]:
    data = bytearray(content)
    end = min(len(data), _pick(rng, (24, 2000, 20_000, len(data))))
    how = rng.integers(6)
    position = int(rng.integers(end + 1))
    if how < 2:
        for i in rng.integers(end, size=_pick(rng, (1, 1, 2, 8))):
            data[i] ^= int(rng.integers(1, 256))
    elif how == 2:
        del data[position:]
    elif how == 3:
        data[position:position] = rng.bytes(_pick(rng, (1, 4, 8, 64)))
    elif how == 4:
        del data[position : position + _pick(rng, (1, 4, 8, 64))]
    else:
        struct.pack_into("<Q", data, min(position, len(data) - 8), _pick(rng, _COUNTS))
    return bytes(data), f"bytes {how} at {position}"


_MUTATIONS = (
    key_missing, key_twice, key_name, key_type, key_type, key_value, key_value, key_value, key_value, key_added, key_added,
    key_order,
    alignment, header, tensor_missing, tensor_twice, tensor_name, tensor_name, tensor_dims, tensor_dims, tensor_dims, tensor_type,
    tensor_offset, tensor_order, tensor_numbers, tensor_numbers, tensor_numbers, tensor_numbers, graph_width,
)  # fmt: skip
