"""What the distribution promises as a whole: contents, import cost, one-way imports, the CLI from a real wheel."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "onnxruntime", "transformers", "flwr")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="hatchling builds the wheel; install the 'dev' extra")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_wheel_top_level_is_exactly_the_three_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fstq_infer", "fstq_export", "fstq_engines"}


def test_sdist_holds_what_the_repository_does_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="hatchling builds the sdist; install the 'dev' extra")
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if shutil.which("git") is None or (found := subprocess.run(listed, capture_output=True, check=False)).returncode:
        pytest.skip("not a git checkout")
    known = {name for name in found.stdout.decode().split("\0") if name and (ROOT / name).is_file()}
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert held - known == {"PKG-INFO"}
    missing = known - held - {".gitignore"}
    assert {name for name in missing if not name.startswith("bench/results/")} == set()


@pytest.mark.slow
def test_installed_wheel_runs_export(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("mobius", reason="fstq export needs the 'export' extra")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    from tests.export.families import make

    make("llama", tmp_path / "model")
    # PYTHONPATH comes before an editable checkout, so the packages are the unpacked wheel's.
    code = (
        "import sys, fstq_infer.cli, fstq_infer.bundle, fstq_export.pipeline, fstq_engines; "
        "homes = {m.__file__.startswith(sys.argv[1]) for m in (fstq_infer, fstq_export, fstq_engines)}; "
        "sys.exit('not from the wheel') if homes != {True} else fstq_infer.cli.main(sys.argv[2:])"
    )
    command = [sys.executable, "-c", code, str(site), "export", str(tmp_path / "model"), "--out", str(tmp_path / "b")]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "b" / "manifest.json").is_file()


def test_installed_wheel_has_device_profiles(wheel: Path, tmp_path: Path) -> None:
    """jetson/ is not installed, its profiles are: plan and doctor work outside a checkout."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    names = {path.name for path in (tmp_path / "site" / "fstq_infer" / "profiles").iterdir()}
    assert names == {path.name for path in (ROOT / "jetson" / "profiles").iterdir()} and "orin-nano.toml" in names
    code = (
        "import sys, fstq_infer.cli, fstq_infer.device; "
        "sys.exit('not from the wheel') if not str(fstq_infer.device.folder()).startswith(sys.argv[1]) "
        "else fstq_infer.cli.main(sys.argv[2:])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    record = ROOT / "tests" / "doctor" / "environments" / "thor.json"
    for arguments in (("plan", "--check"), ("doctor", "--replay", str(record))):
        command = [sys.executable, "-c", code, str(tmp_path / "site"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0 and "thor" in done.stdout, done.stderr


def test_no_package_named_jetson() -> None:
    assert not (ROOT / "jetson" / "__init__.py").exists()


def test_import_is_light() -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import fstq_infer; "
        f"print(time.perf_counter() - t, [m for m in {HEAVY!r} if m in sys.modules])"
    )
    outputs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    ]
    assert min(float(output.split()[0]) for output in outputs) < 0.3
    assert all(output.split(" ", 1)[1].strip() == "[]" for output in outputs)


COMMANDS = ("export", "build", "lint", "run", "chat", "bench", "demo", "plan", "doctor", "fed run", "fed new")


@pytest.mark.parametrize("command", [*COMMANDS, *(f"adapter {name}" for name in ("add", "list", "remove"))])
def test_help_is_light_and_has_an_example(command: str) -> None:
    code = (
        "import sys, contextlib\nfrom fstq_infer.cli import app\n"
        "with contextlib.suppress(SystemExit): app([*sys.argv[1].split(), '--help'], prog_name='fstq')\n"
        f"print('LOADED', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, command],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert f"Example: fstq {command}" in done.stdout
    assert "LOADED []" in done.stdout


def test_every_command_is_tried() -> None:
    """The list above has them all, so that none lacks an example."""
    import typer.main

    from fstq_infer.cli import app

    group = typer.main.get_command(app)
    names = [
        f"{name} {below}" if below else name
        for name, one in group.commands.items()  # type: ignore[attr-defined]
        for below in getattr(one, "commands", {"": None})
    ]
    assert sorted(names) == sorted([*COMMANDS, "adapter add", "adapter list", "adapter remove"])


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize(
    ("folder", "banned"),
    [
        ("fstq_infer", {"fstq_export", "fstq_engines", "pickle"}),
        ("export/fstq_export", {"fstq_engines", "pickle"}),
        ("engines/fstq_engines", {"fstq_export", "pickle", "torch", "transformers"}),
        ("fstq_infer/runtime", {"torch", "transformers", "onnx", "onnx_ir"}),
    ],
)
def test_imports_run_one_way(folder: str, banned: set[str]) -> None:
    found = {str(path): _imports(path) & banned for path in (ROOT / folder).rglob("*.py")}
    assert found
    assert {path: names for path, names in found.items() if names} == {}


def test_no_asserts_or_prints_outside_tests() -> None:
    bad = []
    for folder in ("fstq_infer", "export", "engines"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Assert):
                    bad.append(f"{path}:{node.lineno} assert")
                called = node.func if isinstance(node, ast.Call) else None
                if isinstance(called, ast.Name) and called.id == "print":
                    bad.append(f"{path}:{node.lineno} print")
    assert bad == []
