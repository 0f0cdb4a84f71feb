"""A report as one self-contained HTML page for people; see `page.render_page`.

sections.py  what the page says, section by section
charts.py    its plots, as inline SVG; matplotlib is imported there and nowhere else
markup.py    escaping, tags, tables, numbers
page.css     how it looks, in light and dark
"""

from pipeline.acceptance.page.page import render_page

__all__ = ["render_page"]
