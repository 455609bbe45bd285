"""Tables of results: cells and published values, numbers of finished runs; Markdown, CSV, LaTeX and pictures."""
