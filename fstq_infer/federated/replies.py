"""Which replies can be averaged together: checks of metrics, and the largest group that agrees. Knows no weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fstq_infer.errors import ReplyError

MOST = 2**53  # of a weight: sums of weighted values stay finite, and whole numbers exact
Signature = tuple[tuple[str, int | None], ...]


def metrics_of(content: Any, weight: str) -> Any:
    """The only MetricRecord of a reply. Raises ReplyError unless its ``weight`` is a number above 0, at most MOST."""
    records = list(content.metric_records.values())
    if len(records) != 1:
        raise ReplyError(f"the reply holds {len(records)} metric records, expected one with {weight!a}.")
    value = records[0].get(weight)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MOST:
        raise ReplyError(
            f"the reply's {weight!a} is {str(value)[:40]}, expected a finite number above 0, at most 2**53."
        )
    return records[0]


def signature(metrics: Any) -> Signature:
    """Names of metrics, with the lengths of lists: those of replies that are averaged must be the same."""
    return tuple(sorted((name, len(value) if isinstance(value, list) else None) for name, value in metrics.items()))


def most_common(signatures: Sequence[Signature]) -> Signature | None:
    """The signature of most replies, the first one where several are; None for no reply."""
    return Counter(signatures).most_common(1)[0][0] if signatures else None
