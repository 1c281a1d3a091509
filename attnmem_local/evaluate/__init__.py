"""What a memory loses against the prefix that it stands for, measured in the llama.cpp runtime."""
