// Lists of Python's strings, read where they lie.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "tokenizer/wordpiece.h"

namespace fastbert {

// The texts of a call, and what keeps them alive: a list may change while the lock is not held.
class Texts {
  public:
    Texts() = default;
    Texts(const Texts&) = delete;
    Texts& operator=(const Texts&) = delete;
    ~Texts() {
        for (PyObject* object : held_) Py_DECREF(object);
    }

    EncodeInput input;
    int64_t units() const {
        int64_t sum = 0;
        for (const Text& text : input.texts) sum += text.size;
        return sum;
    }

    // Raises TypeError for what is no str, naming argument and index.
    void add(PyObject* object, const char* argument, int64_t index);
    void reserve(size_t size) {
        input.texts.reserve(size);
        held_.reserve(size);
    }

  private:
    std::vector<PyObject*> held_;
};

// texts: a str, or a list of str, of pairs, of lists of words, of pairs of these; or str and lists of words with
// `pairs` beside them (else null). Raises TypeError and ValueError.
void add_texts(Texts& texts, PyObject* list, PyObject* pairs);

}  // namespace fastbert
