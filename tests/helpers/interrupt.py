"""Ctrl-C at a chosen moment."""

import sys


class Interrupt:
    """Raises KeyboardInterrupt at the nth line of what changes a context."""

    files = ("attachments.py", "native.py", "runtime.py")

    def __init__(self, n):
        self.n = n

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, *error):
        sys.settrace(None)
        return error[0] is KeyboardInterrupt

    @staticmethod
    def now(*args):
        raise KeyboardInterrupt

    def trace(self, frame, event, arg):
        if (
            not frame.f_code.co_filename.endswith(self.files) or frame.f_code.co_name == "free"
        ):  # Python ignores errors in finalizers
            return None
        if event == "line":
            self.n -= 1
            if self.n == 0:
                raise KeyboardInterrupt
        return self.trace
