"""The one exception of the capture room."""

from graf.base.errors import UserError


class CaptureError(UserError):
    """A video or photographs cannot be used as they are; the message names the file or option and the next step."""
