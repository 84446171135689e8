"""Classifies images from files with an exported network: python -m bqat_jax.export FILE --images a.png b.jpg folder."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bqat_jax.export.loading import Exported, load

# As in evaluation, images of another size are resized to 256/224 of the crop.
MARGIN = 256 / 224
ENDINGS = ('.png', '.jpg', '.jpeg')


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the class of every image and its probability."""
    parser = argparse.ArgumentParser(prog='python -m bqat_jax.export', description=__doc__)
    parser.add_argument('file', help='an exported network: .safetensors, .stablehlo or .onnx')
    parser.add_argument('--images', required=True, nargs='+', help='PNG or JPEG files, or folders that hold them')
    given = parser.parse_args(arguments)
    names = [name for text in given.images for name in text.split(',') if name]
    try:
        network = load(given.file)
        for path in find_images(names):
            number, share = classify(network, path)
            print(f'{path}: class {number} ({share:.1%})')
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f'Error: {error}')


def find_images(names: Sequence[str]) -> list[Path]:
    """Returns the named files and the images in the named folders.

    Raises:
        FileNotFoundError: for a missing file, or a folder without images.
    """
    paths = []
    for name in names:
        path = Path(name)
        own = sorted(x for x in path.iterdir() if x.suffix.lower() in ENDINGS) if path.is_dir() else [path]
        if not own or not own[0].is_file():
            raise FileNotFoundError(f'--images: there is no PNG or JPEG file at {name!r}.')
        paths += own
    return paths


def classify(network: Exported, path: Path) -> tuple[int, float]:
    """Returns the class of an image and its softmax probability.

    Raises:
        ValueError: if the network does not take images, or does not classify them.
    """
    image = read_image(network, path)
    logits = np.asarray(network(np.repeat(image[None], network.batch or 1, axis=0)), np.float64)
    if logits.ndim != 2:
        raise ValueError(
            f'The network returns outputs of shape {logits.shape[1:]} for an image, not one logit a class.'
        )
    exponents = np.exp(logits[0] - logits[0].max())
    return int(logits[0].argmax()), float(exponents.max() / exponents.sum())


def read_image(network: Exported, path: Path) -> np.ndarray:
    """Returns an image for a network, uint8 (height, width, channels); images of another size are cropped."""
    from PIL import Image

    shape, dtype = getattr(network.inputs, 'shape', ()), getattr(network.inputs, 'dtype', None)
    if len(shape) != 3 or shape[-1] not in (1, 3) or dtype != np.uint8:
        raise ValueError(f'The network takes {network.inputs}, not images of 8 bits.')
    height, width, channels = shape
    try:
        with Image.open(path) as opened:
            if opened.mode.startswith(('I', 'F')):  # Pillow would clip values above 255
                raise ValueError(f'{path} has more than 8 bits a pixel. Convert it to 8 bits.')
            image = opened.convert('RGB' if channels == 3 else 'L')
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f'{path} is not an image that Pillow can read, or is damaged: {error}.') from error
    if image.size != (width, height):
        scale = min(image.size[0] / width, image.size[1] / height) / MARGIN
        box = [(side - scale * cut) / 2 for side, cut in zip(image.size, (width, height), strict=True)]
        edges = (*box, box[0] + scale * width, box[1] + scale * height)
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=edges)
    return np.asarray(image, np.uint8).reshape(height, width, channels)


if __name__ == '__main__':
    main()
