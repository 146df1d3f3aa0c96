"""Which client has which rows: partitioners of flwr-datasets, asked for indices only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fstq_infer.errors import DataError, suggestion
from fstq_infer.federated.data.rows import Row
from fstq_infer.lazy import load

WAYS = ("iid", "natural", "dirichlet")
ALPHA = 0.1
LEAST = 2  # rows of a client
EXTRA, NEEDED = "federated", "dividing rows among clients"


def partition(rows: Sequence[Row], clients: int, how: str = "iid", seed: int = 0) -> list[list[int]]:
    """Ascending indices of each client's rows; every row belongs to one client, and the same seed divides alike.

    how: ``iid``; ``natural``, by group: whole groups where there are as many as clients or more, else the clients
    share groups, each client's rows being of one group; ``dirichlet`` or ``dirichlet:ALPHA``, shares of each group
    drawn from a Dirichlet law (Yurochkin et al., arXiv 1905.12022), 0.1 unless ALPHA is given. Raises DataError.
    """
    way, _, given = how.partition(":")
    if way not in WAYS:
        raise DataError(f"there is no way {how!a} to divide rows; {suggestion(way, WAYS)}")
    if not 1 <= clients <= len(rows):
        raise DataError(f"{len(rows)} rows for {clients} clients, expected 1 client or more and a row for each")
    if way == "iid":
        return _parts(_iid(len(rows), clients, seed), clients)
    groups = [row.group for row in rows]
    if way == "natural":
        return _natural(groups, clients, seed)
    return _parts(_dirichlet(groups, clients, _alpha(given), seed), clients)


def _alpha(given: str) -> float:
    try:
        alpha = float(given) if given else ALPHA
    except ValueError:
        alpha = 0.0
    if not 0 < alpha < float("inf"):
        raise DataError(f"the Dirichlet law's parameter is {given!a}, expected a number above 0: 'dirichlet:0.1'")
    return alpha


def _iid(total: int, clients: int, seed: int) -> Any:
    made = load("flwr_datasets.partitioner:IidPartitioner", NEEDED, EXTRA)(num_partitions=clients)
    order = np.random.default_rng(seed).permutation(total)
    made.dataset = _table({"index": order.tolist()})
    return made


def _dirichlet(groups: Sequence[str], clients: int, alpha: float, seed: int) -> Any:
    if len(groups) < LEAST * clients:
        raise DataError(f"{len(groups)} rows for {clients} clients, expected at least {LEAST} for each")
    kind = load("flwr_datasets.partitioner:DirichletPartitioner", NEEDED, EXTRA)
    made = kind(num_partitions=clients, partition_by="group", alpha=alpha, min_partition_size=0, seed=seed)
    made.dataset = _table({"index": list(range(len(groups))), "group": list(groups)})
    return made


def _natural(groups: Sequence[str], clients: int, seed: int) -> list[list[int]]:
    """Groups by size, largest first, go to the client with the fewest rows; with fewer groups than clients, the
    largest shares are cut in two until there is one for each client."""
    kind = load("flwr_datasets.partitioner:NaturalIdPartitioner", NEEDED, EXTRA)(partition_by="group")
    kind.dataset = _table({"index": list(range(len(groups))), "group": list(groups)})
    rng = np.random.default_rng(seed)
    shares = [rng.permutation(part) for part in _parts(kind, kind.num_partitions)]
    while len(shares) < clients:
        shares.sort(key=len)
        largest = shares.pop()
        shares += [largest[::2], largest[1::2]]
    found: list[list[int]] = [[] for _ in range(clients)]
    for share in sorted(shares, key=len, reverse=True):
        min(found, key=len).extend(share.tolist())
    return [sorted(part) for part in found]


def _table(columns: dict[str, Any]) -> Any:
    return load("datasets:Dataset", NEEDED, EXTRA).from_dict(columns)


def _parts(partitioner: Any, clients: int) -> list[list[int]]:
    """Indices by client; an empty client takes a row of the largest one: a Dirichlet law may leave some without."""
    found = [sorted(partitioner.load_partition(client)["index"]) for client in range(clients)]
    for part in found:
        if not part:
            part.append(max(found, key=len).pop())
    return found
