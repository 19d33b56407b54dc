"""The one exception of this package whose message is written for the person at the terminal."""


class DataError(ValueError):
    """A data set, its configuration or its sources are not usable; the message says which and what to do."""
