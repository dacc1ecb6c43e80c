#include "wordpiece.h"

#include <algorithm>
#include <exception>

#include "encoder.h"
#include "parallel.h"

namespace fastbert {
namespace {

constexpr int64_t kUnitsForThreads = 1 << 16;  // fewer are encoded before a second thread has started
constexpr int64_t kBlocksPerThread = 4;        // so that one slow run of texts does not hold up the rest

// Room that most texts do not exceed, for memory that need not move.
int64_t expected_tokens(int64_t units, int64_t samples, const EncodeOptions& options) {
    constexpr int64_t kUnitsPerToken = 3, kSpare = 4096;
    // a short text's in a chunk that malloc has at hand
    const int64_t tokens = std::min(units + 16, units / kUnitsPerToken + kSpare);
    const bool bounded = options.max_length > 0 && !options.overflow && options.max_length < tokens / (samples + 1);
    return bounded ? samples * options.max_length + kSpare : tokens;
}

Template without_special_tokens(const Template& pieces) {
    Template sequences;
    std::copy_if(pieces.begin(), pieces.end(), std::back_inserter(sequences),
                 [](const TemplatePiece& piece) { return piece.id < 0; });
    return sequences;
}

std::vector<uint32_t> triggers_of(const std::vector<AddedToken>& tokens) {
    std::vector<uint32_t> triggers;
    for (const AddedToken& token : tokens) {
        if (token.content.empty()) {
            throw std::invalid_argument("added token " + std::to_string(token.id) + " is empty");
        }
        if (!token.normalized) triggers.push_back(token.content[0]);
    }
    return triggers;
}

}  // namespace

// A thread's working memory: one that is lying around, or a new one. Without locks, which a fork could leave locked.
class ScratchLease {
  public:
    explicit ScratchLease(const WordPiece& tokenizer) : tokenizer_(tokenizer) {
        for (auto& slot : tokenizer_.scratches_) {
            if (slot.load(std::memory_order_relaxed) == nullptr) continue;
            if ((scratch_ = slot.exchange(nullptr, std::memory_order_acquire))) return;
        }
        scratch_ = new Scratch;
    }
    ScratchLease(const ScratchLease&) = delete;
    ScratchLease& operator=(const ScratchLease&) = delete;
    ~ScratchLease() {
        if (scratch_->memory() <= Scratch::kMostKept) {
            for (auto& slot : tokenizer_.scratches_) {
                Scratch* none = nullptr;
                if (slot.compare_exchange_strong(none, scratch_, std::memory_order_release, std::memory_order_relaxed))
                    return;
            }
        }
        delete scratch_;
    }
    Scratch& operator*() { return *scratch_; }

  private:
    const WordPiece& tokenizer_;
    Scratch* scratch_ = nullptr;
};

WordPiece::WordPiece(WordPieceOptions options)
    : vocabulary_(options.vocabulary, {options.unk_id, options.prefix, options.max_input_chars_per_word}),
      normalizer_(options.normalizer, triggers_of(options.added_tokens)) {
    for (AddedToken& token : options.added_tokens) {
        if (!token.normalized) {
            raw_.add(token);
            continue;
        }
        std::vector<uint32_t> content;
        for (const NormalizedCharacter& each : normalizer_.normalize(token.content, 0)) content.push_back(each.c);
        if (content.empty()) {
            throw std::invalid_argument("added token " + std::to_string(token.id) +
                                        " is empty once normalized: give it normalized=False");
        }
        token.content = std::move(content);
        normalized_.add(token);
    }
    templates_[0][0] = std::make_shared<const Template>(without_special_tokens(options.single));
    templates_[0][1] = std::make_shared<const Template>(std::move(options.single));
    templates_[1][0] = std::make_shared<const Template>(without_special_tokens(options.pair));
    templates_[1][1] = std::make_shared<const Template>(std::move(options.pair));
}

WordPiece::~WordPiece() {
    for (auto& slot : scratches_) delete slot.load();
}

int64_t WordPiece::special_tokens(bool pair) const {
    return static_cast<int64_t>(templates_[pair][1]->size() - templates_[pair][0]->size());
}

size_t WordPiece::memory() const {
    // the working memory counts in full, although it grows with use
    return sizeof *this + vocabulary_.memory() + raw_.memory() + normalized_.memory() + normalizer_.memory() +
           kScratches * Scratch::kMostKept;
}

Encodings WordPiece::encode(const EncodeInput& input, const EncodeOptions& options) const {
    Encodings result;
    result.single = templates_[0][options.add_special_tokens];
    result.pair = templates_[1][options.add_special_tokens];
    result.offsets = options.offsets;
    result.threads = options.threads;

    const bool plain = input.samples.empty();
    const int64_t samples = static_cast<int64_t>(plain ? input.texts.size() : input.samples.size());
    int64_t units = 0;
    if (options.threads > 1) {
        for (const Text& text : input.texts) units += text.size;
    }
    if (units < kUnitsForThreads || samples < 2) {
        result.blocks.resize(1);
        result.rows.reserve(static_cast<size_t>(samples));
        if (units == 0) {
            for (const Text& text : input.texts) units += text.size;
        }
        result.blocks[0].ids.reserve(expected_tokens(units, samples, options));
        ScratchLease scratch(*this);
        Encoder encoder(*this, input, options, *scratch, result.blocks[0], 0);
        for (int64_t i = 0; i < samples; ++i) encoder.encode(i, result.rows);
        result.finish();
        return result;
    }

    // Runs of samples of about the same size.
    const int64_t wanted = std::min(samples, options.threads * kBlocksPerThread);
    std::vector<int64_t> bounds{0};
    int64_t seen = 0;
    for (int64_t i = 0; i < samples; ++i) {
        int64_t begin = i, end = i + 1;
        if (!plain) {
            const Sample& sample = input.samples[static_cast<size_t>(i)];
            begin = sample.begin;
            end = begin + sample.count + std::max<int64_t>(sample.pair_count, 0);
        }
        for (int64_t k = begin; k < end; ++k) seen += input.texts[static_cast<size_t>(k)].size;
        if (seen >= units * static_cast<int64_t>(bounds.size()) / wanted && i + 1 < samples) bounds.push_back(i + 1);
    }
    bounds.push_back(samples);
    const size_t runs = bounds.size() - 1;
    result.blocks.resize(runs);
    std::vector<std::vector<Row>> rows(runs);
    std::vector<std::exception_ptr> errors(runs);
    run_on_threads(static_cast<int64_t>(runs), options.threads, [&](int64_t run) {
        const size_t at = static_cast<size_t>(run);
        try {
            const int64_t count = bounds[at + 1] - bounds[at];
            rows[at].reserve(static_cast<size_t>(count));
            result.blocks[at].ids.reserve(expected_tokens(units / static_cast<int64_t>(runs), count, options));
            ScratchLease scratch(*this);
            Encoder encoder(*this, input, options, *scratch, result.blocks[at], static_cast<int32_t>(run));
            for (int64_t i = bounds[at]; i < bounds[at + 1]; ++i) encoder.encode(i, rows[at]);
        } catch (...) {
            errors[at] = std::current_exception();
        }
    });
    for (const std::exception_ptr& error : errors) {
        if (error) std::rethrow_exception(error);  // of the first text, as runs are in order
    }
    result.rows.reserve(static_cast<size_t>(samples));
    for (const std::vector<Row>& part : rows) result.rows.insert(result.rows.end(), part.begin(), part.end());
    result.finish();
    return result;
}

}  // namespace fastbert
