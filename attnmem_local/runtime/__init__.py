"""From a memory to attention: memories attached to llama.cpp contexts."""
