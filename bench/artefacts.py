"""Files that runtimes read, all made from one checkpoint, each once and whole: bundles and engines, ONNX, GGUF.

Knows how the exporters are called. What cannot be made, because a package is missing, is told by the reason.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pool import Absent
from shapes import Shape

from fstq_infer.quant.formats import FORMATS
from fstq_infer.quant.plan import Group, Plan

HERE = Path(__file__).resolve().parent
# Formats of the layers and of the one table that is embedding and head; see docs/performance.md for what was tried.
PLANS = {
    "w8": ("int8-dynamic", "int8"),
    "w8h4": ("int8-dynamic", "int4-32"),
    "w4": ("int4-128", "int4-128"),
    "w4+8": ("int4-128-dynamic", "int4-128"),
}
GENAI = ("prune_lm_head=true", "shared_embeddings=true", "fuse_mlp_gate_up=true")
BUILDERS = {
    "fp32": ("fp32",),
    "int8": ("int8", "accuracy_level=4", "block_size=128"),
    "int4-32": ("int4", "accuracy_level=4", "block_size=32"),
    "int4-128": ("int4", "accuracy_level=4", "block_size=128"),
}
ROWS = ("Gather", "GroupQueryAttention")  # operators that take rows of a table: of embeddings, of rotary angles


@dataclass(frozen=True)
class Maker:
    """Artefacts of one shape in ``folder``. peers: the interpreter that has the peers."""

    name: str
    shape: Shape
    folder: Path
    peers: str

    def path(self, artefact: str) -> Path:
        """Of a whole artefact, made now if it is not there. Raises Absent, or RuntimeError with the log's end."""
        path = self.folder / artefact
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"partial-{artefact}")
            shutil.rmtree(partial, ignore_errors=True)
            partial.unlink(missing_ok=True)
            print(f"making {artefact} of the {self.name} shape", flush=True)
            self._made(artefact)(partial)
            partial.rename(path)
        if artefact.endswith(".bundle") and not path.with_suffix(".engine").exists():
            self._engine(path, path.with_suffix(".engine"))
        return path

    def _made(self, artefact: str) -> Callable[[Path], None]:
        kind, _, rest = artefact.partition(":")
        if artefact == "model":
            return lambda out: self._run([sys.executable, str(HERE / "shapes.py"), self.name, str(out)])
        if artefact.endswith(".bundle"):
            return lambda out: self._bundle(artefact.removesuffix(".bundle"), out)
        if kind == "mobius":
            return lambda out: self._mobius(rest, out)
        if kind == "genai":
            return lambda out: self._genai(rest, out)
        return lambda out: self._gguf(artefact.removesuffix(".gguf"), out)

    def _bundle(self, precision: str, out: Path) -> None:
        command = [sys.executable, "-m", "fstq_infer", "export", str(self.path("model")), "--out", str(out)]
        command += ["--prune-layer", str(self.shape.prune_layer), "--keep", "0.25"]
        if precision in PLANS:
            plan = self.folder / f"{precision}.plan.toml"
            plan.write_text(plan_text(self.shape, *PLANS[precision]), encoding="utf-8")
            command += ["--precision", str(plan)]
        self._run(command)

    def _engine(self, bundle: Path, out: Path) -> None:
        made = "import sys; from pathlib import Path; from fstq_infer.bundle import Bundle; "
        made += "from fstq_infer.runtime.load import build_engine; "
        made += "build_engine(Bundle.open(sys.argv[1]), directory=Path(sys.argv[2]), force=True)"
        self._run([sys.executable, "-c", made, str(bundle), str(out)])

    def _mobius(self, provider: str, out: Path) -> None:
        made = "import sys, mobius, onnx_ir, pathlib; "
        made += "package = mobius.build(sys.argv[1], task='text-generation', dtype='f32', execution_provider="
        made += "sys.argv[2]); pathlib.Path(sys.argv[3]).mkdir(); "
        made += "onnx_ir.save(package['model'], sys.argv[3] + '/model.onnx', external_data='model.onnx.data')"
        self._run([sys.executable, "-c", made, str(self.path("model")), provider, str(out)])

    def _genai(self, kind: str, out: Path) -> None:
        self._needs("onnxruntime_genai", "onnxruntime-genai", "onnx_ir", "onnx-ir")
        precision, *options = BUILDERS[kind]
        command = [self.peers, "-m", "onnxruntime_genai.models.builder", "-i", str(self.path("model"))]
        command += ["-o", str(out), "-p", precision, "-e", "cpu", "-c", str(self.folder / "partial-cache")]
        self._run([*command, "--extra_options", *GENAI, *options])

    def _gguf(self, kind: str, out: Path) -> None:
        self._needs("gguf", "gguf")
        self._run([self.peers, str(HERE / "gguf_qwen2.py"), str(self.path("model")), str(out), kind])

    def _needs(self, *modules: str) -> None:
        """modules: name, package, name, package ..."""
        for module, package in zip(modules[::2], modules[1::2], strict=True):
            find = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
            if subprocess.run([self.peers, "-c", find]).returncode:
                raise Absent(f"{self.peers} has no {module}: pip install {package}")

    def _run(self, command: list[str]) -> None:
        log = self.folder / "making.log"
        with log.open("ab") as out:
            status = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ).returncode
        if status:
            end = log.read_text(encoding="utf-8", errors="replace")[-800:]
            raise RuntimeError(f"{' '.join(command)[:300]} ended with {status}; {log} ends with: {end}")


def plan_text(shape: Shape, layers: str, table: str) -> str:
    """A plan that gives all layers one format and the table another."""
    groups = {}
    for name, (rows, columns) in shape.matrices().items():
        form = table if name == "model.embed_tokens" else layers
        groups[name] = Group((name,), form, 0.0, FORMATS[form].bytes(rows, columns), rows * columns)
    return Plan(groups, "formats by hand, for random weights").to_toml()


def sizes(path: Path) -> tuple[int, int]:
    """(bytes of the weights, of those that each token reads): not of tables that only rows are taken from.

    GGUF files and checkpoints hold embedding and head once, and all of it is read. Of a bundle, what its engine holds a
    second time to read prompts is counted with the weights.
    """
    if path.is_file():
        return (path.stat().st_size,) * 2
    if not (path / "model.onnx").exists():
        return (sum(file.stat().st_size for file in path.glob("*.safetensors")),) * 2
    import onnx_ir as ir

    held = (path / "model.onnx.data").stat().st_size
    values = ir.load(path / "model.onnx").graph.initializers.values()
    tables = [value for value in values if value.uses() and all(use.node.op_type in ROWS for use in value.uses())]
    engine, copies = path.with_suffix(".engine") / "model.onnx", 0
    if engine.exists():
        for value in ir.load(engine).graph.initializers.values():
            places = {str(use.node.graph.name) for use in value.uses() if use.node.graph is not None}
            if value.const_value is not None and places and all(name.endswith("/then_branch") for name in places):
                copies += value.const_value.nbytes
    return held + copies, held - sum(value.const_value.nbytes for value in tables if value.const_value is not None)
