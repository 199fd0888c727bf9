"""Errors about data, with a sentence for the person whose data it is."""


class DataError(ValueError):
    """Data that cannot be used; says what was found and what was expected."""


class Undivided(DataError):
    """Data that is not divided into training and validation images."""


class ImageError(DataError):
    """An image that cannot be decoded: not an image, damaged, too large, or of the wrong number of bands."""
