#include "llama-adapter-mem-file.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <stdexcept>

static constexpr uint32_t MEM_MAX_KEYS = 1 << 16;

void mem_refuse(const std::string & reason) {
    throw std::runtime_error(reason);
}

// no branches, so that the loops are vectorized: they see every number of the file
bool mem_is_finite(ggml_type type, const void * data, int64_t n, bool allow_empty) {
    int bad = 0;
    switch (type) {
        case GGML_TYPE_F32: {
            const float * x = (const float *) data;
            for (int64_t i = 0; i < n; i++) {
                bad |= !(std::fabs(x[i]) <= MEM_MAX_ABS) & !(allow_empty & (x[i] == -INFINITY));
            }
        } break;
        case GGML_TYPE_F16: {
            const ggml_fp16_t * x = (const ggml_fp16_t *) data;
            for (int64_t i = 0; i < n; i++) {
                bad |= (x[i] & 0x7c00) == 0x7c00;
            }
        } break;
        case GGML_TYPE_Q8_0: {
            // the F16 scale at the beginning of each block
            const uint8_t * x = (const uint8_t *) data;
            for (int64_t i = 0; i < n/ggml_blck_size(type); i++) {
                bad |= (mem_load<uint16_t>(x + i*ggml_type_size(type)) & 0x7c00) == 0x7c00;
            }
        } break;
        default:
            GGML_ABORT("fatal error");
    }
    return !bad;
}

static bool mem_is_utf8(const uint8_t * p, size_t n) {
    for (size_t i = 0; i < n;) {
        const int n_more =
            p[i] <= 0x7f                 ?  0 :
            p[i] >= 0xc2 && p[i] <= 0xdf ?  1 :
            p[i] >= 0xe0 && p[i] <= 0xef ?  2 :
            p[i] >= 0xf0 && p[i] <= 0xf4 ?  3 : -1;
        if (n_more < 0 || n - i <= (size_t) n_more) {
            return false;
        }
        for (int j = 1; j <= n_more; j++) {
            // no more bytes than needed, no surrogates, nothing beyond U+10FFFF
            const uint8_t min = j > 1 ? 0x80 : p[i] == 0xe0 ? 0xa0 : p[i] == 0xf0 ? 0x90 : 0x80;
            const uint8_t max = j > 1 ? 0xbf : p[i] == 0xed ? 0x9f : p[i] == 0xf4 ? 0x8f : 0xbf;
            if (p[i + j] < min || p[i + j] > max) {
                return false;
            }
        }
        i += 1 + n_more;
    }
    return true;
}

// bytes, 0 for a type that is no scalar
static size_t mem_scalar_size(uint32_t type) {
    switch (type) {
        case GGUF_TYPE_UINT8:   case GGUF_TYPE_INT8:  case GGUF_TYPE_BOOL:    return 1;
        case GGUF_TYPE_UINT16:  case GGUF_TYPE_INT16:                         return 2;
        case GGUF_TYPE_UINT32:  case GGUF_TYPE_INT32: case GGUF_TYPE_FLOAT32: return 4;
        case GGUF_TYPE_UINT64:  case GGUF_TYPE_INT64: case GGUF_TYPE_FLOAT64: return 8;
        default:                                                              return 0;
    }
}

//
// reading
//

mem_file::mem_file(const void * data, size_t size) : content((const uint8_t *) data), size(size) {
    if ((uintptr_t) data % MEM_ALIGNMENT != 0) {
        mem_refuse(format("invalid: the data of a memory must begin at a multiple of %zu bytes", MEM_ALIGNMENT));
    }
    if (size < 4 || memcmp(data, GGUF_MAGIC, 4) != 0) {
        mem_refuse("not_a_memory: this is not a GGUF file");
    }
    pos = 4;
    const uint32_t version = number<uint32_t>();
    if (version != GGUF_VERSION) {
        mem_refuse(format("invalid: the file has GGUF version %u, expected %d", version, GGUF_VERSION));
    }
    n_tensors = number<uint64_t>();
    const uint64_t n_keys = number<uint64_t>();
    if (n_keys > MEM_MAX_KEYS) {
        mem_refuse(format("invalid: the file has %" PRIu64 " keys, expected at most %u", n_keys, MEM_MAX_KEYS));
    }
    for (uint64_t i = 0; i < n_keys; i++) {
        const std::string key = text("a key");
        if (key.empty() || keys.count(key)) {
            mem_refuse(format("invalid: the key '%s' is empty or occurs twice", key.c_str()));
        }
        keys[key] = read_value(key);
    }
}

struct mem_file::info {
    std::string name;
    uint64_t    ne[GGML_MAX_DIMS] = { 1, 1, 1, 1 };
    uint32_t    type;
    uint64_t    offset;
};

