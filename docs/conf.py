"""Sphinx configuration; `make docs` builds with it."""

import fstq_infer

project = "fstq-infer"
author = "the fstq-infer authors"
copyright = "2026, the fstq-infer authors"
version = release = fstq_infer.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinxcontrib.typer"]

html_theme = "furo"
html_title = f"fstq-infer {release}"
html_show_sourcelink = False

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

# What the packages import when they are used; only signatures and docstrings are read here.
autodoc_mock_imports = ["torch", "transformers", "peft", "safetensors", "flwr", "onnx", "onnx_ir", "onnxruntime"]
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_class_signature = "separated"
autodoc_preserve_defaults = True
add_module_names = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 90

# References to our own names must lead somewhere; those to other projects are not resolved offline.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!fstq_).*")]
