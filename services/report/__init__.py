"""report.html of a run directory: `build_report(run_dir)`."""

from services.report.build import build_report

__all__ = ["build_report"]
