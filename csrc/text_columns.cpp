#include "text_columns.h"

#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <utility>

namespace py = pybind11;

namespace fastbert {
namespace {

using Owners = std::vector<std::unique_ptr<TextColumn::Owner>>;

std::string type_name(const py::handle& object) {
    return Py_TYPE(object.ptr())->tp_name;
}

// ---- buffers ----

struct BufferOwner : TextColumn::Owner {
    Py_buffer view = {};

    BufferOwner(const py::handle& object, int flags) {
        if (PyObject_GetBuffer(object.ptr(), &view, flags) != 0) throw py::error_already_set();
    }
    ~BufferOwner() override { PyBuffer_Release(&view); }
};

const Py_buffer& buffer_of(const py::handle& object, int flags, Owners& owners) {
    auto owner = std::make_unique<BufferOwner>(object, flags);
    const Py_buffer& view = owner->view;
    owners.push_back(std::move(owner));
    return view;
}

Text bytes_of(const py::handle& object, Owners& owners) {
    const Py_buffer& view = buffer_of(object, PyBUF_SIMPLE, owners);
    return {view.buf, static_cast<int64_t>(view.len), Storage::utf8};
}

std::string format_of(const Py_buffer& view) {
    return view.format ? view.format : "B";
}

// Rows of `data` between bounds that ascend and lie in it.
template <class Bound>
void add_rows(const void* data, int64_t size, const Bound* bounds, int64_t rows, std::vector<Text>& texts) {
    texts.reserve(texts.size() + static_cast<size_t>(rows));
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t begin = static_cast<int64_t>(bounds[i]), end = static_cast<int64_t>(bounds[i + 1]);
        if (begin < 0 || end < begin || end > size) {
            throw py::value_error("row " + std::to_string(i) + " goes from byte " + std::to_string(begin) + " to " +
                                  std::to_string(end) + "; expected ascending bounds from 0 to " +
                                  std::to_string(size));
        }
        texts.push_back({static_cast<const uint8_t*>(data) + begin, end - begin, Storage::utf8});
    }
}

void add_bounded(const py::object& data, const py::object& bounds, std::vector<Text>& texts, Owners& owners) {
    const Text all = bytes_of(data, owners);
    const Py_buffer& view = buffer_of(bounds, PyBUF_FORMAT | PyBUF_C_CONTIGUOUS, owners);
    const std::string format = format_of(view);
    const bool integers = format == "i" || format == "l" || format == "q";
    if (view.ndim != 1 || !integers || (view.itemsize != 4 && view.itemsize != 8)) {
        throw py::type_error("bounds has " + std::to_string(view.ndim) + " dimensions of format '" + format +
                             "'; expected one, of int32 or int64");
    }
    const int64_t rows = view.shape[0] - 1;
    if (rows < 0) throw py::value_error("bounds is empty; expected one more than rows");
    if (view.itemsize == 4) {
        add_rows(all.data, all.size, static_cast<const int32_t*>(view.buf), rows, texts);
    } else {
        add_rows(all.data, all.size, static_cast<const int64_t*>(view.buf), rows, texts);
    }
}

// ---- NumPy arrays of fixed-width strings: UCS4, padded with zeros ----

void add_fixed_width(const py::object& array, std::vector<Text>& texts, Owners& owners) {
    const Py_buffer& view = buffer_of(array, PyBUF_FORMAT | PyBUF_STRIDES, owners);
    const std::string format = format_of(view);
    if (view.ndim != 1 || format.empty() || format.back() != 'w' || format[0] == '>' || format[0] == '!') {
        throw py::type_error("the array has " + std::to_string(view.ndim) + " dimensions of format '" + format +
                             "'; expected one, of strings in native byte order");
    }
    const int64_t width = view.itemsize / 4;
    for (Py_ssize_t i = 0; i < view.shape[0]; ++i) {
        const auto* text = reinterpret_cast<const uint32_t*>(static_cast<const char*>(view.buf) + i * view.strides[0]);
        int64_t size = width;
        while (size > 0 && text[size - 1] == 0) --size;
        texts.push_back({text, size, Storage::ucs4});
    }
}

// ---- NumPy arrays of StringDType, through NumPy's C interface, which has these functions at fixed places since 2.0
// ----

struct NumpyString {
    size_t size;
    const char* data;
};
constexpr int kStringLoad = 313, kAcquireAllocator = 316, kReleaseAllocator = 318;

struct StringOwner : TextColumn::Owner {
    std::string text;
};

// Copies the texts: NumPy's lock, which reading them takes, must not be held where the interpreter's is given up.
void add_variable_width(const py::object& array, std::vector<Text>& texts, Owners& owners) {
    const py::object api = py::module_::import("numpy._core._multiarray_umath").attr("_ARRAY_API");
    auto* const functions = static_cast<void**>(PyCapsule_GetPointer(api.ptr(), nullptr));
    if (functions == nullptr) throw py::error_already_set();
    const auto load = reinterpret_cast<int (*)(void*, const void*, NumpyString*)>(functions[kStringLoad]);
    const auto acquire = reinterpret_cast<void* (*)(PyObject*)>(functions[kAcquireAllocator]);
    const auto release = reinterpret_cast<void (*)(void*)>(functions[kReleaseAllocator]);

    const auto shape = array.attr("shape").cast<std::vector<py::ssize_t>>();
    const auto strides = array.attr("strides").cast<std::vector<py::ssize_t>>();
    if (shape.size() != 1) {
        throw py::type_error("the array has " + std::to_string(shape.size()) + " dimensions; expected one");
    }
    const auto* const data = reinterpret_cast<const char*>(array.attr("ctypes").attr("data").cast<uintptr_t>());
    const py::object dtype = array.attr("dtype");
    auto owner = std::make_unique<StringOwner>();
    std::vector<int64_t> bounds{0};
    py::ssize_t missing = -1;
    {
        const std::unique_ptr<void, void (*)(void*)> allocator(acquire(dtype.ptr()), release);
        for (py::ssize_t i = 0; i < shape[0] && missing < 0; ++i) {
            NumpyString text = {0, nullptr};
            if (load(allocator.get(), data + i * strides[0], &text) != 0) {
                missing = i;
            } else {
                if (text.size > 0) owner->text.append(text.data, text.size);
                bounds.push_back(static_cast<int64_t>(owner->text.size()));
            }
        }
    }
    if (missing >= 0) throw py::value_error("row " + std::to_string(missing) + " is missing; expected a text");
    add_rows(owner->text.data(), bounds.back(), bounds.data(), static_cast<int64_t>(bounds.size()) - 1, texts);
    owners.push_back(std::move(owner));
}

bool is_variable_width(const py::object& data) {
    return py::hasattr(data, "dtype") && py::hasattr(data.attr("dtype"), "kind") &&
           py::str(data.attr("dtype").attr("kind")).cast<std::string>() == "T";
}

// ---- Arrow's C data interface: https://arrow.apache.org/docs/format/CDataInterface.html ----

struct ArrowSchema {
    const char* format;
    const char* name;
    const char* metadata;
    int64_t flags;
    int64_t n_children;
    ArrowSchema** children;
    ArrowSchema* dictionary;
    void (*release)(ArrowSchema*);
    void* private_data;
};

struct ArrowArray {
    int64_t length;
    int64_t null_count;
    int64_t offset;
    int64_t n_buffers;
    int64_t n_children;
    const void** buffers;
    ArrowArray** children;
    ArrowArray* dictionary;
    void (*release)(ArrowArray*);
    void* private_data;
};

struct ArrowArrayStream {
    int (*get_schema)(ArrowArrayStream*, ArrowSchema*);
    int (*get_next)(ArrowArrayStream*, ArrowArray*);
    const char* (*get_last_error)(ArrowArrayStream*);
    void (*release)(ArrowArrayStream*);
    void* private_data;
};

template <class Struct>
struct ArrowOwner : TextColumn::Owner {
    Struct value = {};
    ~ArrowOwner() override {
        if (value.release) value.release(&value);
    }
};

struct ObjectOwner : TextColumn::Owner {
    py::object object;
    explicit ObjectOwner(py::object object) : object(std::move(object)) {}
};

template <class Struct>
Struct* capsule_pointer(const py::handle& capsule, const char* name) {
    void* pointer = PyCapsule_GetPointer(capsule.ptr(), name);
    if (pointer == nullptr) throw py::error_already_set();
    return static_cast<Struct*>(pointer);
}

void add_views(const ArrowArray& array, std::vector<Text>& texts) {
    const auto* views = static_cast<const uint8_t*>(array.buffers[1]) + 16 * array.offset;
    for (int64_t i = 0; i < array.length; ++i, views += 16) {
        int32_t fields[4];  // size, prefix, buffer, offset; or size and the text itself
        std::memcpy(fields, views, sizeof fields);
        const void* data = views + 4;
        if (fields[0] < 0)
            throw py::value_error("row " + std::to_string(i) + " of the Arrow array has a negative size");
        if (fields[0] > 12) {
            if (fields[2] < 0 || fields[2] + 3 >= array.n_buffers) {
                throw py::value_error("row " + std::to_string(i) + " of the Arrow array lies in no buffer of it");
            }
            data = static_cast<const uint8_t*>(array.buffers[2 + fields[2]]) + fields[3];
        }
        texts.push_back({data, fields[0], Storage::utf8});
    }
}

void add_arrow(const ArrowSchema& schema, const ArrowArray& array, std::vector<Text>& texts) {
    const std::string format = schema.format;
    if ((format != "u" && format != "U" && format != "vu") || schema.dictionary != nullptr) {
        throw py::type_error("the Arrow array is of format '" + format +
                             "'; expected string, large_string or string_view, without a dictionary");
    }
    if (array.null_count != 0 && array.buffers[0] != nullptr) {
        const auto* valid = static_cast<const uint8_t*>(array.buffers[0]);
        for (int64_t i = 0; i < array.length; ++i) {
            const int64_t bit = array.offset + i;
            if (!(valid[bit >> 3] >> (bit & 7) & 1)) {
                throw py::value_error("row " + std::to_string(texts.size() + static_cast<size_t>(i)) +
                                      " is null; expected a text, for instance an empty one");
            }
        }
    }
    if (array.length == 0) return;
    if (format == "vu") {
        add_views(array, texts);
    } else if (format == "u") {
        const auto* bounds = static_cast<const int32_t*>(array.buffers[1]) + array.offset;
        add_rows(array.buffers[2], bounds[array.length], bounds, array.length, texts);
    } else {
        const auto* bounds = static_cast<const int64_t*>(array.buffers[1]) + array.offset;
        add_rows(array.buffers[2], bounds[array.length], bounds, array.length, texts);
    }
}

void add_arrow_array(const py::object& data, std::vector<Text>& texts, Owners& owners) {
    const py::tuple capsules = data.attr("__arrow_c_array__")();
    owners.push_back(std::make_unique<ObjectOwner>(capsules));
    add_arrow(*capsule_pointer<ArrowSchema>(capsules[0], "arrow_schema"),
              *capsule_pointer<ArrowArray>(capsules[1], "arrow_array"), texts);
}

void add_arrow_stream(const py::object& data, std::vector<Text>& texts, Owners& owners) {
    const py::object capsule = data.attr("__arrow_c_stream__")();
    owners.push_back(std::make_unique<ObjectOwner>(capsule));
    auto* stream = capsule_pointer<ArrowArrayStream>(capsule, "arrow_array_stream");
    const auto check = [&](int error) {
        if (error == 0) return;
        const char* message = stream->get_last_error(stream);
        throw py::value_error(std::string("the Arrow stream fails: ") + (message ? message : std::strerror(error)));
    };
    ArrowOwner<ArrowSchema> schema;
    check(stream->get_schema(stream, &schema.value));
    for (;;) {
        auto array = std::make_unique<ArrowOwner<ArrowArray>>();
        check(stream->get_next(stream, &array->value));
        if (array->value.release == nullptr) return;
        add_arrow(schema.value, array->value, texts);
        owners.push_back(std::move(array));
    }
}

}  // namespace

