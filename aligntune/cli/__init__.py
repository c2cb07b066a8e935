"""The command line: `aligntune`, and `python -m aligntune`.

Exit codes: 0 done; 1 an unforeseen error, or a failed check of `doctor`; 2 a wrong command line or configuration;
3 data; 4 the backend cannot run here; 5 the backend does not run this algorithm; 6 a checkpoint; 7 a loss, gradient or
reward that is not a number; 8 a reward function that failed; 9 an assertion of `compare` that does not hold; 10 arms
that cannot be compared; 130 Ctrl-C.
"""

from __future__ import annotations


def main() -> None:
    """Run the command in `sys.argv`; exits the process."""
    from aligntune.cli.app import run

    run()
