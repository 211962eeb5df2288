"""Reports: runs, their evaluation and figures as one self-contained HTML page (extra `report`)."""

from .figure import Cell, Figure, cell_id, house_style, to_svg
from .page import write_report

__all__ = ["Cell", "Figure", "cell_id", "house_style", "to_svg", "write_report"]
