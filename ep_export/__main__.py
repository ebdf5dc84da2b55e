"""`python -m ep_export` is `ep-export`."""

from ep_export.cli import main

if __name__ == "__main__":  # a spawned worker process imports this file under another name
    main()
