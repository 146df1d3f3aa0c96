"""``python -m fstq_infer`` is the command ``fstq``."""

from fstq_infer.cli import main

main()
