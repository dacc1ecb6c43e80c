// BERT's WordPiece tokenizer, exactly as Hugging Face `tokenizers` has it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "added_tokens.h"
#include "encodings.h"
#include "normalizer.h"
#include "scan.h"
#include "vocabulary.h"

namespace fastbert {

enum class Strategy { longest_first, only_first, only_second };

struct EncodeOptions {
    bool add_special_tokens = true;
    int64_t max_length = -1;  // with special tokens; -1: none
    Strategy strategy = Strategy::longest_first;
    int64_t stride = 0;
    bool truncate_left = false;
    bool overflow = false;
    bool offsets = false;
    bool split_special_tokens = false;
    int threads = 1;
};

// One text or pair: `count` parts from texts[begin] on, more than one where the caller has split it into words.
struct Sample {
    int64_t begin, count;
    int64_t pair_count;  // parts of the second text, behind those of the first; -1: no pair
};

struct EncodeInput {
    std::vector<Text> texts;
    std::vector<Sample> samples;  // none: every text is one
    bool words = false;           // the texts are words
};

// What is wrong with a text: the first one, whatever the number of threads.
class EncodeError : public std::runtime_error {
  public:
    enum class Kind { invalid, too_long, truncation, stride };
    EncodeError(Kind kind, int64_t sample, int64_t position, const std::string& message)
        : std::runtime_error(message), kind(kind), sample(sample), position(position) {}

    Kind kind;
    int64_t sample;
    int64_t position;  // in units, of what is invalid
};

struct WordPieceOptions {
    std::vector<std::pair<std::string, int32_t>> vocabulary;  // UTF-8, U+0000 written C0 80
    int32_t unk_id;
    std::string prefix;
    int64_t max_input_chars_per_word;
    NormalizerFlags normalizer;
    std::vector<AddedToken> added_tokens;
    Template single, pair;
};

struct Scratch;
class Encoder;

class WordPiece {
  public:
    // Throws std::invalid_argument for an added token that is empty, or becomes so when normalized.
    explicit WordPiece(WordPieceOptions options);
    ~WordPiece();
    WordPiece(const WordPiece&) = delete;
    WordPiece& operator=(const WordPiece&) = delete;

    // Throws EncodeError. Any number of threads may call it at once.
    Encodings encode(const EncodeInput& input, const EncodeOptions& options) const;

    std::vector<NormalizedCharacter> normalize(const std::vector<uint32_t>& text) const {
        return normalizer_.normalize(text, 0);
    }
    int64_t special_tokens(bool pair) const;
    int32_t unk_id() const { return vocabulary_.unk_id(); }
    size_t memory() const;

  private:
    friend class Encoder;
    friend class ScratchLease;

    static constexpr int kScratches = 4;  // kept between calls

    Vocabulary vocabulary_;
    AddedTokens raw_, normalized_;  // matched before and after normalization
    Normalizer normalizer_;
    std::shared_ptr<const Template> templates_[2][2];  // [pair][with special tokens]
    mutable std::atomic<Scratch*> scratches_[kScratches] = {};
};

}  // namespace fastbert
