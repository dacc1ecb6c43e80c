// Words to tokens: the table of words that are one piece, the cache of others, the trie.
#include <algorithm>
#include <cstring>

#include "encoder.h"

namespace fastbert {
namespace {

constexpr int64_t kBatch = 32;   // words whose table entries are fetched at a time
constexpr int kCacheShift = 24;  // other bits of the hash than those that choose a slot of the table

// The bytes of a 16-byte load that belong to a word of this size.
struct WordMask {
    uint64_t low, high;
};
constexpr uint64_t ones(int bytes) {
    return bytes <= 0 ? 0 : bytes >= 8 ? ~uint64_t{0} : (uint64_t{1} << (8 * bytes)) - 1;
}
#define MASK(n) {ones(n), ones((n) - 8)}
constexpr WordMask kWordMasks[kShortWord + 1] = {MASK(0),  MASK(1),  MASK(2),  MASK(3),  MASK(4),  MASK(5),
                                                 MASK(6),  MASK(7),  MASK(8),  MASK(9),  MASK(10), MASK(11),
                                                 MASK(12), MASK(13), MASK(14), MASK(15), MASK(16)};
#undef MASK

uint64_t load64(const uint8_t* p) {
    uint64_t value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

}  // namespace

void Encoder::append_added(int32_t id, int64_t begin, int64_t end) {
    if (full()) return;
    const int64_t at = block_.size;
    block_.ids.reserve(at + 1);
    block_.ids[at] = id;
    if (options_.offsets) {
        block_.spans.reserve(2 * at + 2);
        block_.words.reserve(at + 1);
        block_.spans[2 * at] = static_cast<int32_t>(begin);
        block_.spans[2 * at + 1] = static_cast<int32_t>(end);
        block_.words[at] = word_;
        if (!input_.words) ++word_;
    }
    ++block_.size;
}

void Encoder::take_words(const ScanState& state) {
    const int64_t words =
        kernels_.bounds(state.starts, state.members, state.size, scratch_.first.data(), scratch_.last.data());
    // every token takes a byte at least; entries are stored whole
    block_.ids.reserve(block_.size + state.size + CachedWord::kIds);
    if (options_.offsets) {
        take_spans(state, words);
    } else {
        take_ids(state, words);
    }
}

void Encoder::take_ids(const ScanState& state, int64_t words) {
    const Vocabulary::Words table = tokenizer_.vocabulary_.words();
    const uint32_t *first = scratch_.first.data(), *last = scratch_.last.data();
    int32_t* out = block_.ids.data() + block_.size;
    const int32_t* const end = block_.ids.data() + std::min(limit_, block_.ids.capacity());
    uint64_t low[kBatch], high[kBatch], hash[kBatch];
    uint32_t number[kBatch];
    for (int64_t begin = 0; begin < words && out < end; begin += kBatch) {
        // The loads of a batch do not wait for its branches.
        const int64_t count = std::min(words - begin, kBatch);
        for (int64_t i = 0; i < count; ++i) {
            const uint8_t* const word = state.bytes + first[begin + i];
            const int64_t size = static_cast<int64_t>(last[begin + i]) + 1 - first[begin + i];
            const WordMask& mask = kWordMasks[std::min(size, kShortWord)];
            low[i] = load64(word) & mask.low;
            high[i] = load64(word + 8) & mask.high;
            hash[i] = hash_word(low[i], high[i]);
            number[i] = table.slots[hash[i] >> table.shift];
        }
        for (int64_t i = 0; i < count && out < end; ++i) {
            const uint8_t* const word = state.bytes + first[begin + i];
            const int64_t size = static_cast<int64_t>(last[begin + i]) + 1 - first[begin + i];
            const WordKey& key = table.keys[number[i]];
            if (size > kShortWord) {
                out += take_long(word, size, out);
            } else if (key.low == low[i] && key.high == high[i]) {
                *out++ = table.ids[number[i]];
            } else {
                out += take_short(low[i], high[i], hash[i], word, size, out);
            }
        }
    }
    block_.size = out - block_.ids.data();
}

int64_t Encoder::take_short(uint64_t low, uint64_t high, uint64_t hash, const uint8_t* word, int64_t size,
                            int32_t* ids) {
    const Vocabulary::Words table = tokenizer_.vocabulary_.words();
    for (uint64_t slot = hash >> table.shift; table.slots[slot] != 0; slot = (slot + 1) & table.mask) {
        const WordKey& key = table.keys[table.slots[slot]];
        if (key.low == low && key.high == high) {
            ids[0] = table.ids[table.slots[slot]];
            return 1;
        }
    }
    return take_cached({low, high, 0, 0}, hash, word, size, ids);
}

int64_t Encoder::take_long(const uint8_t* word, int64_t size, int32_t* ids) {
    if (size > CachedWord::kBytes) return tokenizer_.vocabulary_.split(word, size, ids, nullptr);
    const WordMask& mask = kWordMasks[size - 16];
    const uint64_t key[4] = {load64(word), load64(word + 8), load64(word + 16) & mask.low,
                             load64(word + 24) & mask.high};
    return take_cached(key, hash_word(hash_word(key[0], key[1]) >> 20 ^ key[2], key[3]), word, size, ids);
}

int64_t Encoder::take_cached(const uint64_t (&key)[CachedWord::kBytes / 8], uint64_t hash, const uint8_t* word,
                             int64_t size, int32_t* ids) {
    CachedWord& known = scratch_.cache[hash >> kCacheShift & (scratch_.cache.size() - 1)];
    if (known.key[0] == key[0] && known.key[1] == key[1] && known.key[2] == key[2] && known.key[3] == key[3]) {
        std::memcpy(ids, known.ids, sizeof known.ids);
        return known.count;
    }
    const int64_t count = tokenizer_.vocabulary_.split(word, size, ids, nullptr);
    if (count <= CachedWord::kIds) {
        std::copy_n(key, 4, known.key);
        std::copy_n(ids, count, known.ids);
        known.count = static_cast<int32_t>(count);
    }
    return count;
}

void Encoder::take_spans(const ScanState& state, int64_t words) {
    const Vocabulary& vocabulary = tokenizer_.vocabulary_;
    block_.spans.reserve(2 * (block_.size + state.size) + 2);
    block_.words.reserve(block_.size + state.size + 1);
    for (int64_t i = 0; i < words && !full(); ++i) {
        const int64_t begin = scratch_.first[i], size = static_cast<int64_t>(scratch_.last[i]) + 1 - begin;
        scratch_.ends.reserve(size);
        int32_t* const ids = block_.ids.data() + block_.size;
        const int64_t count = vocabulary.split(state.bytes + begin, size, ids, scratch_.ends.data());
        int64_t from = begin;
        for (int64_t k = 0; k < count; ++k) {
            const int64_t to = begin + scratch_.ends[k], at = block_.size + k;
            block_.spans[2 * at] = state.sources[from];
            block_.spans[2 * at + 1] = state.sources[to - 1] + 1;
            block_.words[at] = word_;
            from = to;
        }
        block_.size += count;
        if (!input_.words) ++word_;
    }
}

}  // namespace fastbert
