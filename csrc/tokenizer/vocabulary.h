// WordPiece over UTF-8 words in which U+0000 is written C0 80.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace fastbert {

constexpr size_t kLargePage = size_t{2} << 20;

// Asks for large pages, where the system has them, in [data, data + bytes).
void prefer_large_pages(void* data, size_t bytes);

// Aligned to lines of the caches, or to large pages. Throws std::bad_alloc.
void* allocate_pages(size_t bytes);

// An array for lookups all over it: on large pages where the system has them, since a page's
// address is looked up too.
template <class T>
class LookupArray {
  public:
    LookupArray() = default;
    LookupArray(const LookupArray&) = delete;
    LookupArray& operator=(const LookupArray&) = delete;
    ~LookupArray() { std::free(data_); }

    void assign(size_t size, const T& value) {
        std::free(data_);
        data_ = static_cast<T*>(allocate_pages(size * sizeof(T)));
        size_ = size;
        std::uninitialized_fill_n(data_, size, value);
    }
    void assign(const std::vector<T>& values) {
        assign(values.size(), T{});
        std::copy(values.begin(), values.end(), data_);
    }
    const T* data() const { return data_; }
    size_t size() const { return size_; }
    T& operator[](size_t i) { return data_[i]; }
    const T& operator[](size_t i) const { return data_[i]; }

  private:
    T* data_ = nullptr;
    size_t size_ = 0;
};

// The bytes of a short word, zeros behind them. Nothing in valid UTF-8 is kNoWord.
struct WordKey {
    uint64_t low, high;
    bool operator==(const WordKey& other) const { return ((low ^ other.low) | (high ^ other.high)) == 0; }
};
constexpr int64_t kShortWord = 16;  // bytes
constexpr WordKey kNoWord = {~uint64_t{0}, ~uint64_t{0}};

// (low * kHashLow + high * kHashHigh) >> shift: multiply-shift hashing of a pair (Dietzfelbinger et al. 1997).
constexpr uint64_t kHashLow = 0x9E3779B97F4A7C15, kHashHigh = 0xC2B2AE3D27D4EB4F;

inline uint64_t hash_word(const WordKey& key) {
    return key.low * kHashLow + key.high * kHashHigh;
}

// Half a line of the caches: one fetch for each word.
struct alignas(32) VocabularyWord {
    WordKey key;
    int32_t id;
};

struct VocabularyOptions {
    int32_t unk_id;
    std::string prefix;
    int64_t max_input_chars_per_word;
};

class Vocabulary {
  public:
    Vocabulary(const std::vector<std::pair<std::string, int32_t>>& tokens, VocabularyOptions options);

    // The table of short words that are one piece: each is in the slot its hash says or, where that is taken, in one
    // of those behind it up to an empty one. Vocabularies list frequent words first: those are in their own slots.
    struct Words {
        const VocabularyWord* slots;
        uint64_t mask;
        int shift;  // of the hash, to the slot
    };
    Words words() const { return {words_.data(), words_.size() - 1, shift_}; }

    // Splits a word into ids [bytes] and, unless null, the byte each piece ends at [bytes]. Returns how many.
    int64_t split(const uint8_t* word, int64_t bytes, int32_t* ids, uint32_t* ends) const;

    int32_t unk_id() const { return options_.unk_id; }
    size_t memory() const;

  private:
    // A double-array trie (Aoe 1989): the child of s by byte b is at base ^ b if its parent is s.
    struct Node {
        int32_t base, parent, id;  // id: of the token that ends here, or -1
    };
    int32_t child(int32_t node, uint8_t byte) const {
        const uint32_t at = static_cast<uint32_t>(nodes_[static_cast<size_t>(node)].base) ^ byte;
        return nodes_[at].parent == node ? static_cast<int32_t>(at) : -1;
    }
    void build_trie(std::vector<std::pair<std::string, int32_t>> keys);
    void build_steps();
    void build_words(const std::vector<std::pair<std::string, int32_t>>& tokens);

    VocabularyOptions options_;
    LookupArray<Node> nodes_;
    int32_t roots_[2] = {-1, -1};  // of pieces that start a word, of those that continue one

    // Where two lowercase letters lead from a root, and the longest piece on the way: most walks start there.
    struct Step {
        int32_t node, id, length;
    };
    Step steps_[2][32 * 32];  // by the letters' lowest five bits
    LookupArray<VocabularyWord> words_;
    int shift_ = 0;
};

// Code points of a word.
int64_t count_characters(const uint8_t* word, int64_t bytes);

}  // namespace fastbert
