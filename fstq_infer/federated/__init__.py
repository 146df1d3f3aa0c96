"""Federated fine-tuning: compressed messages of LoRA deltas (docs/wire-format.md).

Needs numpy, and constriction for the entropy coder.

>>> from fstq_infer.federated.compress import Compressor
"""
