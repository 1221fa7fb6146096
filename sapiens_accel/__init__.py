"""Fine-tune Sapiens and Sapiens2 for 2-D human pose on the GPUs people have."""

__version__ = "0.1.0"
