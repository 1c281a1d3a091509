"""From memory to attention: attaching memories to llama.cpp contexts, and answering with them."""
