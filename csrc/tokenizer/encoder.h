// The encoding of one run of texts by one thread.
#pragma once

#include <cstdint>
#include <vector>

#include "encodings.h"
#include "wordpiece.h"

namespace fastbert {

// What the ids of a short word are. Two share a line of the caches, the later first. One of more than three ids has the
// line for itself: the second's key is then kNoWord and its ids go on.
struct alignas(32) CachedWord {
    static constexpr int64_t kIds = 3;

    WordKey key;
    int32_t ids[kIds];
    int32_t count;
};

// The same of a longer word: a line.
struct alignas(64) CachedLongWord {
    static constexpr int64_t kBytes = 32;
    static constexpr int64_t kIds = 7;

    uint64_t key[kBytes / 8];  // zeros behind it
    int32_t ids[kIds];
    int32_t count;
};

// Working memory of a thread, used again by later calls. No result depends on what is in it.
struct Scratch {
    static constexpr int kCacheBits = 15;         // of lines: a large page
    static constexpr int kLongCacheBits = 13;     // of words
    static constexpr size_t kMostKept = 3 << 20;  // bytes

    Buffer<uint8_t> bytes;
    Buffer<uint64_t> starts, members;
    Buffer<uint32_t> first, last, ends;
    Buffer<int32_t> sources;
    LookupArray<CachedWord> cache;  // by hash
    LookupArray<CachedLongWord> long_cache;

    void reserve(int64_t size, bool with_sources);
    size_t memory() const;
};

class Encoder {
  public:
    Encoder(const WordPiece& tokenizer, const EncodeInput& input, const EncodeOptions& options, Scratch& scratch,
            TokenBlock& block, int32_t block_index);

    // Appends the rows of a sample. Throws EncodeError.
    void encode(int64_t sample, std::vector<Row>& rows);

  private:
    struct Window {
        int64_t begin, count;
    };

    // Appends the tokens of one side of a sample, at most `most` (and stops early); returns how many.
    int64_t encode_sequence(int64_t begin, int64_t count, int64_t most);
    void encode_text(const Text& text);
    template <Storage kStorage>
    void encode_text(const Text& text);
    template <Storage kStorage>
    int64_t chunk_end(const Text& text, int64_t begin) const;
    template <Storage kStorage>
    std::vector<uint32_t> characters(const Text& text, int64_t begin, int64_t end) const;
    void encode_generally(const std::vector<uint32_t>& segment, int64_t character);
    template <Storage kStorage>
    bool next_match(const Text& text, int64_t begin, int64_t end, int64_t left_end, int64_t* ignore,
                    AddedMatch* match) const;

    // Empties the scratch buffers and makes room for so many bytes.
    void reset(ScanState& state, int64_t bytes);
    void take_normalized(const NormalizedCharacter* begin, const NormalizedCharacter* end);
    // Appends the tokens of the words in the scratch buffers.
    void take_words(const ScanState& state);
    template <bool kSpans>
    void take_words(const ScanState& state, int64_t words);
    // Notes where the pieces of a word are that took `count` ids from `at` on.
    void take_spans(const ScanState& state, int64_t word, int64_t at, int64_t count);
    // A word that is not in the cache with up to three ids. Both write the ids and return how many.
    int64_t take_short(const WordKey& key, uint64_t hash, const uint8_t* word, int64_t size, int32_t* ids);
    int64_t take_long(const uint8_t* word, int64_t size, int32_t* ids);
    CachedWord* line_of(uint64_t hash) { return &scratch_.cache[2 * (hash >> (64 - Scratch::kCacheBits))]; }
    void append_added(int32_t id, int64_t begin, int64_t end);

    bool full() const { return block_.size >= limit_; }
    void truncate(const int64_t counts[2], bool pair, int64_t budget, int64_t keep[2]) const;
    std::vector<Window> windows(int64_t count, int64_t keep) const;
    [[noreturn]] void fail(EncodeError::Kind kind, const std::string& message, int64_t position = 0) const;

    const WordPiece& tokenizer_;
    const EncodeInput& input_;
    const EncodeOptions& options_;
    const ScanKernels& kernels_;
    Scratch& scratch_;
    TokenBlock& block_;
    const int32_t block_index_;
    int64_t sample_ = 0;
    int64_t limit_ = 0;  // of block_.size
    int32_t word_ = 0;   // the next word's index, or that of all where the caller has split the text
};

}  // namespace fastbert
