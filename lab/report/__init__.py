"""Run records in; tables, sentences and one web page out.

Open `records.py` first: `read_runs` reads and checks every run below a folder. `comparisons.py`
groups runs into configurations and tests their differences, `sentences.py` puts the results into
words, and `markdown.py` and `page.py` write the tables and the page.
"""

from lab.report.content import content as build_content
from lab.report.page import write_page
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