void mem_file::read_tensors(uint64_t limit) {
    if (n_tensors > limit) {
        mem_refuse(format("invalid: the file has %" PRIu64 " tensors, expected at most %" PRIu64, n_tensors, limit));
    }
    std::vector<info> infos;
    for (uint64_t i = 0; i < n_tensors; i++) {
        infos.push_back(read_info());
    }

    meta.reset(ggml_init({ (infos.size() + 1)*ggml_tensor_overhead(), nullptr, true }));
    if (!meta) {
        mem_refuse("out_of_memory: cannot allocate the tensors of the memory");
    }
    const size_t begin = GGML_PAD(pos, MEM_ALIGNMENT);
    uint64_t offset = 0;
    for (const info & t : infos) {
        offset += add_tensor(t, begin, offset);
    }
}

mem_file::info mem_file::read_info() {
    info t;
    t.name = text("a tensor name");
    if (t.name.size() >= GGML_MAX_NAME || !tensors.emplace(t.name, entry()).second) {
        mem_refuse(format("invalid: the tensor '%s' occurs twice, or its name is too long", t.name.c_str()));
    }
    const uint32_t n_dims = number<uint32_t>();
    if (n_dims > GGML_MAX_DIMS) {
        mem_refuse(format("invalid: the tensor '%s' has %u dimensions", t.name.c_str(), n_dims));
    }
    for (uint32_t j = 0; j < n_dims; j++) {
        t.ne[j] = number<uint64_t>();
    }
    t.type   = number<uint32_t>();
    t.offset = number<uint64_t>();
    return t;
}

size_t mem_file::add_tensor(const info & t, size_t begin, uint64_t expected) {
    const char * name = t.name.c_str();
    if (t.type != GGML_TYPE_F32 && t.type != GGML_TYPE_F16 && t.type != GGML_TYPE_Q8_0 && t.type != GGML_TYPE_I32) {
        mem_refuse(format("invalid: the tensor '%s' has type %u", name, t.type));
    }
    const ggml_type type = (ggml_type) t.type;
    if (std::find(t.ne, t.ne + GGML_MAX_DIMS, 0u) != t.ne + GGML_MAX_DIMS || t.ne[0] % ggml_blck_size(type) != 0) {
        mem_refuse(format("invalid: the tensor '%s' has shape [%" PRIu64 ", %" PRIu64 ", %" PRIu64 ", %" PRIu64 "]",
            name, t.ne[0], t.ne[1], t.ne[2], t.ne[3]));
    }
    if (t.offset != expected) {
        mem_refuse(format("invalid: the tensor '%s' has offset %" PRIu64 ", expected %" PRIu64, name, t.offset, expected));
    }
    // divided before it is multiplied, so that nothing overflows
    uint64_t room = begin + expected < size ? (size - begin - expected)/ggml_type_size(type) : 0;
    uint64_t n    = t.ne[0]/ggml_blck_size(type);
    room /= n;
    for (int j = 1; j < GGML_MAX_DIMS; j++) {
        room /= t.ne[j];
        n    *= room > 0 ? t.ne[j] : 0;
    }
    if (room == 0) {
        mem_refuse(format("truncated: the tensor '%s' ends behind the file, which has %zu bytes; build or copy the memory again",
            name, size));
    }
    const int64_t ne[] = { (int64_t) t.ne[0], (int64_t) t.ne[1], (int64_t) t.ne[2], (int64_t) t.ne[3] };
    ggml_tensor * tensor = ggml_new_tensor(meta.get(), type, GGML_MAX_DIMS, ne);
    ggml_set_name(tensor, name);
    tensors[t.name] = { tensor, content + begin + expected };
    return GGML_PAD(n*ggml_type_size(type), MEM_ALIGNMENT);
}

const uint8_t * mem_file::take(uint64_t n) {
    if (n > size - pos) {
        mem_refuse("truncated: the header is incomplete or damaged; build or copy the memory again");
    }
    pos += n;
    return content + pos - n;
}

std::string mem_file::text(const std::string & what) {
    const uint64_t  n = number<uint64_t>();
    const uint8_t * p = take(n);
    if (!mem_is_utf8(p, n)) {
        mem_refuse(format("invalid: %s is not UTF-8", what.c_str()));
    }
    if (n > 0 && memchr(p, 0, n)) {
        mem_refuse(format("invalid: %s has a NUL", what.c_str()));
    }
    return std::string((const char *) p, n);
}

