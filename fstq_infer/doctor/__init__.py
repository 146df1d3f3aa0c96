"""``fstq doctor``: what would make inference fail or slow on this machine, and what to do about it."""
