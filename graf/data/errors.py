"""The one exception of the data room."""

from graf.base.errors import UserError


class DataError(UserError):
    """A data set cannot be used as it is; the message names file or key, what was found and expected, the next step."""
