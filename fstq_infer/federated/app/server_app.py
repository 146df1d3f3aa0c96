"""The ServerApp: rounds on the Grid that Flower gives it, configured by ``[tool.flwr.app.config]``."""

from __future__ import annotations

import logging
from typing import Any

from flwr.serverapp import ServerApp

from fstq_infer.federated.app.config import from_flower
from fstq_infer.federated.app.server import serve
from fstq_infer.federated.app.sinks import Figures
from fstq_infer.federated.app.site import Site

log = logging.getLogger(__name__)
app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Any, context: Any) -> None:
    """Run all rounds; [server] resume = true goes on after the last one that was finished."""
    config = from_flower(context.run_config)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    serve(Site(config), grid, progress=_log)


def _log(round: int, figures: Figures) -> None:
    log.info("round %d: %s", round, ", ".join(f"{name} {value}" for name, value in figures.items()))
