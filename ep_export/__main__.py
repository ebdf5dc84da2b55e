"""`python -m ep_export` is `ep-export`."""

from ep_export.cli import main

main()
