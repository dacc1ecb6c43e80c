#include "encoder.h"

#include <algorithm>
#include <cstring>

#include "../cpu/dispatch.h"

namespace fastbert {

FASTBERT_DISPATCH(ScanKernels, scan_kernels)

namespace {

constexpr int64_t kChunk = 4096;    // units read at a time: what they become stays in the first cache
constexpr int64_t kLookBack = 512;  // how far a chunk's end is moved to come behind a space
constexpr int64_t kUnitsPerToken = 5;
constexpr int64_t kPadding = 64;  // vectors are written whole
constexpr int64_t kMostUnits = INT32_MAX - 64;
constexpr int64_t kBatch = 32;   // words whose table entries are fetched at a time
constexpr int kCacheShift = 24;  // other bits of the hash than those that choose a slot of the table
constexpr int64_t kUnlimited = INT64_MAX / 64;

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

// Walks the characters of a text. Stops at what is invalid.
template <Storage kStorage>
class TextCursor {
  public:
    static constexpr uint32_t kEnd = 0xFFFFFFFF;

    TextCursor(const Text& text, int64_t position) : text_(text), position_(position) { read(); }
    int64_t position() const { return position_; }
    uint32_t current() const { return current_; }
    void next() {
        position_ += units_;
        read();
    }
    bool previous() {
        if (position_ == 0) return false;
        --position_;
        if (kStorage == Storage::utf8) {
            const auto* p = static_cast<const uint8_t*>(text_.data);
            for (int i = 0; i < 3 && position_ > 0 && (p[position_] & 0xC0) == 0x80; ++i) --position_;
        }
        read();
        return true;
    }

  private:
    void read() {
        units_ = 1;
        if (position_ >= text_.size) {
            current_ = kEnd;
        } else if (kStorage == Storage::ucs1) {
            current_ = static_cast<const uint8_t*>(text_.data)[position_];
        } else if (kStorage == Storage::ucs2) {
            current_ = static_cast<const uint16_t*>(text_.data)[position_];
        } else if (kStorage == Storage::ucs4) {
            current_ = static_cast<const uint32_t*>(text_.data)[position_];
            if (current_ > 0x10FFFF) current_ = kEnd;
        } else {
            read_utf8();
        }
    }
    void read_utf8() {
        const auto* p = static_cast<const uint8_t*>(text_.data) + position_;
        const int64_t left = text_.size - position_;
        const uint32_t first = p[0];
        current_ = kEnd;
        const int units = first < 0x80   ? 1
                          : first < 0xC2 ? 0
                          : first < 0xE0 ? 2
                          : first < 0xF0 ? 3
                          : first < 0xF5 ? 4
                                         : 0;
        if (units == 0 || units > left) return;
        uint32_t c = units == 1 ? first : first & (0x7Fu >> units);
        for (int i = 1; i < units; ++i) {
            if ((p[i] & 0xC0) != 0x80) return;
            c = c << 6 | (p[i] & 0x3F);
        }
        constexpr uint32_t kLeast[] = {0, 0, 0x80, 0x800, 0x10000};
        if (c < kLeast[units] || c > 0x10FFFF || (c >= 0xD800 && c < 0xE000)) return;
        current_ = c;
        units_ = units;
    }

    const Text& text_;
    int64_t position_;
    uint32_t current_ = kEnd;
    int units_ = 1;

  public:
    TextCursor(const TextCursor&) = default;
    TextCursor& operator=(const TextCursor& other) {
        position_ = other.position_;
        current_ = other.current_;
        units_ = other.units_;
        return *this;
    }
};

class NormalizedCursor {
  public:
    static constexpr uint32_t kEnd = 0xFFFFFFFF;

    NormalizedCursor(const std::vector<NormalizedCharacter>& text, size_t position)
        : text_(&text), position_(position) {}
    int64_t position() const { return static_cast<int64_t>(position_); }
    uint32_t current() const { return position_ < text_->size() ? (*text_)[position_].c : kEnd; }
    void next() { ++position_; }
    bool previous() {
        if (position_ == 0) return false;
        --position_;
        return true;
    }

