#include "tokenizer_calls.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "text_lists.h"

namespace py = pybind11;

namespace fastbert {
namespace {

// In the order of a call's outputs, which are asked for by the bits of a number.
constexpr std::array kOutputs = {Field::input_ids, Field::token_type_ids, Field::attention_mask,
                                 Field::special_tokens_mask, Field::offset_mapping};
constexpr std::array kFields = {Field::input_ids,           Field::token_type_ids, Field::attention_mask,
                                Field::special_tokens_mask, Field::offset_mapping, Field::word_ids,
                                Field::sequence_ids,        Field::position_ids};
constexpr const char* kNames[] = {"input_ids",      "token_type_ids", "attention_mask", "special_tokens_mask",
                                  "offset_mapping", "word_ids",       "sequence_ids",   "position_ids"};
constexpr int64_t kOffsets = 1 << 4;  // the bit of offset_mapping

// Texts start at 0 and words are short, so most offsets occur again and again, and so do the ids: their objects are
// shared, as Python shares small integers. At most a megabyte of integers and half of one of tuples, under the lock of
// the interpreter.
constexpr int64_t kSharedIntegers = 1 << 15;
PyObject* shared_integers[kSharedIntegers] = {};
constexpr int64_t kSharedStarts = 512, kSharedLengths = 16;
PyObject* shared_offsets[kSharedStarts][kSharedLengths] = {};

PyObject* checked(PyObject* object) {
    if (object == nullptr) throw py::error_already_set();
    return object;
}

PyObject* name_of(size_t field) {
    static PyObject* names[std::size(kNames)] = {};
    if (names[field] == nullptr) names[field] = checked(PyUnicode_InternFromString(kNames[field]));
    return names[field];
}

Field field_of(PyObject* name) {
    for (size_t i = 0; i < kFields.size(); ++i) {
        if (name == name_of(i)) return kFields[i];
    }
    return field_named(py::handle(name).cast<std::string>());
}

// New references.
PyObject* integer_object(int64_t value) {
    if (value < 0 || value >= kSharedIntegers) return checked(PyLong_FromLongLong(value));
    PyObject*& shared = shared_integers[value];
    if (shared == nullptr) shared = checked(PyLong_FromLongLong(value));
    Py_INCREF(shared);
    return shared;
}

PyObject* make_offset_tuple(int64_t start, int64_t end) {
    auto result = py::reinterpret_steal<py::object>(checked(PyTuple_New(2)));
    PyTuple_SET_ITEM(result.ptr(), 0, integer_object(start));
    PyTuple_SET_ITEM(result.ptr(), 1, integer_object(end));
    PyObject_GC_UnTrack(result.ptr());  // it holds integers alone
    return result.release().ptr();
}

PyObject* offset_tuple(int64_t start, int64_t end) {
    if (start >= kSharedStarts || end - start >= kSharedLengths) return make_offset_tuple(start, end);
    PyObject*& shared = shared_offsets[start][end - start];
    if (shared == nullptr) shared = make_offset_tuple(start, end);
    Py_INCREF(shared);
    return shared;
}

// [length, width of the field] as a list.
py::list list_of(Field field, const std::vector<int64_t>& values) {
    const size_t length = values.size() / static_cast<size_t>(width(field));
    const bool has_none = field == Field::word_ids || field == Field::sequence_ids;
    py::list result(length);
    PyObject** const items = PySequence_Fast_ITEMS(result.ptr());
    if (field == Field::offset_mapping) {
        for (size_t i = 0; i < length; ++i) items[i] = offset_tuple(values[2 * i], values[2 * i + 1]);
    } else {
        for (size_t i = 0; i < length; ++i) {
            items[i] = has_none && values[i] < 0 ? py::none().release().ptr() : integer_object(values[i]);
        }
    }
    return result;
}

// Runs a call, with Python's exceptions for ours.
template <class Call>
PyObject* guarded(const Call& call) {
    try {
        return call().release().ptr();
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const py::builtin_exception& error) {
        error.set_error();
    } catch (const std::invalid_argument& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

int64_t integer(PyObject* object) {
    const int64_t value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

bool only_strings(PyObject* list) {
    if (!PyList_Check(list)) return false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
        if (!PyUnicode_Check(PyList_GET_ITEM(list, i))) return false;
    }
    return PyList_GET_SIZE(list) > 0;
}

int64_t fill_of(Field field, int64_t pad_id) {
    return field == Field::input_ids ? pad_id : field == Field::special_tokens_mask;
}

py::object as_lists(const Encodings& encodings, Field field, bool one, int64_t length, int64_t fill,
                    std::vector<int64_t>& values) {
    const auto row_of = [&](const Row& row) {
        const int64_t written = encodings.length(row), wanted = std::max(written, length);
        values.resize(static_cast<size_t>(wanted * width(field)));
        encodings.write_row(field, row, values.data());
        std::fill(values.begin() + static_cast<std::ptrdiff_t>(written * width(field)), values.end(), fill);
        return list_of(field, values);
    };
    if (one) return row_of(encodings.rows[0]);
    py::list result(encodings.rows.size());
    for (size_t i = 0; i < encodings.rows.size(); ++i) {
        PyList_SET_ITEM(result.ptr(), static_cast<Py_ssize_t>(i), row_of(encodings.rows[i]).release().ptr());
    }
    return result;
}

py::object as_array(const Encodings& encodings, Field field, int64_t length, int64_t fill) {
    const auto rows = static_cast<py::ssize_t>(encodings.rows.size());
    std::vector<py::ssize_t> shape{rows, static_cast<py::ssize_t>(length)};
    if (width(field) == 2) shape.push_back(2);
    py::array_t<int64_t> result = new_array(shape);
    encodings.write_padded(field, length, fill, false, result.mutable_data());
    return result;
}

// See _C.pyi.
PyObject* fill(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
    return guarded([&]() -> py::object {
        if (count != 10) throw py::type_error("fill takes 10 arguments");
        PyObject *outputs = arguments[0], *texts = arguments[1], *pairs = arguments[2], *convert = arguments[8];
        if (!PyDict_Check(outputs)) throw py::type_error("outputs is no dict");
        const auto& tokenizer = py::handle(self).cast<const WordPiece&>();
        const int64_t fields = integer(arguments[3]), pad_id = integer(arguments[7]);
        int64_t length = integer(arguments[6]);

        Texts parsed;
        const bool one = PyUnicode_Check(texts);
        if (one && pairs == Py_None) {
            parsed.add(texts, "texts", 0);
        } else if (one ? PyUnicode_Check(pairs) : only_strings(texts) && (pairs == Py_None || only_strings(pairs))) {
            add_texts(parsed, texts, pairs == Py_None ? nullptr : pairs);
        } else {
            return py::none();
        }
        EncodeOptions options;
        options.add_special_tokens = PyObject_IsTrue(arguments[4]) == 1;
        options.max_length = integer(arguments[5]);
        options.offsets = (fields & kOffsets) != 0;
        options.threads = static_cast<int>(std::clamp<int64_t>(integer(arguments[9]), 1, INT32_MAX));
        Encodings encodings = encode_unlocked(tokenizer, parsed.input, parsed.units(), options);

        const int64_t longest = encodings.longest();
        const bool ragged = encodings.total() != longest * static_cast<int64_t>(encodings.rows.size());
        if (convert != Py_None && (longest == 0 || (length > 0 && longest > length) || (length < 0 && ragged))) {
            return py::none();
        }
        if (length <= 0) length = length == 0 || convert != Py_None ? longest : 0;
        std::vector<int64_t> values;  // of a row, to use its memory again
        for (size_t i = 0; i < kOutputs.size(); ++i) {
            if ((fields >> i & 1) == 0) continue;
            const int64_t value = fill_of(kOutputs[i], pad_id);
            py::object output;
            if (convert == Py_None) {
                output = as_lists(encodings, kOutputs[i], one, length, value, values);
            } else {
                output = as_array(encodings, kOutputs[i], length, value);
                if (convert != Py_True) {
                    output = py::reinterpret_steal<py::object>(checked(PyObject_CallOneArg(convert, output.ptr())));
                }
            }
            if (PyDict_SetItem(outputs, name_of(i), output.ptr()) != 0) throw py::error_already_set();
        }
        if (options.offsets) return py::cast(std::move(encodings));
        return py::int_(longest);
    });
}

PyObject* list(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
    return guarded([&]() -> py::object {
        if (count != 2) throw py::type_error("list takes a field and a row");
        const auto& encodings = py::handle(self).cast<const Encodings&>();
        const Field field = field_of(arguments[0]);
        encodings.check(field);
        const int64_t row = integer(arguments[1]), rows = static_cast<int64_t>(encodings.rows.size());
        if (row < 0 || row >= rows) {
            throw py::index_error("row is " + std::to_string(row) + "; expected 0 to " + std::to_string(rows - 1));
        }
        return row_list(encodings, field, encodings.rows[static_cast<size_t>(row)]);
    });
}

void add_method(py::handle type, PyMethodDef& method) {
    type.attr(method.ml_name) = py::reinterpret_steal<py::object>(
        checked(PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), &method)));
}

PyMethodDef fill_method = {"fill", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(fill)), METH_FASTCALL,
                           "fill(outputs, texts, pairs, fields, add_special_tokens, max_length, length, pad_id, "
                           "convert, threads, /): a whole call"};
PyMethodDef list_method = {"list", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(list)), METH_FASTCALL,
                           "list(field, row, /): a row's values"};

}  // namespace

