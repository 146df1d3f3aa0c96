"""LoRA adapters beside a model in an engine: their files, how they fit a graph, where a bundle keeps them."""
