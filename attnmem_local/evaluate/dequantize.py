"""An F32 copy of a GGUF: the model on which exactness can be judged, because no activation is quantized."""

import os
from pathlib import Path

import gguf
import numpy as np


def write_f32(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copy a GGUF with every tensor dequantized to float32. The target is replaced only when it is whole."""
    reader = gguf.GGUFReader(source)
    target = Path(target)
    part = target.with_name(target.name + ".part")
    writer = gguf.GGUFWriter(part, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