py::array_t<int64_t> new_array(const std::vector<py::ssize_t>& shape) {
    int64_t bytes = sizeof(int64_t);
    bool fits = true;
    for (py::ssize_t size : shape) fits = fits && !__builtin_mul_overflow(bytes, size, &bytes);
    constexpr int64_t kMost = int64_t{1} << 62;  // NumPy says so where it is more
    if (!fits || bytes > kMost || bytes < int64_t{kLargePage / 2}) return py::array_t<int64_t>(shape);
    // Aligned by hand: what aligned_alloc() maps for one call glibc unmaps after it, for malloc() it learns to keep it.
    const size_t whole = (static_cast<size_t>(bytes) + kLargePage - 1) / kLargePage * kLargePage;
    std::unique_ptr<void, void (*)(void*)> block(std::malloc(whole + kLargePage), std::free);
    if (block == nullptr) throw std::bad_alloc();
    const auto begin = reinterpret_cast<uintptr_t>(block.get());
    auto* const data = reinterpret_cast<int64_t*>((begin + kLargePage - 1) / kLargePage * kLargePage);
    prefer_large_pages(data, whole);
    const py::capsule owner(block.get(), [](void* kept) { std::free(kept); });
    block.release();
    return py::array_t<int64_t>(shape, data, owner);
}

py::list row_list(const Encodings& encodings, Field field, const Row& row) {
    std::vector<int64_t> values(static_cast<size_t>(encodings.length(row) * width(field)));
    encodings.write_row(field, row, values.data());
    return list_of(field, values);
}

void bind_tokenizer_calls(py::handle wordpiece, py::handle encodings) {
    add_method(wordpiece, fill_method);
    add_method(encodings, list_method);
}

}  // namespace fastbert
