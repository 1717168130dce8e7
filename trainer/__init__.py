"""What happens inside the training processes. Importing this touches no device and no heavy library."""

__version__ = "0.1.0"
