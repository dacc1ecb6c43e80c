// One text: chunks for the inner loops, added tokens between them, and the general normalizer where the loops give up.
#include <algorithm>

#include "cursors.h"
#include "encoder.h"

namespace fastbert {
namespace {

constexpr int64_t kChunk = 4096;    // units read at a time: what they become stays in the first cache
constexpr int64_t kLookBack = 512;  // how far a chunk's end is moved to come behind a space
constexpr int64_t kUnitsPerToken = 5;
constexpr int64_t kMostUnits = INT32_MAX - 64;

}  // namespace

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
    int64_t end_of_chunk = 0;
    while (state.position < text.size && !full()) {
        const int64_t begin = state.position, character = state.character;
        AddedMatch match;
        bool matched = false, general = !tokenizer_.normalized_.empty();
        if (begin >= end_of_chunk) end_of_chunk = general ? text.size : chunk_end<kStorage>(text, begin);
        state.end = end_of_chunk;
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
}  // namespace fastbert
