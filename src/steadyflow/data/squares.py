"""Images of any size to squares of one size, each as one of the works did it whose checkpoints and numbers are used."""

from collections.abc import Sequence

from PIL import Image

KERNELS = ("bicubic", "bilinear", "lanczos", "box", "nearest")
Crop = Sequence[int] | str | None


def check_square(size: int, resize: str | None, crop: Crop) -> None:
    """Raises ValueError for settings that `square` does not know."""
    if size < 1 or resize not in (None, "adm", *KERNELS):
        raise ValueError(f"need size >= 1 and resize adm, {', '.join(KERNELS)} or null; got {size} and {resize}")
    if not (crop is None or crop == "square" or (len(crop) == 4 and all(isinstance(n, int) for n in crop))):
        raise ValueError(f"crop must be null, square, or [left, top, width, height] in pixels; got {crop}")


def square(image: Image.Image, size: int, resize: str | None = "bicubic", crop: Crop = None) -> Image.Image:
    """The image as size x size pixels. With a kernel K, antialiased when shrinking, as torchvision's Resize and
    CenterCrop:

        K resize to (floor(size w / min(w, h)), floor(size h / min(w, h))), centre cut at round((side - size) / 2)

    `adm` is the arithmetic of Dhariwal & Nichol 2021 (guided-diffusion, image_datasets.py), of DDRM and EDM2 on
    ImageNet too:

        while min(w, h) >= 2 size:  box resize to (floor(w / 2), floor(h / 2))
        bicubic resize to (round(size w / min(w, h)), round(size h / min(w, h))), centre cut at floor((side - size) / 2)

    Args:
        image: of any size.
        size: of the side, in pixels.
        resize: bicubic, bilinear, lanczos, box, nearest; adm; None cuts the centre out of the image as it is.
        crop: cut out first: `square`, the centred square of the shorter side, or (left, top, width, height).

    Raises:
        ValueError: an image smaller than what is to be cut out of it.
    """
    if crop == "square":
        image = _centre(image, min(image.size))
    elif crop is not None:
        left, top, width, height = (int(n) for n in crop)
        if left < 0 or top < 0 or left + width > image.width or top + height > image.height:
            raise ValueError(f"is {image.width}x{image.height}, and crop {[left, top, width, height]} leaves it")
        image = image.crop((left, top, left + width, top + height))
    if resize == "adm":
        return _adm(image, size)
    if resize is not None:
        width, height = (int(size * side / min(image.size)) for side in image.size)
        image = image.resize((width, height), Image.Resampling[resize.upper()])
    elif min(image.size) < size:
        raise ValueError(f"is {image.width}x{image.height}, smaller than {size}; set dataset.resize")
    return _centre(image, size)


def _adm(image: Image.Image, size: int) -> Image.Image:
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _centre(image: Image.Image, size: int) -> Image.Image:
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))
