"""Checks CTranslate2's ``model.bin`` before CTranslate2 reads it, which trusts numbers in it: a layer that is not there
makes it write outside its memory.

Little endian, strings with their length (u16) before and a zero byte at their end: version (u32), name of the
specification, its revision (u32), count of variables (u32), each with name, rank (u8), shape (u32 each), type (u8),
bytes (u32) and content; count of aliases (u32), each with its name and that of a variable. What fairseq-export writes
passes, and nothing else.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path

from fairseq.errors import FairseqError

VERSION = 6
SPECIFICATION = "TransformerSpec"
_ITEM_SIZES = {0: 4, 1: 1, 2: 2, 3: 4, 4: 2, 5: 2}  # float32, int8, int16, int32, float16, bfloat16
_FLOATS, _INT8, _INT16 = (0, 4, 5), 1, 2
_WEIGHTS = (*_FLOATS, _INT8, _INT16)
_SCALARS = {  # of a stack: type, least and most
    "activation": (_INT8, 0, 6),
    "alibi": (_INT8, 0, 0),
    "alibi_use_positive_positions": (_INT8, 0, 1),
    "alignment_heads": (_INT16, 1, 2**15),
    "alignment_layer": (_INT16, -1, -1),
    "embeddings_merge": (_INT8, 0, 0),
    "multi_query_attention": (_INT8, 0, 0),
    "num_heads": (_INT16, 1, 2**15),
    "pre_norm": (_INT8, 0, 1),
    "scale_alibi": (_INT8, 0, 1),
    "scale_embeddings": (_INT8, 0, 1),
    "start_from_zero_embedding": (_INT8, 0, 0),
}


class _Damaged(Exception):
    """What is wrong."""


@dataclass
class _Variable:
    """dtype: a key of ``_ITEM_SIZES``. value: of a scalar, as a signed integer; 0 for anything larger."""

    shape: tuple[int, ...]
    dtype: int
    value: int


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.position = data, 0

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def text(self) -> str:
        text = self.take(self.number(2))
        if text[-1:] != b"\0" or not text.isascii():
            raise _Damaged("a name that is none")
        return text[:-1].decode()

    def take(self, size: int) -> bytes:
        self.skip(size)
        return self.data[self.position - size : self.position]

    def skip(self, size: int) -> None:
        self.position += size
        if self.position > len(self.data):
            raise _Damaged("it is cut short")


def check_model_file(path: Path, source: tuple[int, int], target: tuple[int, int]) -> None:
    """Raise FairseqError unless the file is a Transformer, whole and consistent.

    source, target: of each side the entries of the vocabulary and the positions that there must be.
    """
    try:
        with open(path, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            variables = _variables(_Reader(data))
        for stack, sizes in (("encoder", source), ("decoder", target)):
            _check_stack(stack, variables, *sizes)
    except OSError as error:
        raise FairseqError(f"{path}: cannot read: {error.strerror or error}") from error
    except (_Damaged, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise FairseqError(f"{path}: not a model of fairseq-export, or damaged: {error}; export it again") from None


def _variables(reader: _Reader) -> dict[str, _Variable]:
    if (version := reader.number(4)) != VERSION or (name := reader.text()) != SPECIFICATION:
        raise _Damaged(f"format {version}" if version != VERSION else f"a {name}")
    reader.skip(4)
    variables: dict[str, _Variable] = {}
    for _ in range(reader.number(4)):
        name = reader.text()
        shape = tuple(reader.number(4) for _ in range(reader.number(1)))
        dtype, size = reader.number(1), reader.number(4)
        if dtype not in _ITEM_SIZES or math.prod(shape) * _ITEM_SIZES[dtype] != size or not size:
            raise _Damaged(f"{name} is {shape} and has {size} bytes")
        if name in variables or not name.startswith(("encoder/", "decoder/")):
            raise _Damaged(f"{name} is there twice, or should not be there")
        start = reader.position
        reader.skip(size)
        value = 0 if shape else int.from_bytes(reader.data[start : reader.position], "little", signed=True)
        variables[name] = _Variable(shape, dtype, value)
    for _ in range(reader.number(4)):
        name, original = reader.text(), reader.text()
        if name in variables or original not in variables:
            raise _Damaged(f"{name} stands for {original}")
        variables[name] = variables[original]
    return variables


def _check_stack(stack: str, variables: dict[str, _Variable], entries: int, positions: int) -> None:
    """That its numbers are possible, and that its tensors are known and of shapes that go together."""
    own = {name.removeprefix(f"{stack}/"): v for name, v in variables.items() if name.startswith(f"{stack}/")}
    matrices, shapes = _shapes(stack, own, _size(variables, "encoder/embeddings_0/weight", 1), entries)
    for name, variable in own.items():
        if name in _SCALARS:
            dtype, least, most = _SCALARS[name]
            fits = (variable.shape, variable.dtype) == ((), dtype) and least <= variable.value <= most
        elif name.endswith("/weight"):
            fits = variable.shape == matrices.get(name.removesuffix("/weight")) and variable.dtype in _WEIGHTS
        else:
            fits = variable.shape == shapes.get(name) and variable.dtype in _FLOATS
        if not fits:
            raise _Damaged(f"{stack}/{name} is {variable.shape or variable.value}")
    if _size(own, "position_encodings/encodings", 0) < positions:
        raise _Damaged(f"{stack}/position_encodings has fewer than {positions} rows")
    heads, alignment_heads = (own[name].value if name in own else 1 for name in ("num_heads", "alignment_heads"))
    if shapes["layer_norm/gamma"][0] % heads or alignment_heads > heads:
        raise _Damaged(f"{stack}/num_heads is {heads}, {stack}/alignment_heads {alignment_heads}")


def _shapes(
    stack: str, own: dict[str, _Variable], encoder_dim: int, entries: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The shapes of the matrices of a stack, and those of all else that is no scalar. own: its variables."""
    embeddings = "embeddings_0" if stack == "encoder" else "embeddings"
    dim, ffn_dim = _size(own, f"{embeddings}/weight", 1), _size(own, "layer_0/ffn/linear_0/weight", 0)
    layer = {"self_attention/linear_0": (3 * dim, dim), "self_attention/linear_1": (dim, dim)}
    if stack == "decoder":
        layer |= {"attention/linear_0": (dim, dim), "attention/linear_2": (dim, dim)}
        layer |= {"attention/linear_1": (2 * dim, encoder_dim)}
    layer |= {"ffn/linear_0": (ffn_dim, dim), "ffn/linear_1": (dim, ffn_dim)}
    matrices: dict[str, tuple[int, ...]] = {embeddings: (entries, dim), "projection": (entries, dim)}
    norms, number = ["layer_norm", "layernorm_embedding"], 0
    while f"layer_{number}/ffn/linear_0/weight" in own:
        matrices |= {f"layer_{number}/{name}": shape for name, shape in layer.items()}
        norms += [f"layer_{number}/{block}/layer_norm" for block in ("self_attention", "attention", "ffn")]
        number += 1
    shapes: dict[str, tuple[int, ...]] = {f"{name}/{kind}": (dim,) for name in norms for kind in ("gamma", "beta")}
    shapes["position_encodings/encodings"] = _size(own, "position_encodings/encodings", 0), dim
    for name, shape in matrices.items():
        shapes[f"{name}/bias"] = shape[:1]
        weight = own.get(f"{name}/weight")
        if weight is not None and weight.dtype not in _FLOATS:  # a scale for each row, or in int16 for all
            shapes[f"{name}/weight_scale"] = shape[:1] if weight.dtype == _INT8 else ()
    return matrices, shapes


def _size(variables: dict[str, _Variable], name: str, axis: int) -> int:
    if name not in variables or len(variables[name].shape) != 2:
        raise _Damaged(f"no {name} of two dimensions")
    return variables[name].shape[axis]
