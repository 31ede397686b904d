"""dyncore.report: documents of measurements as one HTML file that needs no network.

`python -m dyncore report results.json...` on the command line, `write_report(paths, out)` in code. Floor 5. Needs
matplotlib (the extra dyncore[bench]).
"""

from dyncore.report.documents import Document, read_document
from dyncore.report.page import report_page, write_report

__all__ = ["Document", "read_document", "report_page", "write_report"]
