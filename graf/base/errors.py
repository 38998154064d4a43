"""The one kind of error that is meant for the person at the keyboard."""

from __future__ import annotations


class UserError(Exception):
    """Something that a person can put right: the message is one text that names what was found and what to do.

    Programs print it as it is. Every other exception is a defect of this program, and its traceback is kept.
    """