TextColumn::TextColumn(const py::object& data, const py::object& bounds) {
    if (!bounds.is_none()) {
        add_bounded(data, bounds, texts_, owners_);
    } else if (PyBytes_Check(data.ptr())) {  // first: asking for attributes costs more than encoding a short text
        texts_.push_back(bytes_of(data, owners_));
    } else if (PyList_Check(data.ptr()) || PyTuple_Check(data.ptr())) {
        for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(data.ptr()); ++i) {
            // a buffer of an object of Python's own runs code that may shorten the list
            const auto item = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(data.ptr(), i));
            if (!PyObject_CheckBuffer(item.ptr())) {
                throw py::type_error("row " + std::to_string(i) + " is of type " + type_name(item) +
                                     "; expected bytes-like");
            }
            texts_.push_back(bytes_of(item, owners_));
        }
    } else if (py::hasattr(data, "__arrow_c_array__")) {
        add_arrow_array(data, texts_, owners_);
    } else if (py::hasattr(data, "__arrow_c_stream__")) {
        add_arrow_stream(data, texts_, owners_);
    } else if (is_variable_width(data)) {
        add_variable_width(data, texts_, owners_);
    } else if (py::hasattr(data, "__array_interface__")) {
        add_fixed_width(data, texts_, owners_);
    } else if (PyObject_CheckBuffer(data.ptr())) {
        texts_.push_back(bytes_of(data, owners_));
    } else {
        throw py::type_error("data is of type " + type_name(data) +
                             "; expected bytes-like, a list of them, an Arrow string array or a NumPy string array");
    }
}

TextColumn::~TextColumn() = default;

}  // namespace fastbert
