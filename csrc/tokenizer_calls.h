// The calls that people make most, and lists of what they give, without pybind11's dispatcher.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "tokenizer/encodings.h"
#include "tokenizer/wordpiece.h"

namespace fastbert {

// Encodes with the lock let go, and says in Python's exceptions what is wrong with a text.
Encodings encode_unlocked(const WordPiece& tokenizer, const EncodeInput& input, int64_t units,
                          const EncodeOptions& options);

// Not cleared. What is large lies on large pages: thousands of small ones take longer to get than to fill.
pybind11::array_t<int64_t> new_array(const std::vector<pybind11::ssize_t>& shape);

// One row as a list of integers, of (start, end), or of integers and None.
pybind11::list row_list(const Encodings& encodings, Field field, const Row& row);

void bind_tokenizer_calls(pybind11::handle wordpiece, pybind11::handle encodings);

}  // namespace fastbert
