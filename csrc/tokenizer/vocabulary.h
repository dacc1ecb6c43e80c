// WordPiece over UTF-8 words in which U+0000 is written C0 80.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace fastbert {

// A short word and what it becomes: 16 bytes of the word, zeros behind it, and up to three ids.
struct WordEntry {
    uint64_t low, high;
    int32_t ids[3];
    int32_t count;  // of ids; 0: the slot is empty
};
constexpr int64_t kShortWord = 16;  // bytes
constexpr int kEntryIds = 3;

// (low * kHashLow + high * kHashHigh) >> shift: multiply-shift hashing of a pair (Dietzfelbinger et al. 1997).
constexpr uint64_t kHashLow = 0x9E3779B97F4A7C15, kHashHigh = 0xC2B2AE3D27D4EB4F;

inline uint64_t hash_word(uint64_t low, uint64_t high) {
    return low * kHashLow + high * kHashHigh;
}

struct VocabularyOptions {
    int32_t unk_id;
    std::string prefix;
    int64_t max_input_chars_per_word;
};

class Vocabulary {
  public:
    Vocabulary(const std::vector<std::pair<std::string, int32_t>>& tokens, VocabularyOptions options);

    // The slots from the word's own on, until an empty one; the table of words that are one piece.
    const WordEntry* words() const { return words_.data(); }
    int shift() const { return shift_; }
    uint64_t slot_mask() const { return words_.size() - 1; }

    // Splits a word into ids [bytes] and, unless null, the byte each piece ends at [bytes]. Returns how many.
    int64_t split(const uint8_t* word, int64_t bytes, int32_t* ids, uint32_t* ends) const;

    int32_t unk_id() const { return options_.unk_id; }
    size_t memory() const { return nodes_.capacity() * sizeof(Node) + words_.capacity() * sizeof(WordEntry); }

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
    void build_words(const std::vector<std::pair<std::string, int32_t>>& tokens);

    VocabularyOptions options_;
    std::vector<Node> nodes_;
    int32_t start_ = 0, rest_ = 0;  // roots: of pieces that start a word, of those that continue one
    std::vector<WordEntry> words_;
    int shift_ = 0;
};

// Code points of a word.
int64_t count_characters(const uint8_t* word, int64_t bytes);

}  // namespace fastbert
