"""``perturbzoo report``: the folder of a run or a benchmark in, one HTML page out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    """Write the page and say where it is."""
    parser = argparse.ArgumentParser(
        prog="perturbzoo report",
        description="Write what 'perturbzoo test' or 'perturbzoo benchmark' found as one HTML page that needs no network.",
    )
    parser.add_argument("run_dir", help="trainer.default_root_dir of a test, or the folder of a benchmark")
    parser.add_argument("--output", help="page to write (default: report.html in that folder)")
    options = parser.parse_args(arguments)

    from perturbzoo.data.reading import expand_path
    from perturbzoo.report import write_report

    page = write_report(expand_path(options.run_dir), options.output and expand_path(options.output))
    print(f"report: {page} ({page.stat().st_size / 1e6:.1f} MB)")
