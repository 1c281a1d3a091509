"""Query sources, one file each: what the live text after a prefix may look like.

A source gives windows, token sequences that each follow the prefix on their own.
"""
