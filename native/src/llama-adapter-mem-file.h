#pragma once

// the keys and tensors of a memory file that is not trusted

#include "llama-impl.h"

#include "ggml-cpp.h"
#include "gguf.h"

#include <cstring>
#include <initializer_list>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

static constexpr size_t MEM_ALIGNMENT = 64;    // of the data: a cache line
static constexpr float  MEM_MAX_ABS   = 1e15f; // larger numbers could overflow in a product

// reason: "<reason>: <explanation>"
[[noreturn]] void mem_refuse(const std::string & reason);

template <typename T>
static inline T mem_load(const uint8_t * data) {
    T x;
    memcpy(&x, data, sizeof(x));
    return x;
}

// whether n numbers are finite and at most MEM_MAX_ABS; allow_empty: F32 numbers may be -INFINITY
bool mem_is_finite(ggml_type type, const void * data, int64_t n, bool allow_empty);

// the keys and tensors of a GGUF file, by the rules of attnmem_local's gguf_file.py, in the same order
// gguf_init_from_buffer gives names and strings as C strings, whose part after a NUL would be hidden from the checks
struct mem_file {
    struct value {
        gguf_type       type;
        gguf_type       item; // of an array
        uint64_t        n;    // items of an array, or bytes of a string
        const uint8_t * data;
    };
    std::map<std::string, value> keys;

    struct entry {
        ggml_tensor * tensor;
        const void  * data;
    };
    std::unordered_map<std::string, entry> tensors;

    ggml_context_ptr meta; // of the tensors, which have no data in it

    // reads the keys; read_tensors, the infos of at most limit tensors
    // both throw std::runtime_error("<reason>: <explanation>"), as all functions below
    mem_file(const void * data, size_t size);

    void read_tensors(uint64_t limit);

    // the value of a key that must be there
    const value & find(const std::string & key, gguf_type type) const;

    uint32_t             u32    (const std::string & key) const;
    float                f32    (const std::string & key) const; // is finite
    std::string          str    (const std::string & key) const;
    std::vector<int32_t> arr_i32(const std::string & key) const;

    static std::string to_string(const value & v);

    // a string, u32 or f32 as text: these are all the scalars of the format
    static std::string to_text(const value & v);

    // nullptr if there is none
    ggml_tensor * tensor(const std::string & name) const;

    // a tensor that must be there, with this shape; a dimension of -1 may be anything
    ggml_tensor * tensor(const std::string & name, std::initializer_list<ggml_type> types, int64_t ne0, int64_t ne1 = 1) const;

    const void    * data    (const ggml_tensor * t) const;
    const int32_t * data_i32(const ggml_tensor * t) const;

private:
    struct info;

    const uint8_t * content;
    size_t          size;
    size_t          pos; // of the byte that is read next
    uint64_t        n_tensors;

    // the next n bytes
    const uint8_t * take(uint64_t n);

    template <typename T> T number() { return mem_load<T>(take(sizeof(T))); }

    // what: how an error names it
    std::string text(const std::string & what);

    value read_value(const std::string & key);
    info  read_info();

    // bytes from the beginning of a tensor to the next one
    size_t add_tensor(const info & t, size_t begin, uint64_t expected);
};
