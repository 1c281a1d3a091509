"""Text on its way to tokens: the prefix that a memory is built from, and the live prompt that follows it."""
