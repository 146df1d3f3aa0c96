"""A whole federation from one configuration: ClientApp, ServerApp, and ``fstq fed`` around them.

>>> from fstq_infer.federated.app.config import load
>>> config = load("federation.toml")
"""
