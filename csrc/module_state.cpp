#include "module_state.h"

#include <stdint.h>

#include <unordered_set>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace fastbert {
namespace {

constexpr int kMostDepth = 64;  // of modules in modules: some hold their parent

// The state of modules as a row of words: their classes and these classes' forward; all that stands in their __dict__;
// and of each parameter what is not the same after any change that torch counts, of a vector its place alone: nobody
// copies those.
struct State {
    py::object constants;  // types whose objects never change, beside numbers, strings and tuples of these
    std::vector<uint64_t> words;
    std::vector<py::object> pinned;  // alive, so that no other object ever has their address; no modules and tensors
    std::unordered_set<PyObject*> tensors;
};

// Writes the words down, or reads along; false where one differs, or where something cannot be watched.
class Walk {
  public:
    Walk(State& state, bool records) : state_(state), records_(records) {}

    bool over(const py::list& modules) {
        bool same = put(modules.size());
        for (py::handle module : modules) same = same && over_module(module.ptr(), 0);
        PyErr_Clear();
        return same && (records_ || next_ == state_.words.size());
    }

  private:
    bool put(uint64_t word) {
        if (!records_) return next_ < state_.words.size() && state_.words[next_++] == word;
        state_.words.push_back(word);
        return true;
    }

    bool put_pinned(PyObject* object) {
        if (records_) state_.pinned.push_back(py::reinterpret_borrow<py::object>(object));
        return put(reinterpret_cast<uintptr_t>(object));
    }

    bool put_type(PyObject* object) { return put_pinned(reinterpret_cast<PyObject*>(Py_TYPE(object))); }

    bool over_module(PyObject* module, int depth) {
        static PyObject* const forward_name = PyUnicode_InternFromString("forward");
        static PyObject* const modules_name = PyUnicode_InternFromString("_modules");
        static PyObject* const parameters_name = PyUnicode_InternFromString("_parameters");
        if (depth > kMostDepth || !put_type(module)) return false;
        const auto forward = owned(PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(module)), forward_name));
        const auto dict = owned(PyObject_GenericGetDict(module, nullptr));
        if (!forward || !dict || !put_pinned(forward.ptr())) return false;
        return over_dict(dict.ptr(), [&](PyObject* name, PyObject* value) {
            if (is(name, modules_name)) {
                return over_dict(value, [&](PyObject*, PyObject* part) {
                    return Py_IsNone(part) ? put(0) : put(1) && over_module(part, depth + 1);
                });
            }
            if (is(name, parameters_name)) {
                return over_dict(value, [&](PyObject*, PyObject* tensor) {
                    return Py_IsNone(tensor) ? put(0) : put(1) && over_tensor(tensor);
                });
            }
            if (PyDict_Check(value)) return put(0) && put_type(value) && PyDict_Size(value) == 0;
            if (PyAnySet_Check(value)) return put(0) && put_type(value) && PySet_Size(value) == 0;
            return put(1) && (!records_ || is_constant(value)) && put_pinned(value);
        });
    }

    template <class Item>
    bool over_dict(PyObject* dict, const Item& item) {
        if (!PyDict_Check(dict) || !put(static_cast<uint64_t>(PyDict_Size(dict)))) return false;
        PyObject *name, *value;
        for (Py_ssize_t position = 0; PyDict_Next(dict, &position, &name, &value);) {
            const auto held = py::reinterpret_borrow<py::object>(value);
            if (!put_pinned(name) || !item(name, value)) return false;
        }
        return true;
    }

    bool over_tensor(PyObject* tensor) {
        static PyObject* const version = PyUnicode_InternFromString("_version");
        static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
        static PyObject* const untyped_storage = PyUnicode_InternFromString("untyped_storage");
        static PyObject* const cdata = PyUnicode_InternFromString("_cdata");
        static PyObject* const dtype = PyUnicode_InternFromString("dtype");
        static PyObject* const shape = PyUnicode_InternFromString("shape");
        static PyObject* const stride = PyUnicode_InternFromString("stride");
        if (records_) state_.tensors.insert(tensor);
        const auto kind = owned(PyObject_GetAttr(tensor, dtype));
        const auto sizes = owned(PyObject_GetAttr(tensor, shape));
        if (!kind || !sizes || !PyTuple_Check(sizes.ptr())) return false;
        if (!put(reinterpret_cast<uintptr_t>(tensor)) || !put_type(tensor) || !put_pinned(kind.ptr())) return false;
        if (!put_integers(sizes) || !put_integers(owned(PyObject_CallMethodNoArgs(tensor, stride)))) return false;
        if (!put_integer(PyObject_CallMethodNoArgs(tensor, data_ptr))) return false;
        if (PyTuple_GET_SIZE(sizes.ptr()) < 2) return true;
        const auto storage = owned(PyObject_CallMethodNoArgs(tensor, untyped_storage));
        return storage && put_integer(PyObject_GetAttr(storage.ptr(), cdata)) &&
               put_integer(PyObject_GetAttr(tensor, version));
    }

    bool put_integer(PyObject* result) {
        const auto integer = owned(result);
        return integer && PyLong_Check(integer.ptr()) && put(PyLong_AsUnsignedLongLongMask(integer.ptr()));
    }

    bool put_integers(const py::object& integers) {
        if (!integers || !PyTuple_Check(integers.ptr())) return false;
        const Py_ssize_t count = PyTuple_GET_SIZE(integers.ptr());
        if (!put(static_cast<uint64_t>(count))) return false;
        for (Py_ssize_t i = 0; i < count; ++i) {
            if (!put(PyLong_AsUnsignedLongLongMask(PyTuple_GET_ITEM(integers.ptr(), i)))) return false;
        }
        return true;
    }

    bool is_constant(PyObject* value) const {
        if (Py_IsNone(value) || PyBool_Check(value) || PyLong_CheckExact(value)) return true;
        if (PyFloat_CheckExact(value) || PyUnicode_CheckExact(value)) return true;
        if (!PyTuple_CheckExact(value)) return PyObject_IsInstance(value, state_.constants.ptr()) == 1;
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i) {
            if (!is_constant(PyTuple_GET_ITEM(value, i))) return false;
        }
        return true;
    }

    // Attributes' names are interned, but for those that a pickle brought.
    static bool is(PyObject* name, PyObject* interned) {
        if (name == interned) return true;
        return PyUnicode_Check(name) && !PyUnicode_CHECK_INTERNED(name) && PyUnicode_Compare(name, interned) == 0;
    }

    static py::object owned(PyObject* result) { return py::reinterpret_steal<py::object>(result); }

    State& state_;
    const bool records_;
    size_t next_ = 0;  // word to read
};

class ModuleState {
  public:
    ModuleState(const py::list& modules, py::object constants) {
        state_.constants = std::move(constants);
        if (!Walk(state_, true).over(modules)) {
            throw py::value_error("the modules hold what may change without notice: a hook, a buffer, an object");
        }
    }

    bool holds(const py::list& modules) { return Walk(state_, false).over(modules); }

    bool has(py::handle tensor) const { return state_.tensors.count(tensor.ptr()) != 0; }

  private:
    State state_;
};

}  // namespace

void bind_module_state(py::module_& m) {
    py::class_<ModuleState>(m, "ModuleState")
        .def(py::init<const py::list&, py::object>())
        .def("holds", &ModuleState::holds)
        .def("has", &ModuleState::has);
}

}  // namespace fastbert
