// Columns of texts as others keep them, read where they lie: no Python object is made for a row.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "tokenizer/scan.h"

namespace fastbert {

class TextColumn {
  public:
    // data: bytes-like, with the rows' bounds (int32 or int64, one more than rows) or as one text; a list of
    // bytes-like; a NumPy array of strings; or what offers Arrow's C data interface. Raises TypeError and ValueError.
    TextColumn(const pybind11::object& data, const pybind11::object& bounds);
    ~TextColumn();
    TextColumn(const TextColumn&) = delete;
    TextColumn& operator=(const TextColumn&) = delete;

    // Valid as long as this object.
    const std::vector<Text>& texts() const { return texts_; }

    // What keeps the memory alive.
    struct Owner {
        virtual ~Owner() = default;
    };

  private:
    std::vector<Text> texts_;
    std::vector<std::unique_ptr<Owner>> owners_;
};

}  // namespace fastbert
