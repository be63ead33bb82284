"""The picture of the README: the first two queries of demo/gallery.png and its last lines, smaller.

make demo && .venv/bin/python docs/demo.py [demo]
"""

import sys
from pathlib import Path

from PIL import Image

from whence.report.gallery import gallery_size
from whence.report.page import FOOT, GAP

METHODS, QUERIES, WIDTH = 3, 2, 860

gallery = Image.open(Path(sys.argv[1] if len(sys.argv) > 1 else "demo") / "gallery.png").convert("RGB")
until = gallery_size(QUERIES, METHODS, 1)[1] - FOOT - GAP
foot = gallery.crop((0, gallery.height - FOOT, gallery.width, gallery.height))
picture = Image.new("RGB", (gallery.width, until + FOOT), "white")
picture.paste(gallery.crop((0, 0, gallery.width, until)))
picture.paste(foot, (0, until))
picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)
picture.quantize(128, dither=Image.Dither.NONE).save(Path(__file__).with_suffix(".png"), optimize=True)
