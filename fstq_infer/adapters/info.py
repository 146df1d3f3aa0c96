"""What a bundle's manifest says of an adapter: one entry of ``adapters`` (docs/bundle-format.md)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fstq_infer.adapters.ports import MOST_RANK
from fstq_infer.adapters.tensors import FILE_CAP
from fstq_infer.errors import AdapterNameError
from fstq_infer.strict_json import JsonObject

if TYPE_CHECKING:
    from collections.abc import Callable

    from fstq_infer.manifest import Pruning

FOLDER, MOST = "adapters", 1024
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
NAME_RULE = "1 to 64 letters, digits, hyphens and underscores, the first a letter or digit"


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """An adapter of a bundle. bytes, sha256: of its file. rank: the largest of a layer.

    source: the folder's name that it came from; source_sha256: of the weights there; base: the model's name in it.
    pruning: what holds with this adapter in place of the bundle's own; None where that was not measured. probe: whether
    the file holds weights for the bundle's probes.
    """

    bytes: int
    sha256: str
    rank: int
    source: str
    source_sha256: str
    base: str
    probe: bool = False
    pruning: Pruning | None = None

    def to_json(self) -> dict[str, Any]:
        """For manifest.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: JsonObject, pruning: Callable[[JsonObject], Pruning]) -> AdapterInfo:
        """Raises ManifestError."""
        measured = data.get("pruning", "an object or null")
        return cls(
            bytes=data.integer("bytes", 1, FILE_CAP),
            sha256=data.sha256("sha256"),
            rank=data.integer("rank", 1, MOST_RANK),
            source=data.text("source"),
            source_sha256=data.sha256("source_sha256"),
            base=data.text("base"),
            probe=data.boolean("probe"),
            pruning=None if measured is None else pruning(data.nested("pruning")),
        )


def path_of(name: str) -> str:
    """Path of an adapter's file within its bundle."""
    return f"{FOLDER}/{name}.safetensors"


def check_name(name: str) -> str:
    """The name itself. Raises AdapterNameError unless it can be one."""
    if not NAME.fullmatch(name):
        raise AdapterNameError(f"{name[:80]!a} is no name for an adapter; expected {NAME_RULE}. Write NAME=FOLDER.")
    return name


def infos(data: JsonObject, pruning: Callable[[JsonObject], Pruning]) -> Mapping[str, AdapterInfo]:
    """All entries of ``adapters``. Raises ManifestError."""
    if len(data.data) > MOST:
        raise data.bad(next(iter(data.data)), f"at most {MOST} adapters, found {len(data.data)}")
    for name in data.data:
        if not NAME.fullmatch(name):
            raise data.bad(name, f"another name: {NAME_RULE}")
    if len({name.lower() for name in data.data}) < len(data.data):
        raise data.bad(next(iter(data.data)), "names that differ in more than capital letters")
    return {name: AdapterInfo.from_json(data.nested(name), pruning) for name in data.data}
