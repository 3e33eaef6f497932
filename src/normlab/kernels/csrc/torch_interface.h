// Torch's functions and tensors, as far as the operators use them. Torch is not there when this is compiled: the
// functions are of its stable C interface (torch/csrc/stable/c/shim.h, torch/csrc/inductor/aoti_torch/c/shim.h), and
// are looked up in memory at run time.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>

namespace normlab {

using Handle = struct OpaqueTensor*;
using Library = struct OpaqueLibrary*;
using Value = uint64_t;   // an argument or a result of an operator
using Failure = int32_t;  // 0 for none
using Operator = void(Value* stack, uint64_t arguments, uint64_t results);

// The version of the interface that is used here: torch 2.10's, the first that asks for a version.
constexpr uint64_t kVersion = uint64_t{2} << 56 | uint64_t{10} << 48;

struct Torch {
  Failure (*delete_tensor)(Handle);
  Failure (*dim)(Handle, int64_t*);
  Failure (*numel)(Handle, int64_t*);
  Failure (*sizes)(Handle, int64_t**);
  Failure (*strides)(Handle, int64_t**);
  Failure (*dtype)(Handle, int32_t*);
  Failure (*data)(Handle, void**);
  Failure (*storage_size)(Handle, int64_t*);  // in bytes
  Failure (*storage_offset)(Handle, int64_t*);
  Failure (*is_contiguous)(Handle, bool*);
  Failure (*empty_strided)(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device,
                           int32_t device_index, Handle*);
  Failure (*copy)(Handle to, Handle from, int32_t non_blocking);
  Failure (*open)(const char* space, const char* key, const char* file, uint32_t line, Library*);
  Failure (*implement)(Library, const char* name, Operator*, uint64_t version);
  int32_t cpu, int64;
  std::array<int32_t, 3> types;  // in the order of `Layout::type`
};
inline Torch torch;

// Looks the functions up. address: says where one is in memory, and raises if there is none of this name.
void find_torch(const std::function<uintptr_t(const char* name)>& address);

// Throws: exceptions are how torch's own macros for operators report to it. Python sees a RuntimeError.
[[noreturn]] void fail(const std::string& what);

inline void check(bool met, const char* what) {
  if (!met) fail(what);
}

struct Delete {
  void operator()(Handle tensor) const { torch.delete_tensor(tensor); }
};
using Tensor = std::unique_ptr<OpaqueTensor, Delete>;
struct OptionalTensor : Tensor {
  using Tensor::Tensor;
};

// What one of these functions says about a tensor.
template <class T>
T get(Failure (*function)(Handle, T*), const Tensor& tensor) {
  T found;
  check(!function(tensor.get(), &found), "a tensor is not in memory");
  return found;
}

inline void* data(const Tensor& tensor) { return get(torch.data, tensor); }

// Raises if the storage of a tensor was freed, as sharded training does between uses, or is shorter than its values
// need: torch gives a pointer all the same. name: for an error.
void check_storage(const Tensor& tensor, const char* name);

// n values of a float32 or int64 tensor, or null if there is no tensor. name: for an error.
template <class T>
T* values(const char* name, const Tensor& tensor, int64_t n) {
  constexpr bool is_int64 = std::is_same_v<T, int64_t>;
  if (!tensor) return nullptr;
  const int32_t dtype = is_int64 ? torch.int64 : torch.types[0];
  if (get(torch.dtype, tensor) != dtype || get(torch.numel, tensor) != n || !get(torch.is_contiguous, tensor)) {
    const std::string type = is_int64 ? "int64" : "float32";
    fail(std::string(name) + " must be contiguous, " + type + ", of size " + std::to_string(n));
  }
  check_storage(tensor, name);
  return static_cast<T*>(data(tensor));
}

Tensor empty(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype);

}  // namespace normlab
