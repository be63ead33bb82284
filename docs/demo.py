"""The pictures of the README and of docs/how-sure.md: the page of the demo on a screen, on a phone, in the dark, printed.

make demo && .venv/bin/python docs/demo.py [demo]          needs playwright and Chromium, and pypdfium2 for the printed page
"""

import io
import shutil
import sys
from pathlib import Path

import pypdfium2
from PIL import Image
from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).parent
QUERY = "#query-1"


def picture(page: Page, width: int, height: int, top: int = 0, **scheme: str) -> Image.Image:
    """A part of the page as wide as a screen."""
    page.emulate_media(**scheme)
    page.set_viewport_size({"width": width, "height": top + height})
    page.evaluate("scrollTo(0, 0)")
    shot = page.screenshot(clip={"x": 0, "y": top, "width": width, "height": height})
    return Image.open(io.BytesIO(shot)).convert("RGB")


def save(image: Image.Image, width: int, path: Path) -> None:
    """Small: few colours, and no wider than a README shows it."""
    small = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    small.quantize(40, dither=Image.Dither.NONE).save(path, optimize=True)


def beside(pictures: list[Image.Image], height: int, gap: int = 24) -> Image.Image:
    """Pictures of one height in a row."""
    scaled = [
        each.resize((round(each.width * height / each.height), height), Image.Resampling.LANCZOS) for each in pictures
    ]
    row = Image.new("RGB", (sum(each.width + gap for each in scaled) - gap, height), "#b9bec4")
    left = 0
    for each in scaled:
        row.paste(each, (left, 0))
        left += each.width + gap
    return row


with sync_playwright() as play:
    browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    page = browser.new_page()
    page.goto((Path(sys.argv[1] if len(sys.argv) > 1 else "demo") / "report.html").resolve().as_uri())
    page.set_viewport_size({"width": 1300, "height": 900})
    until = int(page.locator(".said").first.bounding_box()["height"]) + 160
    start = int(page.locator(QUERY).bounding_box()["y"])
    end = int(page.locator(f"{QUERY} .method").nth(0).locator(".strip").first.bounding_box()["y"]) + 190
    first, query = picture(page, 1300, until), picture(page, 1300, end - start, start)
    both = Image.new("RGB", (1300, first.height + query.height))
    both.paste(first, (0, 0))
    both.paste(query, (0, first.height))
    save(both, 920, DOCS / "demo.png")
    phone, dark = picture(page, 390, 1000), picture(page, 1300, 1000, color_scheme="dark")
    page.emulate_media(color_scheme="light")
    printed = pypdfium2.PdfDocument(page.pdf(prefer_css_page_size=True, print_background=True))
    save(beside([phone, dark, printed[0].render(scale=2).to_pil()], 1000), 1000, DOCS / "report.png")
    browser.close()
