"""The one place where the version stands: pyproject.toml and `charlm.__version__` both read it."""

__version__ = "0.1.0"
