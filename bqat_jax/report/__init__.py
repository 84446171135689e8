"""A self-contained HTML page of a run or a sweep: numbers, SVG figures, PNG images."""
