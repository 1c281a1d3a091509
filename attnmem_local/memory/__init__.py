"""What a memory is, and its file. Needs numpy and gguf only."""
