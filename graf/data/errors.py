"""The one exception of the data room."""


class DataError(ValueError):
    """A data set cannot be used as it is; the message names file or key, what was found and expected, the next step."""
