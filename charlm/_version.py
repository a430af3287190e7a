"""The version, which pyproject.toml and `charlm.__version__` read."""

__version__ = "0.1.0"
