"""What is wrong with data."""

from repirl.config import ConfigError


class DataError(ConfigError):
    """A file or row that cannot be used as the configuration says."""
