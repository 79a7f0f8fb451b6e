"""Turn a picture into samples, its pixels, and samples back into a picture.

    python examples/pixels.py read china.jpg data/china.npy
    python examples/pixels.py write data/china_recoloured.npy china.jpg china_recoloured.png

Where there is no such picture, `china.jpg` and `flower.jpg` are scikit-learn's.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image


def picture(name: str) -> np.ndarray:
    """Return the RGB values of a picture, (height, width, 3), in [0, 1]."""
    if not Path(name).exists() and name in ("china.jpg", "flower.jpg"):
        from sklearn.datasets import load_sample_image

        return load_sample_image(name) / 255
    with Image.open(name) as image:
        return np.asarray(image.convert("RGB")) / 255


def main() -> None:
    """Read or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(dest="way", required=True)
    read = ways.add_parser("read")
    read.add_argument("picture")
    read.add_argument("pixels", type=Path)
    write = ways.add_parser("write")
    write.add_argument("pixels", type=Path)
    write.add_argument("like", help="the picture whose pixels were mapped: it has the shape")
    write.add_argument("picture", type=Path)
    options = parser.parse_args()
    if options.way == "read":
        options.pixels.parent.mkdir(parents=True, exist_ok=True)
        np.save(options.pixels, picture(options.picture).reshape(-1, 3).astype(np.float32))
    else:
        colours = np.load(options.pixels).clip(0, 1).reshape(picture(options.like).shape)
        Image.fromarray((255 * colours).round().astype(np.uint8)).save(options.picture)


if __name__ == "__main__":
    main()
