"""`python -m aligntune`: the same as the command `aligntune`."""

from __future__ import annotations

from aligntune.cli import main

if __name__ == "__main__":
    main()
