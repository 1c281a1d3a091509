#pragma once

#include <string>

struct llama_model;

// fingerprints of a model that survive quantization, as 16 hexadecimal digits

// of the norm tensors, which every quantization keeps in F32
std::string mem_fingerprint_norms(const llama_model & model);

// of the texts of the tokens
std::string mem_fingerprint_vocab(const llama_model & model);
