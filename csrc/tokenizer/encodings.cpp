#include "encodings.h"

#include <algorithm>
#include <stdexcept>

#include "parallel.h"

namespace fastbert {
namespace {

constexpr const char* kFieldNames[] = {"input_ids",    "token_type_ids", "attention_mask", "special_tokens_mask",
                                       "position_ids", "offset_mapping", "word_ids",       "sequence_ids"};
constexpr int64_t kTokensForThreads = 1 << 18;  // fewer are written before a second thread has started

void widen(const int32_t* from, int64_t count, int64_t* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

int64_t parts_for(int64_t tokens, int threads, int64_t rows) {
    return tokens < kTokensForThreads ? 1 : std::min<int64_t>(threads, rows);
}

}  // namespace

Field field_named(const std::string& name) {
    std::string names;
    for (size_t i = 0; i < std::size(kFieldNames); ++i) {
        if (name == kFieldNames[i]) return static_cast<Field>(i);
        names += std::string(i ? ", " : "") + kFieldNames[i];
    }
    throw std::invalid_argument("field is \"" + name + "\"; expected one of " + names);
}

void Encodings::finish() {
    const auto special = [](const Template& pieces) {
        return std::count_if(pieces.begin(), pieces.end(), [](const TemplatePiece& piece) { return piece.id >= 0; });
    };
    special_ = special(*single);
    pair_special_ = special(*pair);
    total_ = longest_ = 0;
    for (const Row& row : rows) {
        total_ += length(row);
        longest_ = std::max(longest_, length(row));
    }
}

void Encodings::check(Field field) const {
    if ((field == Field::offset_mapping || field == Field::word_ids) && !offsets) {
        throw std::invalid_argument(std::string(kFieldNames[static_cast<int>(field)]) +
                                    " was not kept: encode with offsets=True");
    }
}

void Encodings::write_row(Field field, const Row& row, int64_t* out) const {
    if (field == Field::attention_mask) {
        std::fill_n(out, length(row), int64_t{1});
        return;
    }
    if (field == Field::position_ids) {
        for (int64_t i = 0; i < length(row); ++i) out[i] = i;
        return;
    }
    const TokenBlock& block = blocks[static_cast<size_t>(row.block)];
    for (const TemplatePiece& piece : template_of(row)) {
        const bool is_sequence = piece.id < 0;
        const int which = piece.id == kSequenceB;
        const int64_t begin = is_sequence ? row.begin[which] : 0, count = is_sequence ? row.count[which] : 1;
        switch (field) {
            case Field::input_ids:
                if (is_sequence) {
                    widen(block.ids.data() + begin, count, out);
                } else {
                    *out = piece.id;
                }
                break;
            case Field::token_type_ids:
                // `tokenizers` gives the template's types to a text's first row only
                std::fill_n(out, count, int64_t{is_sequence && row.overflow ? which : piece.type});
                break;
            case Field::special_tokens_mask:
                std::fill_n(out, count, int64_t{!is_sequence});
                break;
            case Field::offset_mapping:
                if (is_sequence) {
                    widen(block.spans.data() + 2 * begin, 2 * count, out);
                } else {
                    out[0] = out[1] = 0;
                }
                break;
            case Field::word_ids:
                if (is_sequence) {
                    widen(block.words.data() + begin, count, out);
                } else {
                    *out = -1;
                }
                break;
            default:
                std::fill_n(out, count, int64_t{is_sequence ? which : -1});
        }
        out += count * width(field);
    }
}

void Encodings::write_packed(const std::vector<Output>& outputs) const {
    struct Run {
        size_t row;
        int64_t token;
    };
    // Runs of rows with about as many tokens each.
    const int64_t parts = parts_for(total_, threads, static_cast<int64_t>(rows.size()));
    std::vector<Run> runs{{0, 0}};
    int64_t seen = 0;
    for (size_t i = 0; i < rows.size() && parts > 1; ++i) {
        seen += length(rows[i]);
        if (seen >= total_ * static_cast<int64_t>(runs.size()) / parts && i + 1 < rows.size()) {
            runs.push_back({i + 1, seen});
        }
    }
    const int64_t count = static_cast<int64_t>(runs.size());
    runs.push_back({rows.size(), total_});
    run_on_threads(count, count, [&](int64_t run) {
        int64_t token = runs[static_cast<size_t>(run)].token;
        const size_t end = runs[static_cast<size_t>(run) + 1].row;
        for (size_t i = runs[static_cast<size_t>(run)].row; i < end; ++i) {
            for (const Output& each : outputs) write_row(each.field, rows[i], each.out + token * width(each.field));
            token += length(rows[i]);
        }
    });
}

void Encodings::write_padded(Field field, int64_t length, int64_t value, bool left, int64_t* out) const {
    if (length < longest_) {
        throw std::invalid_argument("length is " + std::to_string(length) + "; expected at least " +
                                    std::to_string(longest_) + ", the length of the longest row");
    }
    const int64_t count = static_cast<int64_t>(rows.size());
    const int64_t parts = parts_for(count * length, threads, count);
    run_on_threads(parts, parts, [&](int64_t part) {
        for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i) {
            const Row& row = rows[static_cast<size_t>(i)];
            const int64_t real = this->length(row) * width(field), all = length * width(field);
            int64_t* const begin = out + i * all;
            std::fill_n(left ? begin : begin + real, all - real, value);
            write_row(field, row, left ? begin + all - real : begin);
        }
    });
}

void Encodings::write_bounds(int32_t* out) const {
    if (total_ > INT32_MAX) {
        throw std::overflow_error("the rows have " + std::to_string(total_) +
                                  " tokens, more than int32 can count: encode fewer texts at a time");
    }
    int64_t end = 0;
    *out++ = 0;
    for (const Row& row : rows) {
        end += length(row);
        *out++ = static_cast<int32_t>(end);
    }
}

}  // namespace fastbert
