#include "normalizer.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <unordered_map>

#include "unicode_tables.h"

namespace fastbert {
namespace {

using namespace unicode;

constexpr uint32_t kCodePoints = 0x110000;
constexpr uint32_t kSyllableBase = 0xAC00, kSyllables = 11172, kVowels = 21, kFinals = 28;

// The value that holds at c in a list of changes.
uint8_t value_at(const uint32_t* changes, size_t size, uint32_t c) {
    return static_cast<uint8_t>(*(std::upper_bound(changes, changes + size, c << 8 | 255) - 1));
}

uint8_t combining_class(uint32_t c) {
    return value_at(kCombiningClasses, kCombiningClasses_size, c);
}

bool is_surrogate(uint32_t c) {
    return c >= 0xD800 && c < 0xE000;
}

// code point → where its replacement is listed.
std::unordered_map<uint32_t, const uint32_t*> index_of(const uint32_t* list, size_t size) {
    std::unordered_map<uint32_t, const uint32_t*> index;
    for (size_t i = 0; i < size; i += 1 + (list[i] & 255)) index.emplace(list[i] >> 8, list + i);
    return index;
}

const std::unordered_map<uint32_t, const uint32_t*>& decompositions() {
    static const auto index = index_of(kDecompositions, kDecompositions_size);
    return index;
}

const std::unordered_map<uint32_t, const uint32_t*>& lowercase() {
    static const auto index = index_of(kLowercase, kLowercase_size);
    return index;
}

// What c becomes, in `out` [at most 32]; returns how many.
int replace(const std::unordered_map<uint32_t, const uint32_t*>& index, uint32_t c, uint32_t* out) {
    const auto found = index.find(c);
    if (found == index.end()) {
        out[0] = c;
        return 1;
    }
    const int count = static_cast<int>(*found->second & 255);
    std::copy_n(found->second + 1, count, out);
    return count;
}

int decompose(uint32_t c, uint32_t* out) {
    const uint32_t i = c - kSyllableBase;
    if (i >= kSyllables) return replace(decompositions(), c, out);
    out[0] = 0x1100 + i / (kVowels * kFinals);
    out[1] = 0x1161 + i / kFinals % kVowels;
    out[2] = 0x11A7 + i % kFinals;
    return i % kFinals ? 3 : 2;
}

int utf8_length(uint32_t c) {
    return c == 0 ? 2 : c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
}

}  // namespace

int write_utf8(uint32_t c, uint8_t* out) {
    const int size = utf8_length(c);
    if (size == 1) {
        out[0] = static_cast<uint8_t>(c);
        return 1;
    }
    constexpr uint8_t kLead[] = {0, 0, 0xC0, 0xE0, 0xF0};
    for (int i = size - 1; i > 0; --i, c >>= 6) out[i] = static_cast<uint8_t>(0x80 | (c & 0x3F));
    out[0] = static_cast<uint8_t>(kLead[size] | c);
    return size;
}

uint8_t character_property(uint32_t c) {
    return value_at(kProperties, kProperties_size, c);
}

SequenceClass Normalizer::split_class(uint32_t c) const {
    const uint8_t property = character_property(c);
    return property & kWhitespace ? kSeparator : property & kPunctuation ? kOnItsOwn : kInWord;
}

uint32_t Normalizer::make_entry(uint32_t c, uint8_t property) {
    if (is_surrogate(c)) return kInvalid;
    if (flags_.clean_text) {
        if (property & kCleanDrop) return kNothing;
        if (property & kCleanSpace) return kSpace;
    }
    uint32_t decomposed[32], lowered[32];
    int count = 1;
    decomposed[0] = c;
    if (flags_.strip_accents) count = decompose(c, decomposed);
    // between the spaces that handle_chinese_chars puts, its decomposition is no part of another word
    const bool apart = flags_.handle_chinese_chars && (property & kCjk);
    std::vector<uint32_t> sequence;
    if (apart) sequence.push_back(kSeparator);
    for (int i = 0; i < count; ++i) {
        if (flags_.strip_accents) {
            if (character_property(decomposed[i]) & kMark) continue;
            if (combining_class(decomposed[i])) return kReorder;
        }
        int letters = 1;
        lowered[0] = decomposed[i];
        if (flags_.lowercase) letters = replace(lowercase(), decomposed[i], lowered);
        for (int k = 0; k < letters; ++k) sequence.push_back(lowered[k] << 2 | split_class(lowered[k]));
    }
    if (apart) sequence.push_back(kSeparator);
    if (apart && sequence.size() == 3 && (sequence[1] & 3) != kSeparator) {
        sequence = {(sequence[1] & ~3u) | static_cast<uint32_t>(kOnItsOwn)};
    }
    if (sequence.empty()) return kNothing;
    if (sequence.size() == 1) {
        const uint32_t value = sequence[0] >> 2;
        switch (sequence[0] & 3) {
            case kSeparator:
                return kSpace;
            case kOnItsOwn:
                return value == c ? static_cast<uint32_t>(kSelfAlone) : kAlone | value << 5;
            default:
                return value == c ? static_cast<uint32_t>(kSelfWord) : kWord | value << 5;
        }
    }
    const uint32_t at = static_cast<uint32_t>(sequences_.size());
    sequences_.push_back(static_cast<uint32_t>(sequence.size()));
    sequences_.insert(sequences_.end(), sequence.begin(), sequence.end());
    return kSequence | at << 5;
}

Normalizer::Normalizer(NormalizerFlags flags, const std::vector<uint32_t>& triggers)
    : flags_(flags), blocks_(kCodePoints >> 8), table_{}, most_bytes_{} {
    std::unordered_map<std::string, uint16_t> known;  // blocks that are alike are stored once
    size_t change = 0;
    for (uint32_t base = 0; base < kCodePoints; base += 256) {
        uint32_t block[256];
        for (uint32_t i = 0; i < 256; ++i) {
            const uint32_t c = base + i;
            while (change + 1 < kProperties_size && kProperties[change + 1] >> 8 <= c) ++change;
            block[i] = make_entry(c, static_cast<uint8_t>(kProperties[change]));
            int bytes = 0;
            switch (block[i] & kKindMask) {
                case kSelfWord:
                case kSelfAlone:
                    bytes = utf8_length(c);
                    break;
                case kWord:
                case kAlone:
                    bytes = utf8_length(block[i] >> 5);
                    break;
                case kSequence: {
                    const uint32_t* sequence = &sequences_[block[i] >> 5];
                    for (uint32_t k = 1; k <= sequence[0]; ++k) bytes += utf8_length(sequence[k] >> 2) + 1;
                    break;
                }
                case kReorder:
                    bytes = 16;  // goes through normalize(): at most 4 characters
                    break;
                default:
                    bytes = 1;
            }
            if (base == 0) most_bytes_[0] = std::max(most_bytes_[0], bytes);
            if (c < 0x10000) most_bytes_[1] = std::max(most_bytes_[1], bytes);
            most_bytes_[2] = std::max(most_bytes_[2], bytes);
            const int encoded = c < 0x80 ? 1 : utf8_length(c);
            most_bytes_[3] = std::max(most_bytes_[3], (bytes + encoded - 1) / encoded);
            if (std::find(triggers.begin(), triggers.end(), c) != triggers.end()) block[i] |= kTrigger;
        }
        const std::string key(reinterpret_cast<const char*>(block), sizeof block);
        const auto [at, added] = known.emplace(key, static_cast<uint16_t>(known.size()));
        if (added) entries_.insert(entries_.end(), block, block + 256);
        blocks_[base >> 8] = at->second;
    }
    entries_.shrink_to_fit();
    sequences_.shrink_to_fit();
    table_.blocks = blocks_.data();
    table_.entries = entries_.data();
    table_.sequences = sequences_.data();
    table_.lowercase = flags.lowercase ? 0x20 : 0;
    for (uint32_t c = 0; c < 0x80; ++c) {
        const uint32_t found = entry(c), kind = found & kKindMask, lower = c + 0x20;
        const uint8_t bit = static_cast<uint8_t>(1 << (c >> 4));
        const bool plain = !(found & kTrigger) && c != 0;
        if (plain && (kind == kSelfWord || found == (kWord | lower << 5))) {
            table_.word[c & 15] |= bit;
        } else if (plain && kind == kSelfAlone) {
            table_.alone[c & 15] |= bit;
        } else if (!plain || kind != kSpace) {
            table_.special[c & 15] |= bit;
        }
    }
}

std::vector<NormalizedCharacter> Normalizer::normalize(const std::vector<uint32_t>& text, int64_t source) const {
    struct Decomposed {
        uint32_t c;
        bool inserted;  // no character of the text stands behind it
        uint8_t combining_class;
    };
    std::vector<Decomposed> decomposed;
    std::vector<int32_t> sources;  // of what stands before the decomposition
    for (size_t i = 0; i < text.size(); ++i) {
        uint32_t c = text[i];
        const uint8_t property = character_property(c);
        if (flags_.clean_text) {
            if (property & kCleanDrop) continue;
            if (property & kCleanSpace) c = ' ';
        }
        const int32_t at = static_cast<int32_t>(source + static_cast<int64_t>(i));
        const bool apart = flags_.handle_chinese_chars && (property & kCjk);
        if (apart) {
            decomposed.push_back({' ', false, 0});
            sources.push_back(at);
        }
        uint32_t parts[32];
        parts[0] = c;
        const int count = flags_.strip_accents ? decompose(c, parts) : 1;
        for (int k = 0; k < count; ++k) {
            const uint8_t k_class = flags_.strip_accents ? combining_class(parts[k]) : static_cast<uint8_t>(0);
            decomposed.push_back({parts[k], k > 0, k_class});
        }
        sources.push_back(at);
        if (apart) {
            decomposed.push_back({' ', false, 0});
            sources.push_back(at);
        }
    }
    // The canonical ordering of Unicode; `tokenizers` hands out the sources only afterwards, in order.
    for (size_t begin = 0; begin < decomposed.size(); ++begin) {
        if (decomposed[begin].combining_class == 0) continue;
        size_t end = begin;
        while (end < decomposed.size() && decomposed[end].combining_class != 0) ++end;
        std::stable_sort(
            decomposed.begin() + static_cast<ptrdiff_t>(begin), decomposed.begin() + static_cast<ptrdiff_t>(end),
            [](const Decomposed& a, const Decomposed& b) { return a.combining_class < b.combining_class; });
        begin = end - 1;
    }
    std::vector<NormalizedCharacter> out;
    out.reserve(decomposed.size());
    int64_t position = -1;
    for (const Decomposed& d : decomposed) {
        position += !d.inserted;
        if (flags_.strip_accents && (character_property(d.c) & kMark)) continue;
        uint32_t lowered[32];
        lowered[0] = d.c;
        const int count = flags_.lowercase ? replace(lowercase(), d.c, lowered) : 1;
        for (int k = 0; k < count; ++k) {
            out.push_back({lowered[k], sources[static_cast<size_t>(std::max<int64_t>(position, 0))]});
        }
    }
    return out;
}

size_t Normalizer::memory() const {
    return blocks_.capacity() * sizeof(uint16_t) + (entries_.capacity() + sequences_.capacity()) * sizeof(uint32_t);
}

}  // namespace fastbert
