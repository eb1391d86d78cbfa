// torch's device "cuda" on a machine without one: its tensors are the host's memory, its kernels those of the CPU.
//
// Tensors, autograd, autocast and torch's own branches take them for a GPU's. What a GPU would refuse is refused:
// operands on two devices; and, as fake_cuda_watch says, whatever the host would have to wait for.

#include <ATen/core/Tensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/TensorUtils.h>
#include <ATen/ops/copy.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <mutex>
#include <set>
#include <string>

namespace {

enum Watch { NOTHING = 0, WAITING = 1, CAPTURE = 2 };
std::atomic<int> watch{NOTHING};
const c10::Device GPU{c10::DeviceType::CUDA, 0};

void waits(const std::string& what) {
  const int now = watch;
  TORCH_CHECK(now != CAPTURE, "CUDA error: operation not permitted when stream is capturing (", what, ")");
  TORCH_CHECK(now != WAITING, "called a synchronizing CUDA operation: ", what);
}

// ---- memory ------------------------------------------------------------------------------------------------------

std::mutex pinned_mutex;
std::set<void*> pinned;

struct PinnedAllocator final : c10::Allocator {
  static void free(void* context) {
    auto* data = static_cast<c10::DataPtr*>(context);
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.erase(data->get());
    delete data;
  }
  c10::DataPtr allocate(size_t size) override {
    auto* data = new c10::DataPtr(c10::GetCPUAllocator()->allocate(size ? size : 1));
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.insert(data->get());
    return {data->get(), data, &free, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }
};
PinnedAllocator pinned_allocator;

// A storage of the same memory on another device, which keeps the first alive
c10::Storage same_memory(const c10::Storage& storage, c10::Device device) {
  auto* kept = new c10::Storage(storage);
  c10::DataPtr data(storage.mutable_data(), kept, [](void* p) { delete static_cast<c10::Storage*>(p); }, device);
  return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetCPUAllocator(), true);
}

at::Tensor tensor_of(c10::Storage storage, const at::Tensor& like, c10::DispatchKey key) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return tensor;
}

// ---- kernels: those of the CPU -----------------------------------------------------------------------------------

struct Call {
  std::vector<std::pair<at::Tensor, at::Tensor>> seen;  // a tensor of ours, and the CPU's of the same memory
  std::string on_cpu;                                   // what is not a scalar and not on the GPU

  at::Tensor host(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) {
      if (tensor.defined() && tensor.dim() > 0) {
        on_cpu = c10::str(tensor.sizes());
      }
      return tensor;
    }
    for (auto& [ours, theirs] : seen) {
      if (ours.is_same(tensor)) {
        return theirs;
      }
    }
    for (auto& [ours, theirs] : seen) {
      if (ours.storage().is_alias_of(tensor.storage())) {
        seen.emplace_back(tensor, tensor_of(theirs.storage(), tensor, c10::DispatchKey::CPU));
        return seen.back().second;
      }
    }
    auto theirs = tensor_of(same_memory(tensor.storage(), c10::kCPU), tensor, c10::DispatchKey::CPU);
    seen.emplace_back(tensor, theirs);
    return theirs;
  }

  // What the kernel has done to its operands' sizes
  void finish() {
    for (auto& [mine, theirs] : seen) {
      if (mine.storage().data() != theirs.storage().data()) {
        auto grown = same_memory(theirs.storage(), GPU);
        mine.storage().set_data_ptr_noswap(std::move(grown.mutable_data_ptr()));
        mine.storage().set_nbytes(theirs.storage().nbytes());
      }
      if (mine.sizes() != theirs.sizes() || mine.strides() != theirs.strides()) {
        mine.unsafeGetTensorImpl()->set_sizes_and_strides(theirs.sizes(), theirs.strides(), theirs.storage_offset());
      }
    }
  }

  at::Tensor ours(const at::Tensor& result) {
    if (!result.defined() || result.is_cuda()) {
      return result;
    }
    for (auto& [mine, theirs] : seen) {
      if (theirs.is_same(result)) {
        return mine;
      }
    }
    for (auto& [mine, theirs] : seen) {
      if (theirs.storage().is_alias_of(result.storage())) {
        auto view = at::detail::make_tensor<c10::TensorImpl>(
            c10::TensorImpl::VIEW, c10::Storage(mine.storage()), mine.key_set(), result.dtype());
        view.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes(), result.strides(), result.storage_offset());
        return view;
      }
    }
    return tensor_of(same_memory(result.storage(), GPU), result, c10::DispatchKey::CUDA);
  }
};

