"""From which size on does `whence clean` find copies that were saved anew as JPEG?

    python benchmarks/clean_jpeg.py        half a minute of one core

100 random cuts of scikit-learn's two colour photos, 64 px or more wide and brought to each side, and 100 drawings of one
disc of a strong colour on a pale ground. Each set lies there twice, as it is and as a JPEG that Pillow writes (colours at
half the resolution). Found: the nearest image of the JPEG is its original, with a cosine of .99 by pixels.
"""

import colorsys
import io

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images

from _record import SMOKE, record
from whence.data.images import tensor_images
from whence.data.pixels import to_x0
from whence.evaluation.curation import Curation, neighbourhood

COUNT, SIDES, QUALITIES = 100, (8, 16, 32, 64, 128), (75, 85, 95)
if SMOKE:
    COUNT, SIDES, QUALITIES = 6, (8, 32), (75,)


def photo_cuts(side):
    rng, photos, wide = np.random.default_rng(0), load_sample_images().images, max(side, 64)
    found = []
    for i in range(COUNT):
        photo = photos[i % len(photos)]
        y, x = (rng.integers(0, edge - wide) for edge in photo.shape[:2])
        cut = Image.fromarray(photo[y : y + wide, x : x + wide])
        found.append(np.asarray(cut.resize((side, side), Image.Resampling.BOX)))
    return found


def drawings(side):
    rng = np.random.default_rng(0)
    found = []
    for _ in range(COUNT):
        hue = rng.random()
        inside, outside = (
            tuple(int(255 * part) for part in colorsys.hsv_to_rgb(*of))
            for of in ((hue, 0.9, 0.9), (hue + 0.5, 0.3, 0.9))
        )
        picture = Image.new("RGB", (side, side), outside)
        low, high = rng.uniform(0, side / 3, 2), rng.uniform(2 * side / 3, side - 1, 2)
        ImageDraw.Draw(picture).ellipse((*low, *high), fill=inside)
        found.append(np.asarray(picture))
    return found


def as_jpeg(pixels, quality):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", quality=quality)
    return np.asarray(Image.open(buffer))


def share_found(some, quality):
    both = np.stack([*some, *(as_jpeg(each, quality) for each in some)]).transpose(0, 3, 1, 2)
    images = tensor_images(to_x0(both))
    found = neighbourhood(images)
    nearest, similarity = found.nearest[len(some) :, 0], found.similarity[len(some) :, 0]
    return float(((nearest == np.arange(len(some))) & (similarity >= Curation.near)).mean())


def main():
    result = {
        made.__name__: {side: {quality: share_found(made(side), quality) for quality in QUALITIES} for side in SIDES}
        for made in (photo_cuts, drawings)
    }
    record("clean_jpeg", {"question": __doc__.split("\n")[0], "images": COUNT, "found, by side and quality": result})


if __name__ == "__main__":
    main()
