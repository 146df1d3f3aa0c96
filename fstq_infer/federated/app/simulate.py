"""A federation on one machine: all clients in this process, or Flower's simulation with Ray."""

from __future__ import annotations

import logging
from typing import Any

from fstq_infer.errors import OptionError
from fstq_infer.federated.app.config import Config
from fstq_infer.federated.app.server import Progress, serve
from fstq_infer.federated.app.site import Site
from fstq_infer.federated.flower import Context, RecordDict
from fstq_infer.federated.local import LocalGrid
from fstq_infer.lazy import load

log = logging.getLogger(__name__)


def simulate(config: Config, resume: bool = False, progress: Progress | None = None) -> Any:
    """Run [simulation] clients and return Flower's Result. Raises OptionError for data that cannot be read."""
    from fstq_infer.federated.app import client_app

    settings, clients = config.flat(), config.simulation.clients
    site = client_app.site_of(_context(settings, 0, clients))  # the clients' own: one model in memory
    check_data(site, clients)
    site.mods(_context(settings, 0, clients))  # what is wrong with them is said before the first round
    if config.simulation.grid == "ray":
        return _with_ray(site, resume, progress)
    return serve(site, LocalGrid(client_app.app, clients, settings), resume, progress)


def check_data(site: Site, clients: int) -> None:
    """Raises OptionError or DataError where the data cannot be read, or no client has any; logs how many have none."""
    settings, empty, first = site.config.flat(), 0, ""
    for index in range(clients if site.config.data.partition != "own" else 1):
        try:
            site.examples(_context(settings, index, clients))
        except OptionError as error:
            if "has no row of data" not in str(error):
                raise
            empty, first = empty + 1, first or str(error)
    if empty == clients:
        raise OptionError(first)
    if empty:
        log.warning("%d of %d clients have no data: they answer with an error", empty, clients)


def _context(settings: dict[str, Any], index: int, clients: int) -> Any:
    return Context(1, index, {"partition-id": index, "num-partitions": clients}, RecordDict(), settings)


def _with_ray(site: Site, resume: bool, progress: Progress | None) -> Any:
    load("ray:init", "[simulation] grid = 'ray'", "simulation")
    run = load("flwr.simulation:run_simulation", "[simulation] grid = 'ray'", "simulation")
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

    settings = site.config.flat()
    server, results = ServerApp(), list[Any]()

    @server.main()  # type: ignore[untyped-decorator]
    def main(grid: Any, context: Any) -> None:
        results.append(serve(site, grid, resume, progress))

    def client(message: Any, context: Any) -> Any:
        from fstq_infer.federated.app import client_app

        mine = Context(context.run_id, context.node_id, context.node_config, context.state, settings)
        return client_app.app(message, mine)

    app = ClientApp()
    app.train()(client)
    app.evaluate()(client)
    run(server, app, site.config.simulation.clients,
        backend_config={"client_resources": {"num_cpus": site.config.simulation.cpus, "num_gpus": 0.0}})  # fmt: skip
    if not results:
        raise OptionError("the simulation ended without a result. The log above says why.")
    return results[0]
