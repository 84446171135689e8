"""One self-contained HTML page of a run or of a sweep: numbers, figures as SVG, images as PNG."""
