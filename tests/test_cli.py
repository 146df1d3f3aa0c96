"""The command line as a user meets it: a real tiny bundle, wrong input first, exit codes, JSON."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mobius", reason="fstq export needs the 'export' extra")
pytest.importorskip("onnxruntime", reason="engines need the 'ort' extra")

from tests.bundles import posix
from tests.export.families import make


def fstq(*arguments: object, cache: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FSTQ_CACHE": str(cache), "COLUMNS": "200"}
    command = [sys.executable, "-m", "fstq_infer", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, input=stdin)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    model = make("llama", folder / "model")
    done = fstq("export", model, "--out", folder / "b", "--prune-layer", 1, "--keep", 0.5, "--json", cache=cache)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["report"]["verification"]["pruned"]["kept_equal"]
    return folder / "b"


PROMPT = "the quick brown fox jumps over the lazy dog and runs away from all the other animals in the old forest"


def test_build_then_run_json(bundle: Path, cache: Path) -> None:
    built = fstq("build", bundle, "--json", cache=cache)
    assert built.returncode == 0, built.stderr
    assert Path(json.loads(built.stdout)["engine"]).is_dir()
    done = fstq("run", bundle, PROMPT, "--json", "--max-tokens", 5, cache=cache)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert 0 < len(result["kept"]) < len(result["prompt_tokens"])
    assert len(result["tokens"]) <= 5 and result["timings"]["total_s"] > 0


def test_run_streams_and_shows_kept(bundle: Path, cache: Path) -> None:
    done = fstq("run", bundle, "-", "--show-kept", "--max-tokens", 3, cache=cache, stdin=PROMPT)
    assert done.returncode == 0, done.stderr
    assert "lazy dog" in re.sub(r"\[-|-\]", "", done.stdout)
    assert "prompt tokens kept" in done.stderr


def test_chat_keeps_its_cache(bundle: Path, cache: Path) -> None:
    done = fstq("chat", bundle, "--max-tokens", 3, cache=cache, stdin=f"{PROMPT}\nand then?\n\n")
    assert done.returncode == 0, done.stderr


def test_bench_writes_json(bundle: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    options = ("--prompt-tokens", 64, "--new-tokens", 4, "--keep", "1.0,0.5", "--repeats", 2, "--json", out)
    done = fstq("bench", bundle, *options, cache=cache)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["kept"] for row in rows] == [64, 32]
    assert rows[1]["kv_bytes"] < rows[0]["kv_bytes"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "{b}", ""), "empty"),
        (("run", "{b}", "word " * 3000), "context"),
        (("run", "{b}", "hi", "--keep", "1.5"), "keep"),
        (("run", "{b}", "hi", "--temperature", "-1"), "temperature"),
        (("run", "nowhere", "hi"), "nowhere"),
        (("build", "{b}", "--backend", "onnx"), "backend"),
        (("bench", "{b}", "--prompt-tokens", "99999"), "context"),
        (("bench", "{b}", "--keep", "auto"), "numbers"),
        (("export", "nowhere", "--out", "{t}/x"), "nowhere"),
        (("export", "nowhere", "--out", "{b}"), "--force"),
        (("export", "nowhere", "--out", "{t}/x", "--keep", "half"), "keep"),
        (("export", "nowhere", "--out", "{t}/x", "--prune-layer", "2.5"), "--prune-layer is '2.5'"),
        (("export", "nowhere", "--out", "{t}/x", "--prune-layer", "2,4", "--keep", "0.25,0.5"), "do not rise"),
        (("run", "{b}", "hi", "--keep", "0.5,0.25"), "2 ratios"),
        (("demo", "--model", "x", "--out", "{t}/d"), "--calib"),
        (("demo", "--questions", "0", "--out", "{t}/d"), "--questions"),
        (("run", "hi", "{b}"), "the bundle comes first"),
        (("run", "{b}/model.onnx", "hi"), "a file of one"),
        (("run", "{b}", "hi", "--threads", "100000"), "threads=100000"),
        (("build", "{b}", "--threads", "0"), "threads=0"),
        (("chat", "{b}", "--max-tokens", "0"), "max_tokens=0"),
        (("chat", "{b}", "--keep", "2"), "keep=2.0"),
        (
            ("bench", "{b}", "--prompt-tokens", "8", "--new-tokens", "2", "--repeats", "1", "--json", "/proc/x"),
            "--json -",
        ),
        (("export", "{b}", "--out", "{t}/x"), "it is a bundle already"),
        (("export", "{b}/model.onnx", "--out", "{t}/x"), "is a file; expected"),
        (("export", "./nowhere", "--out", "{t}/x"), "does not exist; expected"),
        (("export", "{b}", "--out", "{t}/x", "--calib", "{t}"), "is no file"),
    ],
)
def test_errors_are_one_line_with_exit_code_1(
    bundle: Path, cache: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    done = fstq(*(a.format(b=bundle, t=tmp_path) for a in arguments), cache=cache)
    assert done.returncode == 1, done.stdout + done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr


def test_usage_errors_exit_with_2(bundle: Path, cache: Path) -> None:
    assert fstq("run", bundle, "hi", "--tempreature", 1, cache=cache).returncode == 2
    assert fstq("nonsense", cache=cache).returncode == 2


def test_bench_prints_json(bundle: Path, cache: Path) -> None:
    options = ("--prompt-tokens", 8, "--new-tokens", 2, "--keep", "1.0", "--repeats", 1, "--json", "-")
    done = fstq("bench", bundle, *options, cache=cache)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["kept"] == 8


def test_dropped_tokens_are_marked_where_nothing_can_be_struck_out(bundle: Path, cache: Path) -> None:
    done = fstq("run", bundle, PROMPT, "--show-kept", "--max-tokens", 1, cache=cache)
    shown = done.stdout.rstrip("\n").rpartition("\n")[2]
    assert "[-" in shown and "\x1b" not in shown
    assert re.sub(r"\[-|-\]", "", shown).strip().endswith(PROMPT)


def test_the_chat_prompt_is_for_terminals(bundle: Path, cache: Path) -> None:
    done = fstq("chat", bundle, "--max-tokens", 1, cache=cache, stdin="\n")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize(
    ("data", "words"), [(b"\xff\xfe", "not UTF-8"), (b"", "empty"), (b"a" * (17 << 20), "more than")]
)
def test_bad_standard_input(bundle: Path, cache: Path, data: bytes, words: str) -> None:
    command = [sys.executable, "-m", "fstq_infer", "run", str(bundle), "-"]
    done = subprocess.run(
        command, capture_output=True, check=False, env={**os.environ, "FSTQ_CACHE": str(cache)}, input=data
    )
    assert done.returncode == 1 and words in done.stderr.decode() and b"Traceback" not in done.stderr


@posix
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams(bundle: Path, cache: Path, closed: str) -> None:
    command = f"exec {sys.executable} -m fstq_infer run '{bundle}' - --max-tokens 1 {closed}"
    environment = {**os.environ, "FSTQ_CACHE": str(cache)}
    done = subprocess.run(command, shell=True, capture_output=True, check=False, env=environment, input=b"fox")
    assert done.returncode == (1 if closed == "<&-" else 0) and b"Traceback" not in done.stderr, done.stderr
    assert closed != "<&-" or b"empty" in done.stderr


@posix
def test_a_locale_that_lacks_the_letters(bundle: Path, cache: Path) -> None:
    """Arguments are UTF-8 all the same, and JSON stays JSON."""
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "FSTQ_CACHE": str(cache)}
    command = [sys.executable, "-m", "fstq_infer", "run", str(bundle), "Müller fox"]
    for more in (["--json"], ["--show-kept"]):
        done = subprocess.run(
            [*command, "--max-tokens", "2", *more], capture_output=True, check=False, env={**os.environ, **plain}
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.isascii()
        if more == ["--json"]:
            json.loads(done.stdout)


@posix
def test_ctrl_c_ends_with_130() -> None:
    """Sent to a command at work, by itself so that it comes at a known moment."""
    code = (
        "import os, signal, time, fstq_infer.forecast as module\n"
        "from fstq_infer.cli import main\n"
        "module.plan = lambda *_, **__: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60))\n"
        "main(['plan'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "interrupted")


def test_damaged_bundle(bundle: Path, cache: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(bundle, tmp_path / "b")
    data = bytearray((tmp_path / "b" / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (tmp_path / "b" / "model.onnx.data").write_bytes(data)
    done = fstq("build", tmp_path / "b", cache=cache)
    assert done.returncode == 1 and "model.onnx.data" in done.stderr


def test_missing_extra_names_the_command() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\nfrom fstq_infer.cli import main\nmain(['export', 'x', '--out', 'y'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'fstq-infer[export]'" in done.stderr
