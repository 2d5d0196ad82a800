"""The report of a run or of a benchmark: one HTML page that needs nothing beside itself.

Called by ``perturbzoo report``, by ``perturbzoo benchmark`` and by notebooks. Reads the folders that ``test`` and ``benchmark``
write; knows no model and no data module.
"""

from __future__ import annotations

from perturbzoo.report.page import write_report

__all__ = ["write_report"]
