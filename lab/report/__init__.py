"""Records of runs in; tables, sentences and one web page out.

Open `records.py` first: `read_runs` reads every run below a folder, and `record_files.py` checks
the files. `comparisons.py` groups runs into configurations and compares models, `sentences.py`
describes the results, `markdown.py` writes tables, and `page.py` writes the web page (its scripts
and style are in web/).
"""

from lab.report.page import build_content, write_page
from lab.report.records import Record, read_runs

__all__ = [
    "Record",
    "build_content",
    "comparisons",
    "markdown",
    "read_runs",
    "records",
    "sentences",
    "write_page",
]
