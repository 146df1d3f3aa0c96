"""``fstq`` and ``python -m fstq_infer``: Ctrl-C is quiet from the first moment on, also while modules are loaded."""

import sys


def main() -> None:
    """The command line's entry point."""
    try:
        from fstq_infer.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
