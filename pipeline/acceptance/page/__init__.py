"""Reports as self-contained HTML pages for people.

document.py     a page as plain values, and what draws it: page.html.j2 and page.css
report_page.py  acceptance's report as such a page; measured.py has its timed parts
charts.py       plots as inline SVG; matplotlib is imported there and nowhere else
"""

from pipeline.acceptance.page.report_page import About, Signing, render_page

__all__ = ["About", "Signing", "render_page"]
