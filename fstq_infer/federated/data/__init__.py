"""Rows for federated fine-tuning: readers of question-answering data sets, and ways to divide rows among clients.

>>> rows = read("medquad", "medquad.jsonl.gz")
>>> clients = partition(rows, 20, "dirichlet:0.1", seed=0)
"""

from __future__ import annotations

from fstq_infer.federated.data.divide import WAYS, partition
from fstq_infer.federated.data.readers import KINDS, read
from fstq_infer.federated.data.rows import Row, Rows

__all__ = ["KINDS", "WAYS", "Row", "Rows", "partition", "read"]
