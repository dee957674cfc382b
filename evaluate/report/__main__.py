"""python -m evaluate.report: see `write.py`."""

from __future__ import annotations

if __name__ == "__main__":
    from pipeline.base import startup  # before what takes time to import

    startup.begin()

from evaluate.report.write import cli
from pipeline.base.cli import main

if __name__ == "__main__":
    main(cli, "evaluate.report")
