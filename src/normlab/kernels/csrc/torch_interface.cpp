// Torch's functions and tensors: the functions are found by name, and tensors are checked and made with them.
#include "torch_interface.h"

#include <stdexcept>
#include <string>
#include <type_traits>

namespace normlab {

void find_torch(const std::function<uintptr_t(const char* name)>& address) {
  const auto find = [&](auto*& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(address(name));
  };
  const auto constant = [&](const char* name) {
    int32_t (*of_name)();
    find(of_name, name);
    return of_name();
  };
  find(torch.open, "aoti_torch_library_init_impl");
  find(torch.implement, "torch_library_impl");
  find(torch.delete_tensor, "aoti_torch_delete_tensor_object");
  find(torch.dim, "aoti_torch_get_dim");
  find(torch.numel, "aoti_torch_get_numel");
  find(torch.sizes, "aoti_torch_get_sizes");
  find(torch.strides, "aoti_torch_get_strides");
  find(torch.dtype, "aoti_torch_get_dtype");
  find(torch.data, "aoti_torch_get_data_ptr");
  find(torch.storage_size, "aoti_torch_get_storage_size");
  find(torch.storage_offset, "aoti_torch_get_storage_offset");
  find(torch.is_contiguous, "aoti_torch_is_contiguous");
  find(torch.empty_strided, "aoti_torch_empty_strided");
  find(torch.copy, "aoti_torch_copy_");
  torch.cpu = constant("aoti_torch_device_type_cpu");
  torch.int64 = constant("aoti_torch_dtype_int64");
  torch.types = {constant("aoti_torch_dtype_float32"), constant("aoti_torch_dtype_bfloat16"),
                 constant("aoti_torch_dtype_float16")};
}

void fail(const std::string& what) { throw std::runtime_error("normlab: " + what); }

void check_storage(const Tensor& tensor, const char* name) {
  const int64_t dim = get(torch.dim, tensor), *sizes = get(torch.sizes, tensor), *strides = get(torch.strides, tensor);
  const int32_t dtype = get(torch.dtype, tensor);
  int64_t values = get(torch.storage_offset, tensor) + 1;  // up to the last of this tensor
  for (int64_t d = 0; d < dim; ++d) {
    if (sizes[d] == 0) return;
    values += (sizes[d] - 1) * strides[d];
  }
  const int64_t bytes = values * (dtype == torch.int64 ? 8 : dtype == torch.types[0] ? 4 : 2);
  const int64_t there = get(torch.storage_size, tensor);
  if (there < bytes) {
    fail(std::string(name) + " needs " + std::to_string(bytes) + " bytes of storage, and " + std::to_string(there) +
         " are there: it was freed, or resized");
  }
}

Tensor empty(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  Handle made;
  check(!torch.empty_strided(dim, sizes, strides, dtype, torch.cpu, 0, &made), "no memory for a tensor");
  return Tensor(made);
}

}  // namespace normlab
