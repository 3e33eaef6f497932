// The Python module that `normlab.kernels.cpu` calls. It has bindings only; each norm's work stands in its own header.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>

#include <array>
#include <cstdint>
#include <cstring>

#include "channels.h"
#include "groups.h"
#include "instructions.h"
#include "operators.h"
#include "positions.h"
#include "running.h"
#include "threads.h"

namespace nb = nanobind;

namespace normlab {
namespace {

// The fields of a struct, all of one size, as Python lists them.
template <class Field, class Struct>
using Fields = std::array<Field, sizeof(Struct) / sizeof(Field)>;

template <class Struct, class Field>
Struct with_fields(const Fields<Field, Struct>& fields) {
  Struct found;
  static_assert(sizeof found == sizeof fields);
  std::memcpy(static_cast<void*>(&found), fields.data(), sizeof found);
  return found;
}

// Binds a norm. Python hands over the parts of `Layout`, one list of the pointers in `Tensors`, and numbers.
template <class Result, class Tensors, class... Numbers>
void define(nb::module_& m, const char* name, Result (*norm)(const Layout&, const Tensors&, Numbers...)) {
  const auto from_python = [norm](int type, int64_t images, int64_t channels, int64_t space, bool last,
                                  const Fields<uintptr_t, Tensors>& pointers, Numbers... numbers) {
    return norm({type, {images, channels, space, last}}, with_fields<Tensors, uintptr_t>(pointers), numbers...);
  };
  m.def(name, from_python, nb::call_guard<nb::gil_scoped_release>());
}

// Python lists them in the order of `normlab.kernels.running.Constants`.
void set_constants(const Fields<double, Constants>& values) { constants = with_fields<Constants, double>(values); }

// Python lists them in the order of `OpenMP`.
void set_openmp(const Fields<uintptr_t, OpenMP>& functions) { openmp = with_fields<OpenMP, uintptr_t>(functions); }

}  // namespace
}  // namespace normlab

NB_MODULE(_native, m) {
  using namespace normlab;
  m.doc() = "The loops of the compiled kernels; see `normlab.kernels.cpu`.";
  nb::list names;
  for (const InstructionSet& set : instruction_sets()) names.append(set.name);
  m.attr("instruction_sets") = nb::tuple(names);
  m.attr("code") = NORMLAB_CODE;
  m.def("use_instructions", &use_instructions);
  m.def("set_openmp", &set_openmp);
  m.def("set_constants", &set_constants);
  m.def("register_operators", [](nb::callable address) {
    register_operators([&](const char* name) { return nb::cast<uintptr_t>(address(name)); });
  });
  define(m, "activation_backward", activation_backward);
  define(m, "channel_moments", channel_moments);
  define(m, "batch_forward", batch_forward);
  define(m, "batch_backward", batch_backward);
  define(m, "frozen_forward", frozen_forward);
  define(m, "group_forward", group_forward);
  define(m, "group_backward", group_backward);
  define(m, "position_forward", position_forward);
  define(m, "position_backward", position_backward);
  define(m, "running_forward", running_forward);
  define(m, "running_backward", running_backward);
}
