"""From result rows to one self-contained HTML file."""
