"""`python -m ep_export` is `ep-export`."""

import os
import sys

__all__ = ["main"]


def main() -> None:
    """Entry point of the console script. Ctrl-C while the command line is being loaded ends in a line too."""
    try:
        from ep_export.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; nothing was begun\n")
        sys.exit(130)


if __name__ == "__main__":  # a spawned worker process imports this file under another name
    # `-m` puts the working directory first, where a folder may be called as a package is that others look for
    # (triton). The package itself is found already.
    if sys.path[0] == os.getcwd():  # noqa: PTH109 - compared as text
        del sys.path[0]
    main()
