"""fstq-infer."""
