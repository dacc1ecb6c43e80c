// Words to tokens: the table of words that are one piece, the cache of others, the trie.
#include <algorithm>
#include <cstring>

#include "encoder.h"

namespace fastbert {
namespace {

constexpr int64_t kBoundsPadding = 64;  // vectors are written whole
constexpr int64_t kBatch = 64;          // words whose lines of the caches are fetched at a time

// The bytes of a 16-byte load that belong to a word of this size; none of a longer one, so that its key is no word's.
constexpr uint64_t ones(int bytes) {
    return bytes <= 0 ? 0 : bytes >= 8 ? ~uint64_t{0} : (uint64_t{1} << (8 * bytes)) - 1;
}
#define MASK(n) {ones(n), ones((n) - 8)}
constexpr WordKey kWordMasks[kShortWord + 2] = {MASK(0),  MASK(1),  MASK(2),  MASK(3),  MASK(4),  MASK(5),
                                                MASK(6),  MASK(7),  MASK(8),  MASK(9),  MASK(10), MASK(11),
                                                MASK(12), MASK(13), MASK(14), MASK(15), MASK(16), {0, 0}};
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
    scratch_.first.reserve(state.size + kBoundsPadding);
    scratch_.last.reserve(state.size + kBoundsPadding);
    const int64_t words =
        kernels_.bounds(state.starts, state.members, state.size, scratch_.first.data(), scratch_.last.data());
    // every token takes a byte at least; entries are stored whole
    block_.ids.reserve(block_.size + state.size + CachedLongWord::kIds);
    if (options_.offsets) {
        block_.spans.reserve(2 * (block_.size + state.size) + 2);
        block_.words.reserve(block_.size + state.size + 1);
        take_words<true>(state, words);
    } else {
        take_words<false>(state, words);
    }
}

template <bool kSpans>
void Encoder::take_words(const ScanState& state, int64_t words) {
    int32_t* out = block_.ids.data() + block_.size;
    const int32_t* const end = block_.ids.data() + std::min(limit_, block_.ids.capacity());
    WordKey keys[kBatch];
    uint64_t hashes[kBatch];
    for (int64_t begin = 0; begin < words && out < end; begin += kBatch) {
        // No load waits for another word's.
        const uint32_t *first = scratch_.first.data() + begin, *last = scratch_.last.data() + begin;
        const int64_t count = std::min(words - begin, kBatch);
        for (int64_t i = 0; i < count; ++i) {
            const uint8_t* const word = state.bytes + first[i];
            const WordKey& mask = kWordMasks[std::min<uint32_t>(last[i] + 1 - first[i], kShortWord + 1)];
            keys[i] = {load64(word) & mask.low, load64(word + 8) & mask.high};
            hashes[i] = hash_word(keys[i]);
            __builtin_prefetch(line_of(hashes[i]));
        }
        for (int64_t i = 0; i < count; ++i) {
            const CachedWord* const line = line_of(hashes[i]);
            const CachedWord& entry = line[!(line[0].key == keys[i])];
            int64_t taken = entry.count;
            if (__builtin_expect(entry.key == keys[i] && taken <= CachedWord::kIds, 1)) {
                std::memcpy(out, entry.ids, sizeof entry.ids + sizeof entry.count);
            } else {
                const uint8_t* const word = state.bytes + first[i];
                const int64_t size = static_cast<int64_t>(last[i]) + 1 - first[i];
                taken =
                    size > kShortWord ? take_long(word, size, out) : take_short(keys[i], hashes[i], word, size, out);
            }
            if (kSpans) take_spans(state, begin + i, out - block_.ids.data(), taken);
            out += taken;
        }
    }
    block_.size = out - block_.ids.data();
}

int64_t Encoder::take_short(const WordKey& key, uint64_t hash, const uint8_t* word, int64_t size, int32_t* ids) {
    constexpr int64_t kEach = CachedWord::kIds;
    // Its own line, and the line beside it for what found its own one full.
    CachedWord* const lines[] = {line_of(hash), line_of(hash ^ uint64_t{1} << (64 - Scratch::kCacheBits))};
    for (const CachedWord* line : lines) {
        if (!(line[0].key == key || line[1].key == key)) continue;
        const CachedWord& known = line[!(line[0].key == key)];
        std::memcpy(ids, known.ids, sizeof known.ids);
        if (known.count > kEach) std::memcpy(ids + kEach, line[1].ids, sizeof line[1].ids);
        return known.count;
    }
    const Vocabulary::Words table = tokenizer_.vocabulary_.words();
    uint64_t slot = hash >> table.shift;
    while (!(table.slots[slot].key == key) && !(table.slots[slot].key == kNoWord)) slot = (slot + 1) & table.mask;
    int64_t count = 1;
    if (table.slots[slot].key == key) {
        ids[0] = table.slots[slot].id;
    } else {
        count = tokenizer_.vocabulary_.split(word, size, ids, nullptr);
        if (count > 2 * kEach) return count;
    }
    const bool wide = count > kEach;
    const auto has_room = [&](const CachedWord* line) {
        return wide ? line[0].key == kNoWord : line[1].key == kNoWord && line[0].count <= kEach;
    };
    CachedWord* const line = lines[!has_room(lines[0]) && has_room(lines[1])];
    if (wide || line[0].count > kEach) {
        line[1].key = kNoWord;
    } else {
        line[1] = line[0];
    }
    line[0].key = key;
    line[0].count = static_cast<int32_t>(count);
    std::memcpy(line[0].ids, ids, sizeof line[0].ids);
    if (wide) std::memcpy(line[1].ids, ids + kEach, sizeof line[1].ids);
    return count;
}

int64_t Encoder::take_long(const uint8_t* word, int64_t size, int32_t* ids) {
    if (size > CachedLongWord::kBytes) return tokenizer_.vocabulary_.split(word, size, ids, nullptr);
    const WordKey& mask = kWordMasks[size - kShortWord];
    const uint64_t key[4] = {load64(word), load64(word + 8), load64(word + 16) & mask.low,
                             load64(word + 24) & mask.high};
    const uint64_t hash = hash_word({hash_word({key[0], key[1]}) >> 20 ^ key[2], key[3]});
    CachedLongWord& known = scratch_.long_cache[hash >> (64 - Scratch::kLongCacheBits)];
    if (std::equal(key, key + 4, known.key)) {
        std::memcpy(ids, known.ids, sizeof known.ids);
        return known.count;
    }
    const int64_t count = tokenizer_.vocabulary_.split(word, size, ids, nullptr);
    if (count <= CachedLongWord::kIds) {
        std::copy_n(key, 4, known.key);
        std::copy_n(ids, count, known.ids);
        known.count = static_cast<int32_t>(count);
    }
    return count;
}

void Encoder::take_spans(const ScanState& state, int64_t word, int64_t at, int64_t count) {
    const int64_t begin = scratch_.first[word], size = static_cast<int64_t>(scratch_.last[word]) + 1 - begin;
    uint32_t whole = static_cast<uint32_t>(size);
    const uint32_t* ends = &whole;
    if (count > 1) {  // the caches have the ids alone
        scratch_.ends.reserve(size);
        tokenizer_.vocabulary_.split(state.bytes + begin, size, block_.ids.data() + at, scratch_.ends.data());
        ends = scratch_.ends.data();
    }
    int64_t from = begin;
    for (int64_t i = at; i < at + count; ++i) {
        const int64_t to = begin + *ends++;
        block_.spans[2 * i] = state.sources[from];
        block_.spans[2 * i + 1] = state.sources[to - 1] + 1;
        block_.words[i] = word_;
        from = to;
    }
    if (!input_.words) ++word_;
}

}  // namespace fastbert
