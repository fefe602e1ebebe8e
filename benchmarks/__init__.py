"""Speed beside the field's other ViTs; from the root: `python -m benchmarks`."""
