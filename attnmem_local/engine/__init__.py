"""The binding to the patched llama.cpp, which the builder and the runtime both stand on."""
