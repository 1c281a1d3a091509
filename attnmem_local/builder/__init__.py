"""From a prefix to a memory. Needs torch and transformers."""
