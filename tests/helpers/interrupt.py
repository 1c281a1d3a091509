"""Simulating Ctrl-C at a chosen line."""

import sys


class Interrupt:
    """A context manager that raises KeyboardInterrupt at the nth executed line of the code that changes a context."""

    files = ("runtime/attachments.py", "engine/native.py", "runtime/llama.py")

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
        if not frame.f_code.co_filename.endswith(self.files):
            return None
        if frame.f_code.co_name == "free":  # called in finalizers, in which Python ignores exceptions
            return None
        if event == "line":
            self.n -= 1
            if self.n == 0:
                raise KeyboardInterrupt
        return self.trace
