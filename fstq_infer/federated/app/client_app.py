"""The ClientApp: everything it does is in the run's configuration, everything that is its own in the node's."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from flwr.clientapp import ClientApp

from fstq_infer.errors import OptionError
from fstq_infer.federated.app.config import from_flower
from fstq_infer.federated.app.site import Site, at_node, client_name
from fstq_infer.federated.client import evaluate_reply, train_reply
from fstq_infer.federated.records import Request
from fstq_infer.federated.tokens import TokenFolder

KEPT = 2  # sites of this process: a model each
_sites: OrderedDict[str, Site] = OrderedDict()
Call = Callable[[Any, Any], Any]


def site_of(context: Any) -> Site:
    """The site of a Context's configuration; the same one for all simulated clients of a run."""
    node = context.node_config
    key = json.dumps([context.run_config, node.get("fstq-model"), node.get("fstq-data")], sort_keys=True)
    if key not in _sites:
        while len(_sites) >= KEPT:
            _sites.popitem(last=False)
        _sites[key] = Site(at_node(from_flower(context.run_config), node))
    return _sites[key]


def configured(message: Any, context: Any, call_next: Call) -> Any:
    """A mod that runs those of the configuration, in their order."""
    call, training = call_next, message.metadata.message_type.partition(".")[0] == "train"
    for mod in reversed(site_of(context).mods(context, training)):
        call = _bound(mod, call)
    return call(message, context)


def _bound(mod: Any, call: Call) -> Call:
    return lambda message, context: mod(message, context, call)


def _make() -> Any:
    app = ClientApp()

    @app.train(mods=[configured])  # type: ignore[untyped-decorator]
    def train(message: Any, context: Any) -> Any:
        site = site_of(context)
        rows, _ = site.examples(context)
        request = Request.of(message.content)
        tokens = site.tokens(context, request)
        reply = train_reply(message, context, site.trainer(), rows, site.settings(), site.fisher, tokens=tokens)
        if tokens is not None:
            TokenFolder(site.memory(context)).save(client_name(context), tokens, request.run, request.round)
        return reply

    @app.evaluate(mods=[configured])  # type: ignore[untyped-decorator]
    def evaluate(message: Any, context: Any) -> Any:
        site = site_of(context)
        rows = site.examples(context)[1]
        if not rows:
            raise OptionError("this client holds nothing out. Raise [data] holdout, or set fraction_evaluate = 0.0")
        return evaluate_reply(message, site.trainer(), rows, site.config.train.batch)

    return app


app = _make()
