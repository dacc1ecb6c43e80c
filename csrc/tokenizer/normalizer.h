// BERT's normalizer and its split into words: the table for the inner loops, and the general algorithm.
#pragma once

#include <cstdint>
#include <vector>

#include "scan.h"

namespace fastbert {

struct NormalizerFlags {
    bool clean_text, handle_chinese_chars, strip_accents, lowercase;
};

// A character of a normalized text, and the code point of the original that it stands on.
struct NormalizedCharacter {
    uint32_t c;
    int32_t source;
};

class Normalizer {
  public:
    // `triggers`: the characters that added tokens start with.
    Normalizer(NormalizerFlags flags, const std::vector<uint32_t>& triggers);

    const CharacterTable& table() const { return table_; }
    uint32_t entry(uint32_t c) const {
        return c > 0x10FFFF ? kInvalid : entries_[static_cast<size_t>(blocks_[c >> 8]) << 8 | (c & 255)];
    }

    // What a character is in the split into words, once normalized.
    SequenceClass split_class(uint32_t c) const;

    // The bytes that `units` units of a text become at most.
    int64_t most_bytes(Storage storage, int64_t units) const { return units * most_bytes_[static_cast<int>(storage)]; }

    // Normalizes a segment whose first character is code point `source` of its text. No surrogates.
    std::vector<NormalizedCharacter> normalize(const std::vector<uint32_t>& text, int64_t source) const;

    size_t memory() const;

  private:
    uint32_t make_entry(uint32_t c, uint8_t property);

    NormalizerFlags flags_;
    std::vector<uint16_t> blocks_;
    std::vector<uint32_t> entries_, sequences_;
    CharacterTable table_;
    int most_bytes_[4];
};

// UTF-8, with U+0000 as C0 80; returns the bytes written, at most 4.
int write_utf8(uint32_t c, uint8_t* out);

// Bits of unicode::Property.
uint8_t character_property(uint32_t c);

}  // namespace fastbert
