"""How far a memory deviates from its prefix, measured in the llama.cpp runtime."""
