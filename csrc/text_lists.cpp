#include "text_lists.h"

#include <string>

namespace py = pybind11;

namespace fastbert {
namespace {

std::string shown(int64_t value) {
    return std::to_string(value);
}

std::string type_name(PyObject* object) {
    return Py_TYPE(object)->tp_name;
}

Text text_of(PyObject* object) {
#if PY_VERSION_HEX < 0x030C0000
    if (PyUnicode_READY(object) != 0) throw py::error_already_set();
#endif
    const int kind = static_cast<int>(PyUnicode_KIND(object));
    const Storage storage = kind == 1 ? Storage::ucs1 : kind == 2 ? Storage::ucs2 : Storage::ucs4;
    return {PyUnicode_DATA(object), static_cast<int64_t>(PyUnicode_GET_LENGTH(object)), storage};
}

bool is_list(PyObject* object) {
    return PyList_Check(object) || PyTuple_Check(object);
}
int64_t list_size(PyObject* list) {
    return static_cast<int64_t>(PySequence_Fast_GET_SIZE(list));
}
PyObject* list_item(PyObject* list, int64_t i) {
    return PySequence_Fast_GET_ITEM(list, static_cast<Py_ssize_t>(i));
}

// Appends the parts of one side of a sample; returns how many.
int64_t add_side(Texts& texts, PyObject* object, const char* argument, int64_t index) {
    if (!texts.input.words) {
        texts.add(object, argument, index);
        return 1;
    }
    if (!is_list(object)) {
        throw py::type_error(std::string(argument) + "[" + shown(index) + "] is of type " + type_name(object) +
                             "; expected words, as a list of str");
    }
    for (int64_t i = 0; i < list_size(object); ++i) texts.add(list_item(object, i), argument, index);
    return list_size(object);
}

// Whether an item of texts is a pair: (str, str), or (words, words).
bool is_pair(PyObject* item, bool words) {
    if (!is_list(item) || list_size(item) != 2) return false;
    PyObject *a = list_item(item, 0), *b = list_item(item, 1);
    return words ? is_list(a) && is_list(b) : PyUnicode_Check(a) && PyUnicode_Check(b);
}

}  // namespace

void Texts::add(PyObject* object, const char* argument, int64_t index) {
    if (!PyUnicode_Check(object)) {
        throw py::type_error(std::string(argument) + "[" + shown(index) + "] is of type " + type_name(object) +
                             "; expected " + (input.words ? "words, as a list of str" : "str, or a pair of them"));
    }
    input.texts.push_back(text_of(object));
    Py_INCREF(object);
    held_.push_back(object);
}

void add_texts(Texts& texts, PyObject* list, PyObject* pairs) {
    if (pairs == nullptr && PyUnicode_Check(list)) {
        if (texts.input.words) throw py::type_error("texts is a str; expected words, as a list of lists of str");
        texts.add(list, "texts", 0);
        return;
    }
    if (pairs != nullptr && PyUnicode_Check(list) && PyUnicode_Check(pairs)) {
        texts.add(list, "texts", 0);
        texts.add(pairs, "pairs", 0);
        texts.input.samples.push_back({0, 1, 1});
        return;
    }
    for (PyObject* each : {list, pairs}) {
        if (each != nullptr && !is_list(each)) {
            throw py::type_error(std::string(each == list ? "texts" : "pairs") + " is of type " + type_name(each) +
                                 "; expected a list, or a str");
        }
    }
    const int64_t count = list_size(list);
    if (pairs != nullptr && list_size(pairs) != count) {
        throw py::value_error("texts and pairs have " + shown(count) + " and " + shown(list_size(pairs)) +
                              " items; expected as many of either");
    }
    texts.reserve(static_cast<size_t>(pairs == nullptr ? count : 2 * count));
    bool plain = pairs == nullptr && !texts.input.words;
    for (int64_t i = 0; i < count && plain; ++i) plain = PyUnicode_Check(list_item(list, i));
    for (int64_t i = 0; i < count; ++i) {
        PyObject* item = list_item(list, i);
        if (plain) {
            texts.add(item, "texts", i);
            continue;
        }
        Sample sample = {static_cast<int64_t>(texts.input.texts.size()), 0, -1};
        if (pairs != nullptr) {
            sample.count = add_side(texts, item, "texts", i);
            sample.pair_count = add_side(texts, list_item(pairs, i), "pairs", i);
        } else if (is_pair(item, texts.input.words)) {
            sample.count = add_side(texts, list_item(item, 0), "texts", i);
            sample.pair_count = add_side(texts, list_item(item, 1), "texts", i);
        } else {
            sample.count = add_side(texts, item, "texts", i);
        }
        texts.input.samples.push_back(sample);
    }
}

}  // namespace fastbert
