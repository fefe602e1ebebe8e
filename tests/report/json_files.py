"""Changes to JSON records, shared by the tests of the report."""

import json


def change_json(path, change):
    """Applies `change` to the content of a JSON file."""
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
