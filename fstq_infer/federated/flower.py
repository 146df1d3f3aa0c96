"""The names of Flower that this package uses, imported in one place. Raises MissingExtraError without Flower."""

from __future__ import annotations

from fstq_infer.errors import MissingExtraError

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
    from flwr.common.constant import ErrorCode
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import Result, Strategy
except ModuleNotFoundError as error:
    raise MissingExtraError("federated fine-tuning", error.name or "flwr", "federated") from error

__all__ = [
    "Array",
    "ArrayRecord",
    "ConfigRecord",
    "Context",
    "Error",
    "ErrorCode",
    "Grid",
    "Message",
    "MetricRecord",
    "RecordDict",
    "Result",
    "Strategy",
]
