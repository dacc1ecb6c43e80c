#include "encoder.h"

#include <algorithm>

#include "../cpu/dispatch.h"

namespace fastbert {

FASTBERT_DISPATCH(ScanKernels, scan_kernels)

namespace {

constexpr int64_t kPadding = 64;  // vectors are read and written whole
constexpr int64_t kUnlimited = INT64_MAX / 64;

}  // namespace

void Scratch::reserve(int64_t size, bool with_sources) {
    bytes.reserve(size + kPadding);
    starts.reserve(size / 64 + 2);
    members.reserve(size / 64 + 2);
    if (with_sources) sources.reserve(size + kPadding);
}

size_t Scratch::memory() const {
    const int64_t words = first.capacity() + last.capacity() + ends.capacity() + sources.capacity() +
                          2 * (starts.capacity() + members.capacity());
    return static_cast<size_t>(bytes.capacity() + words * 4) + cache.size() * sizeof(CachedWord) +
           long_cache.size() * sizeof(CachedLongWord);
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
    if (scratch_.cache.size() == 0) {
        scratch_.cache.assign(size_t{2} << Scratch::kCacheBits, CachedWord{kNoWord, {}, 0});
        scratch_.long_cache.assign(size_t{1} << Scratch::kLongCacheBits, CachedLongWord{});
    }
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

}  // namespace fastbert