  private:
    const std::vector<NormalizedCharacter>* text_;
    size_t position_;
};

}  // namespace

void Scratch::reserve(int64_t size, bool with_sources) {
    bytes.reserve(size + kPadding);
    starts.reserve(size / 64 + 2);
    members.reserve(size / 64 + 2);
    first.reserve(size + kPadding);
    last.reserve(size + kPadding);
    if (with_sources) sources.reserve(size + kPadding);
}

size_t Scratch::memory() const {
    const int64_t words = first.capacity() + last.capacity() + ends.capacity() + sources.capacity() +
                          2 * (starts.capacity() + members.capacity());
    return static_cast<size_t>(bytes.capacity() + words * 4) + cache.size() * sizeof(CachedWord);
}

Encoder::Encoder(const WordPiece& tokenizer, const EncodeInput& input, const EncodeOptions& options, Scratch& scratch,
                 TokenBlock& block, int32_t block_index)
    : tokenizer_(tokenizer),
      input_(input),
      options_(options),
      kernels_(current_scan_kernels()),
      scratch_(scratch),
      block_(block),
      block_index_(block_index) {
    if (scratch_.cache.size() == 0) scratch_.cache.assign(size_t{1} << Scratch::kCacheBits, CachedWord{});
}

void Encoder::fail(EncodeError::Kind kind, const std::string& message, int64_t position) const {
    throw EncodeError(kind, sample_, position, message);
}

// ---- truncation and rows ----

void Encoder::truncate(const int64_t counts[2], bool pair, int64_t budget, int64_t keep[2]) const {
    keep[0] = counts[0];
    keep[1] = counts[1];
    if (counts[0] + counts[1] <= budget) return;
    if (budget == 0) {
        keep[0] = keep[1] = 0;
    } else if (options_.strategy == Strategy::longest_first) {
        if (!pair) {
            keep[0] = budget;
        } else {
            const bool swap = counts[0] > counts[1];
            const int64_t shorter = std::min(counts[0], counts[1]);
            int64_t less = shorter, more = shorter > budget ? shorter : std::max(shorter, budget - shorter);
            if (less + more > budget) {
                less = budget / 2;
                more = less + budget % 2;
            }
            keep[0] = swap ? more : less;
            keep[1] = swap ? less : more;
        }
    } else {
        const int side = options_.strategy == Strategy::only_second;
        if (side == 1 && !pair) fail(EncodeError::Kind::truncation, "Truncation error: Second sequence not provided");
        const int64_t excess = counts[0] + counts[1] - budget;
        if (counts[side] <= excess) {
            fail(EncodeError::Kind::truncation,
                 "Truncation error: Sequence to truncate too short to respect the provided max_length");
        }
        keep[side] = counts[side] - excess;
    }
    for (int side = 0; side < 2; ++side) {
        if (keep[side] < counts[side] && keep[side] > 0 && options_.stride >= keep[side]) {
            fail(EncodeError::Kind::stride, "stride is " + std::to_string(options_.stride) + "; expected less than " +
                                                std::to_string(keep[side]) +
                                                ", the tokens that truncation leaves of a sequence");
        }
    }
}

// The first is what is kept; the others overlap by `stride`.
std::vector<Encoder::Window> Encoder::windows(int64_t count, int64_t keep) const {
    if (keep >= count) return {{0, count}};
    if (keep == 0) return {{0, 0}, {0, count}};
    std::vector<Window> result;
    const int64_t step = keep - options_.stride;
    if (options_.truncate_left) {
        for (int64_t end = count;; end -= step) {
            const int64_t begin = std::max<int64_t>(end - keep, 0);
            result.push_back({begin, end - begin});
            if (begin == 0) break;
        }
    } else {
        for (int64_t begin = 0;; begin += step) {
            const int64_t end = std::min(begin + keep, count);
            result.push_back({begin, end - begin});
            if (end == count) break;
        }
    }
    return result;
}

void Encoder::encode(int64_t index, std::vector<Row>& rows) {
    sample_ = index;
    const Sample sample = input_.samples.empty() ? Sample{index, 1, -1} : input_.samples[static_cast<size_t>(index)];
    const bool pair = sample.pair_count >= 0;
    const Template& pieces = *tokenizer_.templates_[pair][options_.add_special_tokens];
    const int64_t special = static_cast<int64_t>(pieces.size()) - (pair ? 2 : 1);
    const bool limited = options_.max_length >= special;  // false for -1
    const int64_t budget = limited ? options_.max_length - special : kUnlimited;

    // One token more than can be kept tells as much about truncation as all of them, but for a tie of both sides.
    const bool early = limited && !options_.truncate_left && !options_.overflow;
    int64_t most[2] = {early ? budget + 1 : kUnlimited, early ? budget + 1 : kUnlimited};
    if (pair && options_.strategy == Strategy::only_first) most[1] = kUnlimited;
    if (pair && options_.strategy == Strategy::only_second) most[0] = kUnlimited;

    Row row = {};
    row.block = block_index_;
    row.sample = static_cast<int32_t>(index);
    row.pair = pair;
    int64_t counts[2] = {0, 0};
    for (;;) {
        row.begin[0] = block_.size;
        counts[0] = encode_sequence(sample.begin, sample.count, most[0]);
        row.begin[1] = block_.size;
        if (pair) counts[1] = encode_sequence(sample.begin + sample.count, sample.pair_count, most[1]);
        if (!early || !pair || budget % 2 == 0 || counts[0] <= budget || counts[1] <= budget) break;
        if (most[0] == kUnlimited && most[1] == kUnlimited) break;
        block_.size = row.begin[0];  // both go on: which one is longer decides who gets the odd token
        most[0] = most[1] = kUnlimited;
    }
    int64_t keep[2];
    truncate(counts, pair, budget, keep);
    if (!options_.overflow) {
        for (int side = 0; side < 2; ++side) {
            if (options_.truncate_left) row.begin[side] += counts[side] - keep[side];
            row.count[side] = keep[side];
        }
        rows.push_back(row);
        return;
    }

    // As Encoding::merge does it: every piece of the template joins its windows to all rows so far.
    std::vector<Row> overflowing;
    for (const TemplatePiece& piece : pieces) {
        if (piece.id >= 0) continue;
        const int side = piece.id == kSequenceB;
        const std::vector<Window> all = windows(counts[side], keep[side]);
        const auto with = [&](Row base, const Window& window, bool overflow) {
            base.begin[side] = row.begin[side] + window.begin;
            base.count[side] = window.count;
            base.overflow |= overflow;
            return base;
        };
        std::vector<Row> merged;
        for (const Row& before : overflowing) {
            for (const Window& window : all) merged.push_back(with(before, window, true));
        }
        for (size_t i = 1; i < all.size(); ++i) merged.push_back(with(row, all[i], true));
        row = with(row, all[0], false);
        overflowing = std::move(merged);
    }
    rows.push_back(row);
    rows.insert(rows.end(), overflowing.begin(), overflowing.end());
}

int64_t Encoder::encode_sequence(int64_t begin, int64_t count, int64_t most) {
    const int64_t first = block_.size;
    limit_ = first + most;
    word_ = 0;
    for (int64_t i = begin; i < begin + count; ++i) {
        if (input_.words) word_ = static_cast<int32_t>(i - begin);
        encode_text(input_.texts[static_cast<size_t>(i)]);
    }
    if (block_.size > limit_) block_.size = limit_;
    return block_.size - first;
}

// ---- one text ----

void Encoder::encode_text(const Text& text) {
    if (text.size > kMostUnits) {
        fail(EncodeError::Kind::too_long, "has " + std::to_string(text.size) + " characters; expected at most " +
                                              std::to_string(kMostUnits) + ": split it");
    }
    switch (text.storage) {
        case Storage::ucs1:
            return encode_text<Storage::ucs1>(text);
        case Storage::ucs2:
            return encode_text<Storage::ucs2>(text);
        case Storage::ucs4:
            return encode_text<Storage::ucs4>(text);
        case Storage::utf8:
            return encode_text<Storage::utf8>(text);
    }
}

// Where a chunk from `begin` on may end: behind a character that no word and no run of marks extends over.
template <Storage kStorage>
int64_t Encoder::chunk_end(const Text& text, int64_t begin) const {
    // no more than the tokens that are wanted are likely to take
    const int64_t chunk = std::min(kChunk, kLookBack + kUnitsPerToken * (limit_ - block_.size));
    if (text.size - begin <= chunk) return text.size;
    const int64_t wanted = begin + chunk;
    const auto unit = [&](int64_t i) -> uint32_t {
        if (kStorage == Storage::ucs2) return static_cast<const uint16_t*>(text.data)[i];
        if (kStorage == Storage::ucs4) return static_cast<const uint32_t*>(text.data)[i];
        return static_cast<const uint8_t*>(text.data)[i];
    };
    for (int64_t i = wanted; i > wanted - kLookBack; --i) {
        if (unit(i - 1) == ' ' && unit(i) < 0x80) return i;
    }
    const auto ends_word = [&](uint32_t entry) {
        const uint32_t kind = entry & kKindMask;
        return kind == kSelfAlone || kind == kSpace || kind == kAlone;
    };
    const auto is_plain = [&](uint32_t entry) {
        const uint32_t kind = entry & kKindMask;
        return kind == kSelfAlone || kind == kSpace || kind == kSelfWord;
    };
    int64_t from = wanted;
    if (kStorage == Storage::utf8) {
        while (from > wanted - 3 && (unit(from) & 0xC0) == 0x80) --from;
    }
    TextCursor<kStorage> at(text, from);
    for (bool ended = false; at.current() != TextCursor<kStorage>::kEnd; at.next()) {
        const uint32_t entry = tokenizer_.normalizer_.entry(at.current());
        if (ended && is_plain(entry)) return at.position();
        ended = ends_word(entry);
    }
    return text.size;
}

template <Storage kStorage>
std::vector<uint32_t> Encoder::characters(const Text& text, int64_t begin, int64_t end) const {
    std::vector<uint32_t> result;
    for (TextCursor<kStorage> at(text, begin); at.position() < end; at.next()) {
        const uint32_t c = at.current();
        if ((tokenizer_.normalizer_.entry(c) & kKindMask) == kInvalid) {
            fail(EncodeError::Kind::invalid, "is not valid", at.position());
        }
        result.push_back(c);
    }
    return result;
}

// The first added token that begins in [begin, end).
template <Storage kStorage>
bool Encoder::next_match(const Text& text, int64_t begin, int64_t end, int64_t left_end, int64_t* ignore,
                         AddedMatch* match) const {
    for (TextCursor<kStorage> at(text, begin); at.position() < end && at.current() != at.kEnd; at.next()) {
        if (at.position() < *ignore || !(tokenizer_.normalizer_.entry(at.current()) & kTrigger)) continue;
        const auto found = tokenizer_.raw_.match(at, left_end, options_.split_special_tokens, match);
        if (found == AddedTokens::Found::match) return true;
        if (found == AddedTokens::Found::discarded) *ignore = match->end;
    }
    return false;
}

// Code points in units [begin, end) of a text.
template <Storage kStorage>
int64_t characters_between(const Text& text, int64_t begin, int64_t end) {
    if (kStorage != Storage::utf8) return end - begin;
    return count_characters(static_cast<const uint8_t*>(text.data) + begin, end - begin);
}

template <Storage kStorage>
void Encoder::encode_text(const Text& text) {
    const auto scan = (options_.offsets ? kernels_.scan_with_sources : kernels_.scan)[static_cast<int>(kStorage)];
    const CharacterTable& table = tokenizer_.normalizer_.table();
    ScanState state = {};
    state.data = text.data;
    int64_t left_end = 0;  // of the match before
    while (state.position < text.size && !full()) {
        const int64_t begin = state.position, character = state.character;
        AddedMatch match;
        bool matched = false, general = !tokenizer_.normalized_.empty();
        state.end = general ? text.size : chunk_end<kStorage>(text, begin);
        if (!general) {
            reset(state, tokenizer_.normalizer_.most_bytes(kStorage, state.end - begin));
            ScanStop stop = scan(table, state);
            while (stop == ScanStop::trigger) {
                const TextCursor<kStorage> at(text, state.position);
                const auto found = tokenizer_.raw_.match(at, left_end, options_.split_special_tokens, &match);
                matched = found == AddedTokens::Found::match;
                if (matched) break;
                state.ignore = found == AddedTokens::Found::discarded ? match.end : state.position + 1;
                stop = scan(table, state);
            }
            if (stop == ScanStop::invalid) fail(EncodeError::Kind::invalid, "is not valid", state.position);
            general = stop == ScanStop::reorder;
            if (!general) take_words(state);
        }
        if (general) {
            matched = next_match<kStorage>(text, state.position, state.end, left_end, &state.ignore, &match);
            const int64_t end = matched ? std::max(match.begin, begin) : state.end;
            const std::vector<uint32_t> part = characters<kStorage>(text, begin, end);
            encode_generally(part, character);
            state.position = end;
            state.character = character + static_cast<int64_t>(part.size());
        }
        while (matched) {
            const int64_t lead = characters_between<kStorage>(text, match.begin, std::max(match.begin, begin));
            const int64_t in_chunk = characters_between<kStorage>(text, begin, std::max(match.begin, begin));
            const int64_t first = character + in_chunk - lead;
            const int64_t last = first + characters_between<kStorage>(text, match.begin, match.end);
            append_added(match.id, first, last);
            state.position = match.end;
            state.character = last;
            left_end = match.end;
            // what rstrip has taken may still start another token
            matched = match.token_end < match.end &&
                      next_match<kStorage>(text, match.token_end, match.end, left_end, &state.ignore, &match);
        }
    }
    int64_t position;
    if (state.position < text.size &&
        !kernels_.valid[static_cast<int>(kStorage)](text.data, state.position, text.size, &position)) {
        fail(EncodeError::Kind::invalid, "is not valid", position);
    }
}

void Encoder::reset(ScanState& state, int64_t bytes) {
    scratch_.reserve(bytes, options_.offsets);
    state.bytes = scratch_.bytes.data();
    state.starts = scratch_.starts.data();
    state.members = scratch_.members.data();
    state.sources = scratch_.sources.data();
    state.starts[0] = state.members[0] = 0;
    state.size = 0;
    state.in_word = 0;
}

// A segment as the specification has it, whatever is in it.
void Encoder::encode_generally(const std::vector<uint32_t>& segment, int64_t character) {
    const std::vector<NormalizedCharacter> text = tokenizer_.normalizer_.normalize(segment, character);
    const AddedTokens& added = tokenizer_.normalized_;
    const size_t size = text.size();
    size_t begin = 0;
    const auto take = [&](size_t end) {
        if (begin < end) take_normalized(text.data() + begin, text.data() + end);
    };
    if (!added.empty()) {
        size_t ignore = 0;
        for (size_t i = 0; i < size && !full(); ++i) {
            AddedMatch match;
            if (i < ignore) continue;
            const NormalizedCursor at(text, i);
            const auto found = added.match(at, static_cast<int64_t>(begin), options_.split_special_tokens, &match);
            if (found == AddedTokens::Found::nothing) continue;
            ignore = static_cast<size_t>(match.token_end);
            if (found == AddedTokens::Found::discarded) continue;
            take(static_cast<size_t>(match.begin));
            if (full()) return;
            const size_t first = static_cast<size_t>(match.begin), last = static_cast<size_t>(match.end) - 1;
            append_added(match.id, text[first].source, text[last].source + 1);
            begin = static_cast<size_t>(match.end);
        }
    }
    if (!full()) take(size);
}

void Encoder::take_normalized(const NormalizedCharacter* begin, const NormalizedCharacter* end) {
    ScanState state = {};
    reset(state, 4 * (end - begin));
    for (const NormalizedCharacter* each = begin; each != end; ++each) {
        uint8_t* out = state.bytes + state.size;
        const uint32_t c = each->c;
        const SequenceClass split = tokenizer_.normalizer_.split_class(c);
        int count = 1;
        if (split == kSeparator) {
            out[0] = ' ';
        } else {
            count = write_utf8(c, out);
        }
        for (int i = 0; i < count; ++i, ++state.size) {
            if (options_.offsets) state.sources[state.size] = each->source;
            const int64_t word = state.size >> 6;
            const int bit = static_cast<int>(state.size & 63);
            if (bit == 0) state.starts[word] = state.members[word] = 0;
            const bool starts = i == 0 && split != kSeparator && (split == kOnItsOwn || !state.in_word);
            state.starts[word] |= static_cast<uint64_t>(starts) << bit;
            state.members[word] |= static_cast<uint64_t>(split != kSeparator) << bit;
        }
        state.in_word = split == kInWord;
    }
    take_words(state);
}

// ---- words to tokens ----

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
    const Vocabulary& vocabulary = tokenizer_.vocabulary_;
    const WordEntry* const table = vocabulary.words();
    const int shift = vocabulary.shift();
    const uint32_t *first = scratch_.first.data(), *last = scratch_.last.data();
    int32_t* out = block_.ids.data() + block_.size;
    const int32_t* const end = block_.ids.data() + std::min(limit_, block_.ids.capacity());
    uint64_t low[kBatch], high[kBatch], hash[kBatch];
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
            __builtin_prefetch(table + (hash[i] >> shift));
        }
        for (int64_t i = 0; i < count && out < end; ++i) {
            const uint8_t* const word = state.bytes + first[begin + i];
            const int64_t size = static_cast<int64_t>(last[begin + i]) + 1 - first[begin + i];
            const WordEntry* const entry = table + (hash[i] >> shift);
            if (size > kShortWord) {
                out += take_long(word, size, out);
            } else if (entry->low == low[i] && entry->high == high[i]) {
                *out++ = entry->id;
            } else {
                out += take_short(entry, low[i], high[i], hash[i], word, size, out);
            }
        }
    }
    block_.size = out - block_.ids.data();
}

int64_t Encoder::take_short(const WordEntry* entry, uint64_t low, uint64_t high, uint64_t hash, const uint8_t* word,
                            int64_t size, int32_t* ids) {
    const Vocabulary& vocabulary = tokenizer_.vocabulary_;
    while (entry->count != 0) {
        const uint64_t next = (static_cast<uint64_t>(entry - vocabulary.words()) + 1) & vocabulary.slot_mask();
        entry = vocabulary.words() + next;
        if (entry->low == low && entry->high == high) {
            ids[0] = entry->id;
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