mem_file::value mem_file::read_value(const std::string & key) {
    const uint32_t type = number<uint32_t>();
    if (type == GGUF_TYPE_STRING) {
        const size_t n = text(format("the key '%s'", key.c_str())).size();
        return { GGUF_TYPE_STRING, GGUF_TYPE_COUNT, n, content + pos - n };
    }
    if (type != GGUF_TYPE_ARRAY) {
        const size_t n = mem_scalar_size(type);
        if (n == 0) {
            mem_refuse(format("invalid: the key '%s' has type %u", key.c_str(), type));
        }
        return { (gguf_type) type, GGUF_TYPE_COUNT, 1, take(n) };
    }
    const uint32_t item = number<uint32_t>();
    const uint64_t n    = number<uint64_t>();
    if (item == GGUF_TYPE_STRING) {
        for (uint64_t i = 0; i < n; i++) {
            take(number<uint64_t>());
        }
        return { GGUF_TYPE_ARRAY, GGUF_TYPE_STRING, n, nullptr }; // no key of a memory has this type
    }
    const size_t item_size = mem_scalar_size(item);
    if (item_size == 0) {
        mem_refuse(format("invalid: the key '%s' is an array of type %u", key.c_str(), item));
    }
    return { GGUF_TYPE_ARRAY, (gguf_type) item, n, take(n > size/item_size ? UINT64_MAX : n*item_size) };
}

//
// keys
//

const mem_file::value & mem_file::find(const std::string & key, gguf_type type) const {
    const auto it = keys.find(key);
    if (it == keys.end()) {
        mem_refuse(format("invalid: the key '%s' is missing", key.c_str()));
    }
    if (it->second.type != type) {
        mem_refuse(format("invalid: the key '%s' has type %s, expected %s",
            key.c_str(), gguf_type_name(it->second.type), gguf_type_name(type)));
    }
    return it->second;
}

uint32_t mem_file::u32(const std::string & key) const {
    return mem_load<uint32_t>(find(key, GGUF_TYPE_UINT32).data);
}

float mem_file::f32(const std::string & key) const {
    const float x = mem_load<float>(find(key, GGUF_TYPE_FLOAT32).data);
    if (!std::isfinite(x)) {
        mem_refuse(format("invalid: the key '%s' is not a finite number", key.c_str()));
    }
    return x;
}

std::string mem_file::str(const std::string & key) const {
    return to_string(find(key, GGUF_TYPE_STRING));
}

std::vector<int32_t> mem_file::arr_i32(const std::string & key) const {
    const value & v = find(key, GGUF_TYPE_ARRAY);
    if (v.item != GGUF_TYPE_INT32) {
        mem_refuse(format("invalid: the key '%s' is not an array of i32", key.c_str()));
    }
    std::vector<int32_t> res(v.n);
    if (v.n > 0) {
        memcpy(res.data(), v.data, v.n*sizeof(int32_t));
    }
    return res;
}

std::string mem_file::to_string(const value & v) {
    return std::string((const char *) v.data, v.n);
}

std::string mem_file::to_text(const value & v) {
    return v.type == GGUF_TYPE_STRING ? to_string(v) :
           v.type == GGUF_TYPE_UINT32 ? std::to_string(mem_load<uint32_t>(v.data)) : format("%.9g", mem_load<float>(v.data));
}

//
// tensors
//

ggml_tensor * mem_file::tensor(const std::string & name) const {
    const auto it = tensors.find(name);
    return it == tensors.end() ? nullptr : it->second.tensor;
}

ggml_tensor * mem_file::tensor(const std::string & name, std::initializer_list<ggml_type> types, int64_t ne0, int64_t ne1) const {
    ggml_tensor * t = tensor(name);
    if (!t) {
        mem_refuse(format("invalid: the tensor '%s' is missing", name.c_str()));
    }
    if (std::find(types.begin(), types.end(), t->type) == types.end()) {
        mem_refuse(format("invalid: the tensor '%s' has type %s", name.c_str(), ggml_type_name(t->type)));
    }
    if ((ne0 >= 0 && t->ne[0] != ne0) || (ne1 >= 0 && t->ne[1] != ne1) || t->ne[2] != 1 || t->ne[3] != 1) {
        mem_refuse(format("invalid: the tensor '%s' has shape [%" PRId64 ", %" PRId64 ", %" PRId64 ", %" PRId64 "], expected [%" PRId64 ", %" PRId64 "]",
            name.c_str(), t->ne[0], t->ne[1], t->ne[2], t->ne[3], ne0 < 0 ? t->ne[0] : ne0, ne1 < 0 ? t->ne[1] : ne1));
    }
    return t;
}

const void * mem_file::data(const ggml_tensor * t) const {
    return tensors.at(t->name).data;
}

const int32_t * mem_file::data_i32(const ggml_tensor * t) const {
    return (const int32_t *) data(t);
}