template <typename F>
c10::IValue each_tensor(const c10::IValue& value, F change) {
  if (value.isTensor()) {
    return change(value.toTensor());
  }
  if (value.isTensorList()) {
    c10::List<at::Tensor> tensors;
    for (const at::Tensor& tensor : value.toTensorVector()) {
      tensors.push_back(change(tensor));
    }
    return tensors;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> tensors;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList().vec()) {
      tensors.push_back(tensor.has_value() ? std::optional<at::Tensor>(change(*tensor)) : std::nullopt);
    }
    return tensors;
  }
  return value;
}

const std::set<std::string> READ_BACK = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select",
    "aten::_unique2", "aten::is_nonzero", "aten::equal", "aten::unique_dim", "aten::unique_consecutive",
    "aten::bincount", "aten::repeat_interleave"};

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const bool is_index = schema.name() == "aten::index" || schema.name() == "aten::_index_put_impl_";
  Call call;
  const size_t count = schema.arguments().size(), first = stack->size() - count;
  if (READ_BACK.count(schema.name()) && !(schema.name() == "aten::repeat_interleave" && (*stack)[first + 1].isInt())) {
    waits(schema.name());
  }
  for (size_t i = first; i < stack->size(); i++) {
    c10::IValue& value = (*stack)[i];
    if (value.isDevice()) {
      value = c10::Device(c10::kCPU);
    } else if (schema.arguments()[i - first].name() == "pin_memory") {
      value = c10::IValue();
    } else {
      value = each_tensor(value, [&](const at::Tensor& tensor) {
        if (is_index && tensor.defined() && i > first && tensor.scalar_type() == at::kBool) {
          waits(schema.name() + " by a mask");
        }
        return call.host(tensor);
      });
    }
  }
  TORCH_CHECK(call.seen.empty() || call.on_cpu.empty(), schema.name(),
      ": Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu (a tensor of ",
      call.on_cpu, ")");
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    op.callBoxed(stack);
  }
  call.finish();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++) {
    (*stack)[i] = each_tensor((*stack)[i], [&](const at::Tensor& tensor) { return call.ours(tensor); });
  }
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  if (self.device() != source.device()) {
    const at::Tensor& host = self.is_cuda() ? source : self;
    std::lock_guard<std::mutex> lock(pinned_mutex);
    const bool is_pinned = pinned.count(host.storage().mutable_data()) > 0;
    if (!non_blocking || !is_pinned) {
      waits(is_pinned ? "a copy between host and device" : "a copy between the host's pageable memory and the device");
    }
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  Call call;
  call.host(self).copy_(call.host(source), false);
  return self;
}

int64_t sdp_choice(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double,
    bool, std::optional<double>, bool) {
  return 0;  // products and a softmax
}

at::Tensor& set_(at::Tensor& self, c10::Storage storage) {
  const auto count = static_cast<int64_t>(storage.nbytes() / self.itemsize());
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  const int64_t stride = 1;
  self.unsafeGetTensorImpl()->set_sizes_and_strides(c10::IntArrayRef(count), c10::IntArrayRef(stride), 0);
  return self;
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("copy_", copy_);
  m.impl("_fused_sdp_choice", sdp_choice);
  m.impl("set_.source_Storage", set_);
}

// ---- the device --------------------------------------------------------------------------------------------------

struct Hooks : at::CUDAHooksInterface {  // no "override": older versions of torch have less of it
  Hooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const { return true; }
  bool isBuilt() const { return true; }
  bool isAvailable() const { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const { return true; }
  void init() const {}
  int getNumGPUs() const { return 1; }
  c10::DeviceIndex deviceCount() const { return 1; }
  c10::DeviceIndex current_device() const { return 0; }
  c10::DeviceIndex getCurrentDevice() const { return 0; }
  bool isPinnedPtr(const void* data) const {
    std::lock_guard<std::mutex> lock(pinned_mutex);
    return pinned.count(const_cast<void*>(data)) > 0;
  }
  c10::Allocator* getPinnedMemoryAllocator() const { return &pinned_allocator; }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return GPU; }
  c10::Device getDevice() const override { return GPU; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, GPU); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = const_cast<c10::Device*>(&GPU);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace

namespace at {
using FakeHooks = Hooks;
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", FakeHooks)
}  // namespace at

extern "C" void fake_cuda_watch(int what) { watch = what; }
