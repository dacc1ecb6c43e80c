// What `tokenizers` does with every code point, as make_tables.py found by asking it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastbert::unicode {

enum Property : uint8_t {
    kCleanDrop = 1,       // clean_text removes it
    kCleanSpace = 2,      // clean_text makes it a space
    kCjk = 4,             // handle_chinese_chars puts spaces around it
    kMark = 8,            // category Mn, dropped with accents; of characters that do not decompose
    kWhitespace = 16,     // separates words
    kPunctuation = 32,    // is a word of its own
    kWordCharacter = 64,  // \w of the regular expressions behind single_word
    kRegexSpace = 128,    // \s of those behind lstrip and rstrip
};

// Each entry holds from its code point on: code point << 8 | value.
extern const uint32_t kProperties[];
extern const size_t kProperties_size;
extern const uint32_t kCombiningClasses[];
extern const size_t kCombiningClasses_size;

// code point << 8 | length, then the code points it becomes. Hangul syllables are not listed.
extern const uint32_t kDecompositions[];
extern const size_t kDecompositions_size;
extern const uint32_t kLowercase[];
extern const size_t kLowercase_size;

}  // namespace fastbert::unicode
