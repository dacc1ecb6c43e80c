// The inner loops: text to normalized UTF-8 with the bounds of its words. Included by scan_kernels.cpp, which is
// compiled once for each instruction set, so there is no standard library and no inline function in here.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace fastbert {

enum class Storage : uint8_t { ucs1, ucs2, ucs4, utf8 };

struct Text {
    const void* data;
    int64_t size;  // in units: code points, or bytes of UTF-8
    Storage storage;
};

// What the normalizer and the split into words make of one character. An entry is kind | kTrigger | value << 5.
enum CharacterKind : uint32_t {
    kSelfWord,   // stays, as part of a word
    kSelfAlone,  // stays, as a word of its own
    kSpace,      // separates words
    kNothing,    // is removed
    kWord,       // becomes the code point `value`, part of a word
    kAlone,      // becomes the code point `value`, a word of its own
    kSequence,   // becomes sequences[value + 1 …], as many as sequences[value] says
    kReorder,    // is kept, and normalization may move it: only the general normalizer can tell
    kInvalid,    // no character: half of a surrogate pair
    kKindMask = 15,
    kTrigger = 16,  // an added token may start here
};
enum SequenceClass : uint32_t { kInWord, kOnItsOwn, kSeparator };  // of an element, code point << 2 | class

struct CharacterTable {
    const uint16_t* blocks;   // [0x110000 / 256]
    const uint32_t* entries;  // [blocks][256]
    const uint32_t* sequences;
    // Of ASCII, by the low half of the byte: bit h tells about the character h << 4 | low.
    uint8_t word[16], alone[16], special[16];  // special: removed, replaced or a trigger
    uint8_t lowercase;                         // 0x20 where A … Z become a … z, else 0
};

// The output: bytes, and for each byte whether a word starts there and whether it belongs to a word. U+0000 is written
// C0 80, so that no word contains a zero byte.
struct ScanState {
    const void* data;
    int64_t position;   // next unit to read
    int64_t end;        // units
    int64_t character;  // code points before `position`
    int64_t ignore;     // triggers before this unit are characters like others
    uint8_t* bytes;
    uint64_t* starts;
    uint64_t* members;
    int32_t* sources;  // for each byte, the code point of the text that it stands on; or null
    int64_t size;      // bytes written
    uint32_t in_word;  // whether the last one belongs to a word that goes on
};

enum class ScanStop { end, trigger, reorder, invalid };  // at state.position

struct ScanKernels {
    // By storage. Reads up to `end`; `bytes` has room for what it becomes and 64 more.
    ScanStop (*scan[4])(const CharacterTable&, ScanState&);
    ScanStop (*scan_with_sources[4])(const CharacterTable&, ScanState&);
    // First and last byte of every word.  [words]  Returns how many. There is room for 64 more.
    int64_t (*bounds)(const uint64_t* starts, const uint64_t* members, int64_t size, uint32_t* first, uint32_t* last);
    // Whether all code points are valid; if not, `position` of the first that is not.
    bool (*valid[4])(const void* data, int64_t begin, int64_t end, int64_t* position);
};

}  // namespace fastbert
