"""The version of this package and of the program that comes with it."""

__version__ = "0.1.0"
