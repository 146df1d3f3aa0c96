"""Pass and file work for engines with adapters: the graph without their inputs, and one file of weights for both.

A branch of rank 0 costs nothing when one token is decoded, but writes and adds zeros as large as each layer's output
when a prompt is read; so an engine has a graph of its own for requests without an adapter (ADR 14).
"""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PreconditionError
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fstq_infer.adapters.ports import SCOPE

_BRANCH = re.compile(rf"/{SCOPE}/Add_\d+$")
_PORT = f"{SCOPE}."


class WithoutAdapters(InPlacePass):
    """Take inputs ``lora.*`` and the branches that read them out; probe weights that adapters replace become fixed."""

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        branches = [node for node in graph if node.op_type == "Add" and _BRANCH.search(node.name or "")]
        for node in branches:
            out, base = node.outputs[0], node.inputs[0]
            if base is None:
                raise PreconditionError(f"{node.name} adds to nothing")
            ir.convenience.replace_all_uses_with(out, base)
            graph.remove(node, safe=True)
        RemoveUnusedNodesPass()(model)
        for value in [v for v in graph.inputs if (v.name or "").startswith(_PORT) or v.is_initializer()]:
            if value.uses() and not value.is_initializer():
                raise PreconditionError(f"{value.name} is read by {next(iter(value.uses())).node.name}")
            graph.inputs.remove(value)
        return PassResult(model, bool(branches))


def share_weights(folder: Path, model: str, other: str) -> int:
    """Let ``other`` read the weights that it shares with ``model`` from that one's file; returns the bytes shared.

    Both lie in ``folder``, each with a file NAME.data of its own; that of ``other`` is written anew with what is left.
    """
    mine = {t.name: _place(t) for t in _external(onnx.load(folder / model, load_external_data=False))}
    theirs = onnx.load(folder / other, load_external_data=False)
    shared, left = 0, bytearray()
    own = folder / f"{other}.data"
    with _Mapped(folder / f"{model}.data") as first, _Mapped(own) as second:
        for tensor in _external(theirs):
            offset, length = _place(tensor)
            at = mine.get(tensor.name, (0, -1))
            if at[1] == length and first[at[0] : at[0] + length] == second[offset : offset + length]:
                _move(tensor, f"{model}.data", at[0])
                shared += length
            else:
                left += b"\0" * (-len(left) % 64)
                _move(tensor, own.name, len(left))
                left += second[offset : offset + length]
    own.unlink(missing_ok=True)
    if left:
        own.write_bytes(left)
    (folder / other).write_bytes(theirs.SerializeToString())
    return shared


class _Mapped:
    """A file's bytes; none where there is no file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb") if path.exists() and path.stat().st_size else None
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if self._file is not None else None

    def __enter__(self) -> mmap.mmap | bytes:
        return b"" if self._map is None else self._map

    def __exit__(self, *_: object) -> None:
        if self._map is not None and self._file is not None:
            self._map.close()
            self._file.close()


def _external(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    return [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]


def _place(tensor: onnx.TensorProto) -> tuple[int, int]:
    """(offset, length) in its file."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return int(entries.get("offset", 0)), int(entries["length"])


def _move(tensor: onnx.TensorProto, location: str, offset: int) -> None:
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = location
        if entry.key == "offset":
            entry.value = str(offset)
    if not any(entry.key == "offset" for entry in tensor.external_data):
        tensor.external_data.add(key="offset", value=str(offset))
