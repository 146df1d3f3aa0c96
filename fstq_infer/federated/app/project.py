"""A Flower app as a folder: pyproject.toml with the whole configuration, and the module it names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fstq_infer.federated.app.tables import nested

MODULE = '''"""The apps that [tool.flwr.app.components] names."""

from fstq_infer.federated.app.client_app import app as client
from fstq_infer.federated.app.server_app import app as server

__all__ = ["client", "server"]
'''
HEAD = """\
[project]
name = "{name}"
version = "1.0.0"
description = "Federated fine-tuning of a LoRA adapter with compressed messages"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "local"
fab-include = ["fstq_app.py"]

[tool.flwr.app.components]
serverapp = "fstq_app:server"
clientapp = "fstq_app:client"
"""


def write_app(folder: Path, name: str, settings: Mapping[str, Any]) -> None:
    """settings: ``section.key`` to text, number, true or false, as Config.flat gives them."""
    parts = [HEAD.format(name=name)]
    for section, table in nested(settings, "the configuration").items():
        rows = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items()]
        parts.append("\n".join([f"[tool.flwr.app.config.{section}]", *rows]) + "\n")
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text("\n".join(parts), encoding="utf-8")
    (folder / "fstq_app.py").write_text(MODULE, encoding="utf-8")
