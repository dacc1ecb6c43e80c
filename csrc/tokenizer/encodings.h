// What encoding gives: rows of tokens, to be written out packed or padded.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <vector>

namespace fastbert {

// An array that grows without being cleared.
template <class T>
class Buffer {
  public:
    Buffer() = default;
    Buffer(Buffer&& other) noexcept : data_(other.data_), capacity_(other.capacity_) {
        other.data_ = nullptr;
        other.capacity_ = 0;
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    Buffer& operator=(Buffer&&) = delete;
    ~Buffer() { std::free(data_); }

    T* data() { return data_; }
    const T* data() const { return data_; }
    T& operator[](int64_t i) { return data_[i]; }
    const T& operator[](int64_t i) const { return data_[i]; }
    int64_t capacity() const { return capacity_; }
    // Room for `size` elements. Those that are there stay.
    void reserve(int64_t size) {
        if (size > capacity_) grow(size);
    }
    void release() {
        std::free(data_);
        data_ = nullptr;
        capacity_ = 0;
    }

  private:
    void grow(int64_t size) {
        const int64_t capacity = size > 2 * capacity_ ? size : 2 * capacity_;
        void* data = std::realloc(data_, static_cast<size_t>(capacity) * sizeof(T));
        if (data == nullptr) throw std::bad_alloc();
        data_ = static_cast<T*>(data);
        capacity_ = capacity;
    }
    T* data_ = nullptr;
    int64_t capacity_ = 0;
};

// Tokens of some texts, one after another.
struct TokenBlock {
    Buffer<int32_t> ids;
    Buffer<int32_t> spans;  // [tokens, 2]: where each begins and ends, in code points; only on request
    Buffer<int32_t> words;  // [tokens]: the word each belongs to; only on request
    int64_t size = 0;
};

struct TemplatePiece {
    int32_t id;    // of a special token, or one of the two below
    int32_t type;  // token type id
};
constexpr int32_t kSequenceA = -1, kSequenceB = -2;
typedef std::vector<TemplatePiece> Template;

struct Row {
    int64_t begin[2];  // of the sequences, in the block
    int64_t count[2];
    int32_t block, sample;
    bool pair;
    bool overflow;  // not the first row of its sample
};

enum class Field {
    input_ids,
    token_type_ids,
    attention_mask,
    special_tokens_mask,
    position_ids,
    offset_mapping,
    word_ids,
    sequence_ids,
};
// Throws std::invalid_argument, naming the fields, for any other name.
Field field_named(const std::string& name);
inline int width(Field field) {
    return field == Field::offset_mapping ? 2 : 1;
}

class Encodings {
  public:
    Encodings() = default;
    Encodings(Encodings&&) = default;
    Encodings(const Encodings&) = delete;
    Encodings& operator=(const Encodings&) = delete;

    std::vector<TokenBlock> blocks;
    std::vector<Row> rows;
    std::shared_ptr<const Template> single, pair;  // without special tokens where none were asked for
    bool offsets = false;
    int threads = 1;

    // Counts; call once when the rows are there.
    void finish();
    int64_t total() const { return total_; }
    int64_t longest() const { return longest_; }
    int64_t length(const Row& row) const { return row.count[0] + row.count[1] + (row.pair ? pair_special_ : special_); }

    // Throws std::invalid_argument where the field needs offsets and there are none.
    void check(Field field) const;
    // One row.  [length, width]
    void write_row(Field field, const Row& row, int64_t* out) const;
    // All rows one after another, of each field.  [total, width]
    struct Output {
        Field field;
        int64_t* out;
    };
    void write_packed(const std::vector<Output>& outputs) const;
    // [rows, length, width]; throws std::invalid_argument for a longer row.
    void write_padded(Field field, int64_t length, int64_t value, bool left, int64_t* out) const;
    // [rows + 1]; throws std::overflow_error beyond int32.
    void write_bounds(int32_t* out) const;

  private:
    const Template& template_of(const Row& row) const { return row.pair ? *pair : *single; }

    int64_t total_ = 0, longest_ = 0;
    int64_t special_ = 0, pair_special_ = 0;  // template tokens
};

}  // namespace fastbert
