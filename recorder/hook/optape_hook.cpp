// The hook: one boxed fallback on a free dispatch key that sees every op call of the threads it is switched on for, and
// hands it to capture through the ABI of optape_hook.h. It knows libtorch; what a call means is capture's business.
//
// Built against the headers of the torch that is loaded (g++ or clang, C++20), and against C++-only libtorch: nothing of
// libtorch_python is used. The library is never unloaded.
//
// Rules of this file: nothing of the run may change. No tensor is copied and no reference count is touched that the
// dispatcher would not touch itself (one exception, see `Frame::keep`); no values are read; no exception of ours leaves it.

#include "optape_hook.h"

#include <dlfcn.h>
#include <pthread.h>
#include <time.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <typeinfo>
#include <unordered_map>
#include <vector>

#include <ATen/SequenceNumber.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <ATen/record_function.h>
#include <c10/core/AutogradState.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/ScalarTypeToTypeMeta.h>
#include <c10/core/UndefinedTensorImpl.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>
#include <torch/version.h>

// Declared here because their header (graph_task.h) doubles the compile time.
namespace torch::autograd {
TORCH_API int get_current_graph_task_id();
}  // namespace torch::autograd

#define LIKELY(x) C10_LIKELY(x)
#define UNLIKELY(x) C10_UNLIKELY(x)
#define APART __attribute__((noinline))  // one copy: these are called from many kernels
#define COLD __attribute__((cold, noinline))
#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using c10::TensorImpl;
using torch::jit::Stack;

// ---- what was decided at install ----------------------------------------------------------------------------------

const optape_capture* capture = nullptr;
std::atomic<bool> failed{false};
DispatchKey hook_key = DispatchKey::Undefined;
const char* hook_key_name = "";
DispatchKeySet below_hook;       // the keys that come after ours
uint64_t hook_bit = 0;           // our key in a raw key set
bool above_autograd = false;     // plan B: our key comes before autograd
std::array<uint8_t, 256> item_bytes{};  // by ScalarType
c10::DeleterFnPtr torch_deleter = nullptr;

// Something in the recorder does not work: say so once, and let every op pass from now on.
COLD void give_up(const char* why) noexcept {
  if (!failed.exchange(true) && capture != nullptr) {
    capture->failed(why);
  }
}

COLD void give_up_with_current_exception() noexcept {
  try {
    throw;
  } catch (const std::exception& error) {
    try {
      give_up((std::string("the hook met an error: ") + error.what()).c_str());
    } catch (...) {
      give_up("the hook met an error and no memory to say which");
    }
  } catch (...) {
    give_up("the hook met an unknown error");
  }
}

constexpr uint32_t recorded_bits = 3;
constexpr uint32_t paused_bit = 4;

bool recording() {
  return (__atomic_load_n(capture->recording, __ATOMIC_RELAXED) & recorded_bits) != 0 && LIKELY(!failed.load(std::memory_order_relaxed));
}

uint64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<uint64_t>(time.tv_sec) * 1000000000u + static_cast<uint64_t>(time.tv_nsec);
}

// ---- Python, if there is one ----------------------------------------------------------------------------------------

// The few functions of CPython's interface that are needed, found in the process that loaded us: programs on libtorch alone
// have none.
struct Python {
  using Object = void;
  using Fast = Object* (*)(Object*, Object* const*, intptr_t);
  using Vectorcall = Object* (*)(Object*, Object* const*, size_t, Object*);
  struct Method {
    const char* name;
    void* function;
    int flags;
    const char* documentation;
  };
  Object* (*new_function)(Method*, Object*, Object*) = nullptr;
  Object* (*call)(Object*, ...) = nullptr;
  Object* (*attribute)(Object*, Object*) = nullptr;
  Object* (*intern)(const char*) = nullptr;
  Object* (*item)(Object*, intptr_t) = nullptr;
  Object* (*type)(Object*) = nullptr;
  Object* (*boolean)(long) = nullptr;
  int (*is_true)(Object*) = nullptr;
  long (*as_long)(Object*) = nullptr;
  void* (*as_pointer)(Object*) = nullptr;
  Object* (*integer)(long) = nullptr;
  const char* (*as_text)(Object*) = nullptr;
  Object* (*dict_item)(Object*, Object*) = nullptr;  // borrowed
  int (*dict_next)(Object*, intptr_t*, Object**, Object**) = nullptr;
  intptr_t (*tuple_size)(Object*) = nullptr;
  Object* (*tuple_item)(Object*, intptr_t) = nullptr;  // borrowed
  intptr_t (*list_size)(Object*) = nullptr;
  Object* (*list_item)(Object*, intptr_t) = nullptr;  // borrowed
  int (*is_subtype)(Object*, Object*) = nullptr;
  int (*take_gil)() = nullptr;
  void (*give_gil)(int) = nullptr;
  void (*increment)(Object*) = nullptr;
  void (*decrement)(Object*) = nullptr;
  void (*clear_error)() = nullptr;
  void (*set_string)(Object*, const char*) = nullptr;
  Object** type_error = nullptr;
  Object* none = nullptr;
  Object* tuple_type = nullptr;
  Object* list_type = nullptr;
  Object* dict_type = nullptr;
  Object* bool_type = nullptr;
  Object* int_type = nullptr;
  Object* float_type = nullptr;
  Object* text_type = nullptr;
  // Not in every version:
  Vectorcall (*function_call)(Object*) = nullptr;  // from 3.11
  Vectorcall usual_call = nullptr;                 // up to 3.12: what function_call gives for functions
  void (*set_function_call)(Object*, Vectorcall) = nullptr;
  bool present = false;

  template <typename T>
  static bool find(T& out, const char* name) {
    out = reinterpret_cast<T>(dlsym(RTLD_DEFAULT, name));
    return out != nullptr;
  }
  bool load() {
    find(function_call, "PyVectorcall_Function");
    find(usual_call, "_PyFunction_Vectorcall");
    find(set_function_call, "PyFunction_SetVectorcall");
    return present = find(new_function, "PyCFunction_NewEx") && find(call, "PyObject_CallFunctionObjArgs") &&
        find(attribute, "PyObject_GetAttr") && find(intern, "PyUnicode_InternFromString") && find(item, "PySequence_GetItem") &&
        find(type, "PyObject_Type") && find(boolean, "PyBool_FromLong") && find(is_true, "PyObject_IsTrue") &&
        find(as_long, "PyLong_AsLong") && find(as_pointer, "PyLong_AsVoidPtr") && find(increment, "Py_IncRef") &&
        find(decrement, "Py_DecRef") && find(clear_error, "PyErr_Clear") && find(set_string, "PyErr_SetString") &&
        find(type_error, "PyExc_TypeError") && find(none, "_Py_NoneStruct") && find(tuple_type, "PyTuple_Type") &&
        find(list_type, "PyList_Type") && find(dict_type, "PyDict_Type") && find(bool_type, "PyBool_Type") &&
        find(int_type, "PyLong_Type") && find(float_type, "PyFloat_Type") && find(text_type, "PyUnicode_Type") &&
        find(as_text, "PyUnicode_AsUTF8") && find(dict_item, "PyDict_GetItem") && find(dict_next, "PyDict_Next") &&
        find(tuple_size, "PyTuple_Size") && find(tuple_item, "PyTuple_GetItem") && find(list_size, "PyList_Size") &&
        find(list_item, "PyList_GetItem") && find(is_subtype, "PyType_IsSubtype") && find(take_gil, "PyGILState_Ensure") &&
        find(give_gil, "PyGILState_Release") && find(integer, "PyLong_FromLong");
  }
  Vectorcall call_of(Object* function) const {
    return function_call != nullptr ? function_call(function) : usual_call;
  }
  Object* nothing() const {
    increment(none);
    return none;
  }
  Object* refuse(const char* usage) const {
    set_string(*type_error, usage);
    return nullptr;
  }
};
Python python;


// ---- operators ----------------------------------------------------------------------------------------------------

// What a schema argument can hold, as far as its IValue does not say it itself.
enum class Kind : uint8_t { Tensor, Int, Dtype, Device, Enumerator, Float, Bool, Text, List, Other };

struct Operator {
  const void* key = nullptr;               // address of the operator's name inside the dispatcher
  std::atomic<Operator*> next{nullptr};    // same bucket
  std::atomic<bool> alive{true};           // false once deregistered: the address may come again
  uint32_t index = 0;
  std::atomic<uint32_t> plan_flags{0};     // another recording may want something else
  uint32_t argument_count = 0;
  uint32_t return_count = 0;
  const uint8_t* wild = nullptr;
  bool pass = false;                       // not recorded as an op call
  bool range = false;                      // opens or closes a profiler range
  bool may_accumulate = false;             // aten::add_.Tensor
  bool refresh = false;                    // writes arguments that it does not return
  std::vector<Kind> kinds;                 // arguments, then returns
  std::vector<uint32_t> type_texts;        // text ids of their types' names
  std::vector<uint32_t> hidden_writes;     // arguments written but not returned

  bool wants(uint32_t flag) const {
    return (plan_flags.load(std::memory_order_relaxed) & flag) != 0;
  }
};

constexpr size_t bucket_count = 8192;
std::atomic<Operator*> buckets[bucket_count];
std::mutex define_lock;
std::vector<Operator*>& functions = *new std::vector<Operator*>;  // of Python; known by address

size_t bucket_of(const void* key) {
  return (reinterpret_cast<uintptr_t>(key) * 0x9e3779b97f4a7c15u) >> (64 - 13);
}
static_assert(bucket_count == size_t{1} << 13);

const void* key_of(const c10::OperatorHandle& op) {
  return &op.operator_name();
}

Operator* find(const void* key) {
  for (Operator* o = buckets[bucket_of(key)].load(std::memory_order_acquire); o != nullptr;
       o = o->next.load(std::memory_order_acquire)) {
    if (LIKELY(o->key == key && o->alive.load(std::memory_order_relaxed))) {
      return o;
    }
  }
  return nullptr;
}

// A library that is destroyed (torch.library._scoped_library) frees its operators; their addresses come again for others.
struct Deregistration final : c10::OpRegistrationListener {
  void onOperatorRegistered(const c10::OperatorHandle& /*op*/) override {}
  void onOperatorDeregistered(const c10::OperatorHandle& op) override {
    const void* key = key_of(op);
    for (Operator* o = buckets[bucket_of(key)].load(std::memory_order_acquire); o != nullptr;
         o = o->next.load(std::memory_order_acquire)) {
      if (o->key == key) {
        o->alive.store(false, std::memory_order_relaxed);
      }
    }
  }
};

Kind kind_of(const c10::Type& declared) {
  const c10::Type* type = &declared;
  if (const auto* optional = type->castRaw<c10::OptionalType>()) {
    type = optional->getElementType().get();
  }
  switch (type->kind()) {
    case c10::TypeKind::TensorType:
      return Kind::Tensor;
    case c10::TypeKind::IntType:
    case c10::TypeKind::SymIntType:
    case c10::TypeKind::NumberType:
      return Kind::Int;
    case c10::TypeKind::ScalarTypeType:
      return Kind::Dtype;
    case c10::TypeKind::LayoutType:
    case c10::TypeKind::MemoryFormatType:
      return Kind::Enumerator;
    case c10::TypeKind::DeviceObjType:
      return Kind::Device;
    case c10::TypeKind::FloatType:
    case c10::TypeKind::SymFloatType:
      return Kind::Float;
    case c10::TypeKind::BoolType:
    case c10::TypeKind::SymBoolType:
      return Kind::Bool;
    case c10::TypeKind::StringType:
      return Kind::Text;
    case c10::TypeKind::ListType:
      return Kind::List;
    default:
      return Kind::Other;
  }
}

// An argument's texts, kept while define_op reads them.
struct ArgumentTexts {
  std::string name, type, default_value, alias;
  bool has_default = false;
  bool written = false;

  explicit ArgumentTexts(const c10::Argument& argument) : name(argument.name()) {
    c10::TypePtr declared = argument.real_type();
    const auto* optional = declared->castRaw<c10::OptionalType>();
    c10::TypePtr plain = optional != nullptr ? optional->getElementType() : declared;
    if (const auto* list = plain->castRaw<c10::ListType>()) {
      const auto size = argument.N();
      type = list->getElementType()->str() + "[" + (size ? std::to_string(*size) : std::string()) + "]";
    } else {
      type = plain->str();
    }
    if (optional != nullptr) {
      type += "?";
    }
    if (argument.default_value()) {
      has_default = true;
      std::ostringstream printed;
      printed << argument;
      const std::string text = printed.str();
      const std::string mark = " " + name + "=";
      const size_t at = text.rfind(mark);
      default_value = at == std::string::npos ? std::string() : text.substr(at + mark.size());
    }
    if (const auto* info = argument.alias_info()) {
      written = info->isWrite();
      // `Tensor(a!)[]`: the letters stand at the elements.
      const auto& sets = info->beforeSets().empty() && !info->containedTypes().empty() ? info->containedTypes()[0].beforeSets() : info->beforeSets();
      for (const auto& set : sets) {
        alias += set.toUnqualString();
      }
    }
  }

  optape_argument view(bool keyword_only) const {
    optape_argument out{};
    out.name = name.c_str();
    out.type_name = type.c_str();
    out.default_value = has_default ? default_value.c_str() : nullptr;
    out.alias = alias.c_str();
    out.keyword_only = keyword_only ? 1 : 0;
    out.written = written ? 1 : 0;
    return out;
  }
};

bool is_composite(const c10::OperatorHandle& op) {
  return op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd);
}

void describe(const c10::OperatorHandle& handle, Operator& op) {
  const c10::FunctionSchema& schema = handle.schema();
  const auto& name = handle.operator_name();
  std::vector<ArgumentTexts> texts;
  texts.reserve(schema.arguments().size() + schema.returns().size());
  std::vector<optape_argument> arguments, returns;
  for (const auto& argument : schema.arguments()) {
    texts.emplace_back(argument);
    arguments.push_back(texts.back().view(argument.kwarg_only()));
    op.kinds.push_back(kind_of(*argument.real_type()));
  }
  for (const auto& value : schema.returns()) {
    texts.emplace_back(value);
    returns.push_back(texts.back().view(false));
    op.kinds.push_back(kind_of(*value.real_type()));
  }
  for (const auto& text : texts) {
    op.type_texts.push_back(capture->text(text.type.data(), text.type.size()));
  }
  op.argument_count = static_cast<uint32_t>(arguments.size());
  op.return_count = static_cast<uint32_t>(returns.size());
  for (uint32_t i = 0; i < op.argument_count; ++i) {
    if (!arguments[i].written) {
      continue;
    }
    const bool returned = std::any_of(returns.begin(), returns.end(), [&](const optape_argument& value) {
      return std::strcmp(value.alias, arguments[i].alias) == 0;
    });
    if (!returned) {
      op.hidden_writes.push_back(i);
    }
  }
  op.refresh = !op.hidden_writes.empty();
  op.may_accumulate = name.name == "aten::add_" && name.overload_name == "Tensor";
  op.range = name.name == "profiler::_record_function_enter_new" || name.name == "profiler::_record_function_exit";
  op.pass = name.name == "optape::watch" || (above_autograd && is_composite(handle));

  optape_operator told{};
  told.name = name.name.c_str();
  told.overload = name.overload_name.c_str();
  told.arguments = arguments.data();
  told.argument_count = op.argument_count;
  told.returns = returns.data();
  told.return_count = op.return_count;
  optape_plan plan{};
  if (capture->define_op(&told, &plan) != 0) {
    throw std::runtime_error("capture refused the operator " + name.name);
  }
  op.index = plan.op;
  op.plan_flags.store(plan.flags, std::memory_order_relaxed);
  op.wild = plan.wild;
}

COLD Operator* define(const c10::OperatorHandle& handle) {
  std::lock_guard<std::mutex> guard(define_lock);
  const void* key = key_of(handle);
  if (Operator* known = find(key)) {
    return known;
  }
  auto op = std::make_unique<Operator>();
  op->key = key;
  describe(handle, *op);
  auto& bucket = buckets[bucket_of(key)];
  op->next.store(bucket.load(std::memory_order_relaxed), std::memory_order_relaxed);
  bucket.store(op.get(), std::memory_order_release);
  return op.release();  // Lives as long as the process: calls on other threads may still hold it.
}

// ---- one call in flight -------------------------------------------------------------------------------------------

// A growing array that keeps its memory between calls.
template <typename T>
struct Arena {
  T* items = nullptr;
  uint32_t count = 0;
  uint32_t room = 0;
  uint32_t moves = 0;

  COLD void grow(uint32_t needed) {
    uint32_t wanted = std::max(room * 2, 256u);
    while (wanted < needed) {
      wanted *= 2;
    }
    auto* moved = static_cast<T*>(std::realloc(items, sizeof(T) * wanted));
    if (moved == nullptr) {
      throw std::bad_alloc();
    }
    items = moved;
    room = wanted;
    ++moves;
  }
  void reserve(uint32_t more) {
    if (UNLIKELY(count + more > room)) {
      grow(count + more);
    }
  }
  void add(const T& item) {
    reserve(1);
    items[count++] = item;
  }
};

// The memory of one call: a frame for each level of nesting, reused by all calls of the thread on that level.
struct Frame {
  optape_call call{};
  Arena<uint64_t> words;
  Arena<uint64_t> payload;
  Arena<optape_tensor> tensors;
  Arena<uint32_t> size_words;  // of each tensor: where its sizes stand in `words`
  uint32_t words_moved = 0;  // `words.moves` when the tensors' sizes were pointed at `words` last
  // Inputs of which the argument stack holds the last reference: the kernel drops them, capture looks at them afterwards.
  std::vector<c10::intrusive_ptr<TensorImpl, c10::UndefinedTensorImpl>> keep;
};

constexpr uint32_t frames_at_once = 8;

struct Thread {
  c10::impl::PODLocalDispatchKeySet* keys;
  const c10::AutogradState* autograd;
  uint64_t id;
  uint32_t depth = 0;
  bool on = false;
  Frame first[frames_at_once];
  std::vector<std::unique_ptr<Frame>> deeper;
  // Function calls, outermost first. Frames of their own: ops run inside of them, and no kernel runs for them.
  struct FunctionCall {
    Frame frame;
    const Operator* op = nullptr;
  };
  std::vector<std::unique_ptr<FunctionCall>> function_calls;
  size_t open_functions = 0;
  std::vector<const void*> optimizer_ranges;  // open ones
  struct Text {
    uint32_t id = 0;
    uint8_t length = 0;
    char bytes[27] = {};
  };
  Text texts[64];

  Thread()
      : keys(&c10::impl::raw_local_dispatch_key_set),
        autograd(&c10::AutogradState::get_tls_state()),
        id(at::RecordFunction::currentThreadId()) {}

  Frame& frame(uint32_t level) {
    if (LIKELY(level < frames_at_once)) {
      return first[level];
    }
    return deep_frame(level - frames_at_once);
  }
  COLD Frame& deep_frame(uint32_t level) {
    while (deeper.size() <= level) {
      deeper.push_back(std::make_unique<Frame>());
    }
    return *deeper[level];
  }
};

thread_local Thread* this_thread = nullptr;

// Freed with the thread, except where thread-local destructors of others still run ops after it.
struct ThreadOwner {
  ~ThreadOwner() {
    Thread* gone = this_thread;
    this_thread = nullptr;
    if (gone != nullptr && gone->depth == 0) {
      for (Frame& frame : gone->first) {
        release(frame);
      }
      for (const auto& frame : gone->deeper) {
        release(*frame);
      }
      for (const auto& call : gone->function_calls) {
        release(call->frame);
      }
      delete gone;
    }
  }

  static void release(Frame& frame) {
    std::free(frame.words.items);
    std::free(frame.payload.items);
    std::free(frame.tensors.items);
    std::free(frame.size_words.items);
  }
};

COLD Thread* make_thread() {
  static thread_local ThreadOwner owner;
  static_cast<void>(owner);
  this_thread = new Thread();
  return this_thread;
}

Thread& thread() {
  Thread* t = this_thread;
  return LIKELY(t != nullptr) ? *t : *make_thread();
}

// ---- tensors ------------------------------------------------------------------------------------------------------

// Names protected members of TensorImpl, so that what a tensor says about itself is read and nothing virtual is called:
// Python subclasses answer sizes() and device() in Python.
struct Inside final : TensorImpl {
  static bool custom_sizes(const TensorImpl* t) {
    return (t->*(&Inside::matches_policy))(SizesStridesPolicy::CustomSizes);
  }
  static bool custom_strides(const TensorImpl* t) {
    return (t->*(&Inside::matches_policy))(SizesStridesPolicy::CustomStrides);
  }
  static const c10::impl::SizesAndStrides& shape(const TensorImpl* t) {
    return t->*(&Inside::sizes_and_strides_);
  }
  static const std::optional<c10::Device>& device(const TensorImpl* t) {
    return t->*(&Inside::device_opt_);
  }
  static int64_t offset(const TensorImpl* t) {
    return t->*(&Inside::storage_offset_);
  }
};

uint64_t bit(DispatchKey key) {
  return DispatchKeySet(key).raw_repr();
}

// Functionality bits, without the backend's.
uint64_t functionality(DispatchKey key) {
  return bit(key) & ~c10::full_backend_mask;
}

struct Masks {
  uint64_t sparse = functionality(DispatchKey::Sparse) | functionality(DispatchKey::SparseCsr);
  uint64_t nested = functionality(DispatchKey::NestedTensor);
  uint64_t quantized = functionality(DispatchKey::Quantized);
  uint64_t mkldnn = bit(DispatchKey::MkldnnCPU);
  uint64_t conjugate = bit(DispatchKey::Conjugate);
  uint64_t negative = bit(DispatchKey::Negative);
  uint64_t zero = bit(DispatchKey::ZeroTensor);
  uint64_t python = bit(DispatchKey::Python);
  uint64_t no_values = bit(DispatchKey::FuncTorchBatched) | bit(DispatchKey::FuncTorchGradWrapper) | bit(DispatchKey::Batched) |
      bit(DispatchKey::Functionalize) | bit(DispatchKey::BatchedNestedTensor) |
      (uint64_t{1} << (static_cast<uint8_t>(c10::BackendComponent::MetaBit) - 1));
  uint64_t special = sparse | nested | quantized | mkldnn | conjugate | negative | zero | python | no_values;
};
const Masks masks;

uint64_t word(uint64_t tag, uint64_t aux) {
  return tag | aux << 8;
}

// ---- storages -----------------------------------------------------------------------------------------------------

std::atomic_flag adopting = ATOMIC_FLAG_INIT;

void adopted_deleter(void* memory) {
  capture->storage_freed(memory);
  torch_deleter(memory);
}

// Has the death of a CPU storage reported, by a deleter of our own around torch's.
COLD uint32_t adopt(c10::DataPtr& memory) {
  while (adopting.test_and_set(std::memory_order_acquire)) {
  }
  const bool swapped = memory.get_context() == memory.get() && memory.compare_exchange_deleter(torch_deleter, &adopted_deleter);
  adopting.clear(std::memory_order_release);
  if (swapped) {
    return OPTAPE_TENSOR_OWNED | OPTAPE_TENSOR_ADOPTED;
  }
  return memory.get_deleter() == &adopted_deleter ? static_cast<uint32_t>(OPTAPE_TENSOR_OWNED) : 0u;
}

uint32_t ownership(c10::StorageImpl* storage) {
  c10::DataPtr& memory = storage->_mutable_data_ptr_no_checks();
  const c10::DeleterFnPtr deleter = memory.get_deleter();
  uint32_t flags = 0;
  if (LIKELY(deleter == &adopted_deleter)) {
    flags = OPTAPE_TENSOR_OWNED;
  } else if (deleter == torch_deleter) {
    flags = adopt(memory);
  }
  if (flags != 0 && storage->resizable()) {
    flags |= OPTAPE_TENSOR_CACHEABLE;
  }
  return flags;
}

// A forked child must not find a lock held by a thread that it does not have.
void before_fork() {
  define_lock.lock();
  while (adopting.test_and_set(std::memory_order_acquire)) {
  }
}

void after_fork() {
  adopting.clear(std::memory_order_release);
  define_lock.unlock();
}

const char no_elements = 0;

// Writes what a call is made of into its frame.
struct Recorder {
  Frame& frame;
  Thread& thread;
  const Operator& op;
  uint32_t argument = 0;   // schema index of the value being written
  bool outputs = false;
  bool identities = false;

  void put(uint64_t w) {
    frame.words.add(w);
  }
  void pay(uint64_t w) {
    frame.payload.add(w);
  }

  uint32_t text(const std::string& value) {
    if (UNLIKELY(value.size() > sizeof(Thread::Text::bytes))) {
      return capture->text(value.data(), value.size());
    }
    size_t hash = value.size();
    for (const char c : value) {
      hash = hash * 31 + static_cast<unsigned char>(c);
    }
    Thread::Text& known = thread.texts[hash % 64];
    if (LIKELY(known.length == value.size() && known.id != 0 && std::memcmp(known.bytes, value.data(), value.size()) == 0)) {
      return known.id - 1;
    }
    const uint32_t id = capture->text(value.data(), value.size());
    known.id = id + 1;
    known.length = static_cast<uint8_t>(value.size());
    std::memcpy(known.bytes, value.data(), value.size());
    return id;
  }

  void opaque() {
    put(word(OPTAPE_WORD_OPAQUE, op.type_texts[outputs ? op.argument_count + argument : argument]));
  }

  APART void tensor(TensorImpl* t) {
    if (t == c10::UndefinedTensorImpl::singleton()) {
      put(OPTAPE_WORD_NONE);
      return;
    }
    const uint64_t keys = t->key_set().raw_repr();
    uint32_t flags = 0;
    if (const auto* meta = static_cast<const torch::autograd::AutogradMeta*>(t->autograd_meta())) {
      if (meta->grad_fn_) {
        flags |= OPTAPE_TENSOR_REQUIRES_GRAD;
      } else if (meta->requires_grad_) {
        flags |= OPTAPE_TENSOR_REQUIRES_GRAD | OPTAPE_TENSOR_LEAF_PARAMETER;
      }
    }
    if (UNLIKELY((keys & masks.special) != 0 || Inside::custom_strides(t))) {
      special_tensor(t, keys, flags);
      return;
    }
    const bool number = t->is_wrapped_number();
    if (number) {
      flags |= OPTAPE_TENSOR_WRAPPED_NUMBER;
    }
    const auto& device = Inside::device(t);
    const auto& shape = Inside::shape(t);
    const auto dim = static_cast<uint32_t>(shape.size());
    const auto dtype = static_cast<uint8_t>(c10::typeMetaToScalarType(t->dtype()));

    frame.tensors.reserve(1);
    frame.words.reserve(1 + 2 * dim);
    optape_tensor& out = frame.tensors.items[frame.tensors.count];
    out.impl = t;
    out.device_kind = device ? static_cast<uint8_t>(device->type()) : static_cast<uint8_t>(c10::DeviceType::CPU);
    out.device_index = device ? device->index() : static_cast<int8_t>(-1);
    out.dtype = static_cast<int8_t>(dtype);
    out.dim = static_cast<uint8_t>(dim);
    out.argument = argument;
    const auto& version = t->version_counter();
    out.version = version.enabled() ? version.current_version() : UINT32_MAX;

    uint64_t* words = frame.words.items + frame.words.count;
    words[0] = word(
        OPTAPE_WORD_TENSOR,
        dtype | static_cast<uint64_t>(out.device_kind) << 8 | static_cast<uint64_t>(static_cast<uint8_t>(out.device_index)) << 16 |
            static_cast<uint64_t>(out.dim) << 24 | static_cast<uint64_t>(flags & 0xffff) << 32);
    const int64_t* sizes = shape.sizes_data();
    const int64_t* strides = shape.strides_data();
    int64_t last = 0;  // furthest element
    bool empty = false;
    for (uint32_t d = 0; d < dim; ++d) {
      words[1 + d] = static_cast<uint64_t>(sizes[d]);
      words[1 + dim + d] = static_cast<uint64_t>(strides[d]);
      last += (sizes[d] - 1) * strides[d];
      empty |= sizes[d] == 0;
    }
    frame.size_words.add(frame.words.count + 1);
    frame.words.count += 1 + 2 * dim;
    out.sizes = reinterpret_cast<const int64_t*>(words + 1);
    out.strides = reinterpret_cast<const int64_t*>(words + 1 + dim);

    c10::StorageImpl* storage = t->unsafe_storage().unsafeGetStorageImpl();
    out.storage = storage;
    out.storage_base = nullptr;
    out.data = nullptr;
    out.device_data = 0;
    out.storage_bytes = 0;
    if (LIKELY(storage != nullptr)) {
      out.storage_bytes = storage->nbytes();
      const char* base = static_cast<const char*>(storage->_mutable_data_ptr_no_checks().get());
      out.storage_base = base;
      const uint64_t size = item_bytes[dtype];
      const int64_t offset = Inside::offset(t);
      if (LIKELY(out.device_kind == static_cast<uint8_t>(c10::DeviceType::CPU))) {
        if (UNLIKELY(empty)) {
          out.data = &no_elements;
        } else if (LIKELY(base != nullptr && size != 0 && static_cast<uint64_t>(offset + last + 1) * size <= out.storage_bytes)) {
          out.data = base + static_cast<uint64_t>(offset) * size;
        }
        if (identities && base != nullptr) {
          flags |= ownership(storage);
        }
      } else if (
          out.device_kind == static_cast<uint8_t>(c10::DeviceType::CUDA) && !empty && base != nullptr && size != 0 &&
          static_cast<uint64_t>(offset + last + 1) * size <= out.storage_bytes) {
        out.device_data = reinterpret_cast<uintptr_t>(base) + static_cast<uint64_t>(offset) * size;
      }
    }
    out.flags = flags;
    ++frame.tensors.count;
    if (UNLIKELY(number)) {
      number_payload(out);
    }
  }

  // The value of a number that became a tensor to take part in tensor arithmetic.
  COLD void number_payload(const optape_tensor& t) {
    const auto dtype = static_cast<c10::ScalarType>(t.dtype);
    const bool complex = c10::isComplexType(dtype);
    double real = 0, imaginary = 0;
    if (t.data == nullptr) {
      pay(0);
      if (complex) {
        pay(0);
      }
      return;
    }
    switch (dtype) {
      case c10::ScalarType::Bool:
        pay(*static_cast<const uint8_t*>(t.data) != 0 ? 1 : 0);
        return;
      case c10::ScalarType::Long:
        pay(*static_cast<const uint64_t*>(t.data));
        return;
      case c10::ScalarType::Double:
        real = *static_cast<const double*>(t.data);
        break;
      case c10::ScalarType::Float:
        real = *static_cast<const float*>(t.data);
        break;
      case c10::ScalarType::ComplexDouble:
        real = static_cast<const double*>(t.data)[0];
        imaginary = static_cast<const double*>(t.data)[1];
        break;
      case c10::ScalarType::ComplexFloat:
        real = static_cast<const float*>(t.data)[0];
        imaginary = static_cast<const float*>(t.data)[1];
        break;
      default:  // Numbers become double, long, bool or complex; ops below autocast may have cast them.
        number_of_other_type(t, dtype);
        return;
    }
    pay(bits(real));
    if (complex) {
      pay(bits(imaginary));
    }
  }

  void number_of_other_type(const optape_tensor& t, c10::ScalarType dtype) {
    switch (dtype) {
      case c10::ScalarType::Half:
        pay(bits(static_cast<double>(static_cast<float>(*static_cast<const c10::Half*>(t.data)))));
        return;
      case c10::ScalarType::BFloat16:
        pay(bits(static_cast<double>(static_cast<float>(*static_cast<const c10::BFloat16*>(t.data)))));
        return;
      case c10::ScalarType::Int:
        pay(static_cast<uint64_t>(static_cast<int64_t>(*static_cast<const int32_t*>(t.data))));
        return;
      case c10::ScalarType::Short:
        pay(static_cast<uint64_t>(static_cast<int64_t>(*static_cast<const int16_t*>(t.data))));
        return;
      case c10::ScalarType::Char:
        pay(static_cast<uint64_t>(static_cast<int64_t>(*static_cast<const int8_t*>(t.data))));
        return;
      case c10::ScalarType::Byte:
        pay(*static_cast<const uint8_t*>(t.data));
        return;
      default:
        pay(0);
        if (c10::isComplexType(dtype)) {
          pay(0);
        }
    }
  }

  static uint64_t bits(double value) {
    uint64_t out;
    std::memcpy(&out, &value, sizeof out);
    return out;
  }

  // Everything that is not a plain strided tensor: described as far as it can be without asking Python, values never.
  COLD void special_tensor(TensorImpl* t, uint64_t keys, uint32_t flags) {
    const bool fake = (keys & masks.no_values) != 0;
    const bool subclass = (keys & masks.python) != 0;
    flags |= (keys & masks.sparse) != 0 ? OPTAPE_TENSOR_SPARSE : 0;
    flags |= (keys & masks.nested) != 0 ? OPTAPE_TENSOR_NESTED : 0;
    flags |= (keys & masks.quantized) != 0 ? OPTAPE_TENSOR_QUANTIZED : 0;
    flags |= (keys & masks.mkldnn) != 0 ? OPTAPE_TENSOR_MKLDNN : 0;
    flags |= (keys & masks.conjugate) != 0 ? OPTAPE_TENSOR_CONJUGATE : 0;
    flags |= (keys & masks.negative) != 0 ? OPTAPE_TENSOR_NEGATIVE : 0;
    flags |= (keys & masks.zero) != 0 ? OPTAPE_TENSOR_ZERO : 0;
    flags |= subclass ? OPTAPE_TENSOR_SUBCLASS : 0;
    flags |= fake ? OPTAPE_TENSOR_NO_VALUES : 0;

    c10::StorageImpl* storage = t->unsafe_storage().unsafeGetStorageImpl();
    if (subclass && (storage == nullptr || storage->device_type() == c10::DeviceType::Meta)) {
      flags |= OPTAPE_TENSOR_NO_VALUES;
    }
    if ((flags & OPTAPE_TENSOR_NO_VALUES) != 0) {
      frame.call.flags |= OPTAPE_CALL_NOT_EXECUTED;
    }
    if (t->has_symbolic_sizes_strides()) {
      frame.call.flags |= OPTAPE_CALL_NOT_EXECUTED;
      opaque();
      return;
    }
    const bool no_sizes = Inside::custom_sizes(t) && !subclass;
    const bool no_strides = no_sizes || Inside::custom_strides(t) || (flags & (OPTAPE_TENSOR_SPARSE | OPTAPE_TENSOR_MKLDNN)) != 0;
    const auto& shape = Inside::shape(t);
    const uint32_t dim = no_sizes ? 0 : static_cast<uint32_t>(shape.size());
    const auto& device = Inside::device(t);

    frame.tensors.reserve(1);
    frame.words.reserve(1 + 2 * dim);
    optape_tensor& out = frame.tensors.items[frame.tensors.count];
    out = optape_tensor{};
    out.impl = t;
    out.device_kind = device ? static_cast<uint8_t>(device->type()) : static_cast<uint8_t>(c10::DeviceType::CPU);
    out.device_index = device ? device->index() : static_cast<int8_t>(-1);
    out.dtype = t->dtype().isScalarType() ? static_cast<int8_t>(c10::typeMetaToScalarType(t->dtype())) : static_cast<int8_t>(c10::ScalarType::Undefined);
    out.dim = static_cast<uint8_t>(dim);
    out.argument = argument;
    const auto& version = t->version_counter();
    out.version = version.enabled() ? version.current_version() : UINT32_MAX;
    if (storage != nullptr && (flags & OPTAPE_TENSOR_NO_VALUES) == 0) {
      out.storage = storage;
      out.storage_bytes = storage->sym_nbytes().is_heap_allocated() ? 0 : storage->nbytes();
      out.storage_base = storage->_mutable_data_ptr_no_checks().get();
      if (identities && out.storage_base != nullptr && storage->device_type() == c10::DeviceType::CPU) {
        flags |= ownership(storage);
      }
    }
    if (t->is_wrapped_number() && (flags & OPTAPE_TENSOR_NO_VALUES) == 0) {
      flags |= OPTAPE_TENSOR_WRAPPED_NUMBER;
    }
    out.flags = flags;
    uint64_t* words = frame.words.items + frame.words.count;
    words[0] = word(
        OPTAPE_WORD_TENSOR,
        static_cast<uint64_t>(static_cast<uint8_t>(out.dtype)) | static_cast<uint64_t>(out.device_kind) << 8 |
            static_cast<uint64_t>(static_cast<uint8_t>(out.device_index)) << 16 | static_cast<uint64_t>(out.dim) << 24 |
            static_cast<uint64_t>(flags & 0xffff) << 32 | static_cast<uint64_t>(no_strides ? 1 : 0) << 48);
    for (uint32_t d = 0; d < dim; ++d) {
      words[1 + d] = static_cast<uint64_t>(shape.size_at_unchecked(d));
      if (!no_strides) {
        words[1 + dim + d] = static_cast<uint64_t>(shape.stride_at_unchecked(d));
      }
    }
    frame.size_words.add(frame.words.count + 1);
    out.sizes = reinterpret_cast<const int64_t*>(words + 1);
    out.strides = no_strides ? nullptr : reinterpret_cast<const int64_t*>(words + 1 + dim);
    frame.words.count += 1 + (no_strides ? dim : 2 * dim);
    ++frame.tensors.count;
    if ((flags & OPTAPE_TENSOR_WRAPPED_NUMBER) != 0) {
      optape_tensor bare = out;
      if ((flags & (OPTAPE_TENSOR_CONJUGATE | OPTAPE_TENSOR_NEGATIVE | OPTAPE_TENSOR_ZERO | OPTAPE_TENSOR_SUBCLASS)) == 0 &&
          out.storage_base != nullptr && dim == 0) {
        bare.data = out.storage_base;
      }
      number_payload(bare);
    }
  }

  APART void integer(int64_t value, bool varies) {
    if (LIKELY(!varies)) {
      frame.words.reserve(2);
      frame.words.items[frame.words.count] = OPTAPE_WORD_INT;
      frame.words.items[frame.words.count + 1] = static_cast<uint64_t>(value);
      frame.words.count += 2;
    } else {
      put(OPTAPE_WORD_INT_PAYLOAD);
      pay(static_cast<uint64_t>(value));
    }
  }

  APART void real(double value) {
    const uint64_t raw = bits(value);
    if (raw == 0 || raw == 0x3ff0000000000000u) {
      put(word(OPTAPE_WORD_FLOAT, raw != 0 ? 1 : 0));
    } else {
      put(OPTAPE_WORD_FLOAT_PAYLOAD);
      pay(raw);
    }
  }

  void list(const IValue& value) {
    const c10::ArrayRef<IValue> items = value.toListRef();
    const uint64_t count = items.size();
    if (value.isTensorList() || (count != 0 && (items[0].isTensor() || items[0].isNone()))) {
      put(word(OPTAPE_WORD_TENSOR_LIST, count));
      for (const IValue& item : items) {
        if (item.isTensor()) {
          tensor(item.unsafeToTensorImpl());
        } else {
          put(OPTAPE_WORD_NONE);
        }
      }
      return;
    }
    bool ints = true, bools = true, numbers = true, symbolic = false;
    for (const IValue& item : items) {
      ints &= item.isInt();
      bools &= item.isBool();
      numbers &= item.isInt() || item.isDouble() || item.isBool();
      symbolic |= item.isSymInt();
    }
    if (symbolic) {
      frame.call.flags |= OPTAPE_CALL_NOT_EXECUTED;
    }
    if (count == 0) {
      empty_list(value);
    } else if (ints) {
      put(word(OPTAPE_WORD_INT_LIST, count));
      frame.words.reserve(static_cast<uint32_t>(count));
      for (const IValue& item : items) {
        frame.words.items[frame.words.count++] = static_cast<uint64_t>(item.toInt());
      }
    } else if (bools) {
      put(word(OPTAPE_WORD_BOOL_LIST, count));
      for (const IValue& item : items) {
        put(item.toBool() ? 1 : 0);
      }
    } else if (numbers) {
      put(word(OPTAPE_WORD_FLOAT_LIST, count));
      for (const IValue& item : items) {
        pay(bits(item.isDouble() ? item.toDouble() : item.isInt() ? static_cast<double>(item.toInt()) : item.toBool() ? 1.0 : 0.0));
      }
    } else {
      opaque();
    }
  }

  void empty_list(const IValue& value) {
    if (value.isDoubleList()) {
      put(word(OPTAPE_WORD_FLOAT_LIST, 0));
    } else if (value.isBoolList()) {
      put(word(OPTAPE_WORD_BOOL_LIST, 0));
    } else if (value.isIntList()) {
      put(word(OPTAPE_WORD_INT_LIST, 0));
    } else if (op.kinds[outputs ? op.argument_count + argument : argument] == Kind::List && value.isList()) {
      const auto kind = value.toList().elementType()->kind();
      const bool tensors = kind == c10::TypeKind::TensorType || kind == c10::TypeKind::OptionalType;
      put(word(tensors ? OPTAPE_WORD_TENSOR_LIST : OPTAPE_WORD_INT_LIST, 0));
    } else {
      opaque();
    }
  }

  void device(c10::Device d) {
    put(word(OPTAPE_WORD_DEVICE, static_cast<uint8_t>(d.type()) | static_cast<uint64_t>(static_cast<uint8_t>(d.index())) << 8));
  }

  void number(const IValue& value, Kind kind, bool varies) {
    if (LIKELY(value.isInt())) {
      if (kind == Kind::Dtype) {
        put(word(OPTAPE_WORD_DTYPE, static_cast<uint8_t>(value.toInt())));
      } else if (kind == Kind::Enumerator) {
        put(word(OPTAPE_WORD_ENUMERATOR, static_cast<uint64_t>(value.toInt())));
      } else {
        integer(value.toInt(), varies);
      }
    } else if (value.isDouble()) {
      real(value.toDouble());
    } else if (value.isBool()) {
      put(word(OPTAPE_WORD_BOOL, value.toBool() ? 1 : 0));
    } else {
      rare(value);
    }
  }

  COLD void rare(const IValue& value) {
    if (value.isComplexDouble()) {
      const auto complex = value.toComplexDouble();
      put(OPTAPE_WORD_COMPLEX_PAYLOAD);
      pay(bits(complex.real()));
      pay(bits(complex.imag()));
    } else if (value.isDevice()) {
      device(value.toDevice());
    } else {
      if (value.isSymInt() || value.isSymFloat() || value.isSymBool()) {
        frame.call.flags |= OPTAPE_CALL_NOT_EXECUTED;
      }
      opaque();
    }
  }

  void value(const IValue& v, Kind kind, bool varies) {
    if (v.isTensor()) {
      tensor(v.unsafeToTensorImpl());
    } else if (v.isNone()) {
      put(OPTAPE_WORD_NONE);
    } else if (v.isList()) {
      list(v);
    } else if (v.isString()) {
      const uint32_t id = text(v.toStringRef());
      if (UNLIKELY(op.wants(OPTAPE_PLAN_TEXT_PAYLOAD))) {
        put(OPTAPE_WORD_TEXT_PAYLOAD);
        pay(id);
      } else {
        put(word(OPTAPE_WORD_TEXT, id));
      }
    } else {
      number(v, kind, varies);
    }
  }

  // Points the call at the arrays, which may have moved while they grew.
  void publish() {
    optape_call& call = frame.call;
    call.words = frame.words.items;
    call.word_count = frame.words.count;
    call.payload = frame.payload.items;
    call.payload_count = frame.payload.count;
    call.tensors = frame.tensors.items;
    call.tensor_count = frame.tensors.count;
    if (UNLIKELY(frame.words_moved != frame.words.moves)) {
      point_again();
    }
  }

  COLD void point_again() {
    for (uint32_t i = 0; i < frame.tensors.count; ++i) {
      optape_tensor& t = frame.tensors.items[i];
      const auto* sizes = reinterpret_cast<const int64_t*>(frame.words.items + frame.size_words.items[i]);
      t.strides = t.strides != nullptr ? sizes + t.dim : nullptr;
      t.sizes = sizes;
    }
    frame.words_moved = frame.words.moves;
  }

  // The same for arguments whose C++ type is known.

  void typed(const at::Tensor& t) {
    tensor(t.unsafeGetTensorImpl());
  }
  void typed(int64_t v) {
    integer(v, varies());
  }
  void typed(const c10::SymInt& v) {
    if (LIKELY(!v.is_heap_allocated())) {
      integer(v.as_int_unchecked(), varies());
    } else {
      symbolic();
    }
  }
  void typed(double v) {
    real(v);
  }
  void typed(bool v) {
    put(word(OPTAPE_WORD_BOOL, v ? 1 : 0));
  }
  void typed(c10::ScalarType v) {
    put(word(OPTAPE_WORD_DTYPE, static_cast<uint8_t>(v)));
  }
  void typed(c10::Layout v) {
    put(word(OPTAPE_WORD_ENUMERATOR, static_cast<uint64_t>(v)));
  }
  void typed(c10::MemoryFormat v) {
    put(word(OPTAPE_WORD_ENUMERATOR, static_cast<uint64_t>(v)));
  }
  void typed(c10::Device v) {
    device(v);
  }
  APART void typed(const at::Scalar& v) {
    if (UNLIKELY(v.isSymbolic())) {
      symbolic();
    } else if (v.isFloatingPoint()) {
      real(v.toDouble());
    } else if (v.isBoolean()) {
      typed(v.toBool());
    } else if (LIKELY(v.isIntegral(false))) {
      integer(v.toLong(), varies());
    } else {
      rare(IValue(v));
    }
  }
  APART void typed(c10::IntArrayRef v) {
    put(word(OPTAPE_WORD_INT_LIST, v.size()));
    frame.words.reserve(static_cast<uint32_t>(v.size()));
    for (const int64_t item : v) {
      frame.words.items[frame.words.count++] = static_cast<uint64_t>(item);
    }
  }
  APART void typed(c10::SymIntArrayRef v) {
    if (const auto ints = c10::asIntArrayRefSlowOpt(v)) {
      typed(*ints);
    } else {
      symbolic();
    }
  }
  APART void typed(at::TensorList v) {
    put(word(OPTAPE_WORD_TENSOR_LIST, v.size()));
    for (const at::Tensor& t : v) {
      typed(t);
    }
  }
  void typed(const at::ITensorListRef& v) {
    put(word(OPTAPE_WORD_TENSOR_LIST, v.size()));
    for (const at::Tensor& t : v) {
      typed(t);
    }
  }
  template <size_t n>
  void typed(const std::array<bool, n>& v) {
    put(word(OPTAPE_WORD_BOOL_LIST, n));
    for (const bool item : v) {
      put(item ? 1 : 0);
    }
  }
  template <typename T>
  void typed(const std::optional<T>& v) {
    if (v.has_value()) {
      typed(*v);
    } else {
      put(OPTAPE_WORD_NONE);
    }
  }
  template <typename T>
  void typed(const c10::OptionalArrayRef<T>& v) {
    if (v.has_value()) {
      typed(*v);
    } else {
      put(OPTAPE_WORD_NONE);
    }
  }

  template <typename T>
  void result(const T& v) {
    typed(v);
  }
  void result(const std::vector<at::Tensor>& v) {
    typed(at::TensorList(v));
  }
  template <typename... T>
  void result(const std::tuple<T...>& v) {
    std::apply([this](const auto&... items) { ((typed(items), ++argument), ...); }, v);
  }

  bool varies() const {
    return !outputs && op.wild != nullptr && op.wild[argument] != 0;
  }
  COLD void symbolic() {
    frame.call.flags |= OPTAPE_CALL_NOT_EXECUTED;
    opaque();
  }
};

// ---- the calls ----------------------------------------------------------------------------------------------------

// Where a Python dispatch mode is active, some C++ code takes `add` instead of `add_` (at::isTensorSubclassLike): the engine's
// input buffer, when it sums gradients, and at::linear, when it adds the bias to an input of more than two dimensions. Rules
// that mirror what such a mode sees need to know, so those calls are marked.
//
// What tells them from an `add_` of the program: the sum has no Python object, and nobody but its caller and the argument
// stack holds it and its storage. (The engine asks for that itself: torch/csrc/autograd/input_buffer.cpp,
// can_accumulate_inplace.)
bool sum_of_nobody_else(const optape_call& call, size_t holders) {
  const uint64_t* alpha = call.words + call.argument_words - 2;
  if (call.input_count != 2 || alpha[0] != OPTAPE_WORD_INT || alpha[1] != 1) {
    return false;
  }
  auto* sum = static_cast<TensorImpl*>(const_cast<void*>(call.tensors[0].impl));
  const auto& storage = sum->unsafe_storage();
  if (c10::isComplexType(static_cast<c10::ScalarType>(call.tensors[0].dtype))) {
    ++holders;  // The fallback for lazy conjugation comes first, and boxes.
  }
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 10
  const bool in_python = sum->pyobj_slot()->load_pyobj() != nullptr;
#else
  const bool in_python = sum->pyobj_slot()->_unchecked_untagged_pyobj() != nullptr && !sum->pyobj_slot()->owns_pyobj();
#endif
  return !in_python && c10::raw::intrusive_ptr::use_count(sum) <= holders && storage && storage.use_count() == 1;
}

// at::linear's `output.add_(bias)`. In programs without Python an `add_` of the program looks the same; there is no mode there
// that would see anything else.
bool linear_adds_bias(const optape_call& call) {
  const optape_tensor& sum = call.tensors[0];
  const optape_tensor& bias = call.tensors[1];
  return call.input_count == 2 && sum.dim >= 3 && bias.dim == 1 && sum.sizes[sum.dim - 1] == bias.sizes[0];
}

// What a class of autograd nodes is, learnt once per class.
enum class NodeClass : uint8_t { Unknown, Accumulate, DoubleBackward, Other };

NodeClass learn_class(const torch::autograd::Node& node) {
  if (dynamic_cast<const torch::autograd::AccumulateGrad*>(&node) != nullptr) {
    return NodeClass::Accumulate;
  }
  return std::strstr(typeid(node).name(), "BackwardBackward") != nullptr ? NodeClass::DoubleBackward : NodeClass::Other;
}

NodeClass class_of(const torch::autograd::Node& node) {
  struct Known {
    std::atomic<uintptr_t> entry{0};  // vtable, with the class in the lowest bits
  };
  static Known known[128];
  uintptr_t vtable;
  std::memcpy(&vtable, static_cast<const void*>(&node), sizeof vtable);
  auto& slot = known[(vtable >> 4) % 128].entry;
  const uintptr_t entry = slot.load(std::memory_order_relaxed);
  if (LIKELY((entry & ~uintptr_t{7}) == vtable)) {
    return static_cast<NodeClass>(entry & 7);
  }
  const NodeClass learnt = learn_class(node);
  slot.store(vtable | static_cast<uintptr_t>(learnt), std::memory_order_relaxed);
  return learnt;
}

NodeClass note_node(optape_call& call) {
  call.graph_task = 1;
  const auto node = torch::autograd::get_current_node();
  if (!node) {
    return NodeClass::Unknown;
  }
  call.node = node->sequence_nr();
  call.node_thread = node->thread_id();
  const NodeClass kind = class_of(*node);
  if (kind == NodeClass::Accumulate) {
    call.node = OPTAPE_NO_NODE;
    call.accumulate = static_cast<const torch::autograd::AccumulateGrad&>(*node).variable.unsafeGetTensorImpl();
  }
  return kind;
}

// `holders`: how often the caller and the argument stack hold each argument.
COLD void note_accumulation(optape_call& call, NodeClass node, size_t holders) {
  // Formulas of double backward (batch and layer normalisation) sum up in place themselves; others do not.
  const bool engine = node == NodeClass::Other && (call.flags & OPTAPE_CALL_GRAD_MODE) == 0;
  if ((engine || (python.present && linear_adds_bias(call))) && sum_of_nobody_else(call, holders)) {
    call.flags |= OPTAPE_CALL_ACCUMULATION;
  }
}

void start(Frame& frame, const Thread& thread, const Operator& op) {
  frame.words.count = 0;
  frame.payload.count = 0;
  frame.tensors.count = 0;
  frame.size_words.count = 0;
  frame.words_moved = frame.words.moves;
  optape_call& call = frame.call;
  call.op = op.index;
  call.flags = (thread.autograd->get_grad_mode() ? OPTAPE_CALL_GRAD_MODE : 0) |
      (thread.autograd->get_inference_mode() ? OPTAPE_CALL_INFERENCE_MODE : 0);
  call.graph_task = 0;
  call.node = OPTAPE_NO_NODE;
  call.node_thread = 0;
  call.accumulate = nullptr;
  call.thread = thread.id;
  call.capture[0] = 0;
}

COLD void keep_alive(Frame& frame, TensorImpl* t) {
  frame.keep.push_back(c10::intrusive_ptr<TensorImpl, c10::UndefinedTensorImpl>::unsafe_reclaim_from_nonowning(t));
}

// All arguments are written: adds where the call comes from, and shows it to capture.
void settle(Recorder& recorder, size_t holders) {
  Frame& frame = recorder.frame;
  const Operator& op = recorder.op;
  optape_call& call = frame.call;
  call.peek = at::sequence_number::peek();
  NodeClass node = NodeClass::Unknown;
  if (UNLIKELY(torch::autograd::get_current_graph_task_id() != -1)) {
    node = note_node(call);
  }
  call.argument_words = frame.words.count;
  call.input_count = frame.tensors.count;
  recorder.publish();
  if (UNLIKELY(op.may_accumulate)) {
    note_accumulation(call, node, holders);
  }
  if (op.wants(OPTAPE_PLAN_BEGIN)) {
    capture->begin(&call);
  }
}

void before(Frame& frame, Thread& thread, const Operator& op, const IValue* arguments) {
  start(frame, thread, op);
  Recorder recorder{frame, thread, op};
  recorder.identities = op.wants(OPTAPE_PLAN_IDENTITIES);
  for (uint32_t i = 0; i < op.argument_count; ++i) {
    recorder.argument = i;
    recorder.value(arguments[i], op.kinds[i], recorder.varies());
  }
  for (uint32_t i = 0; i < frame.tensors.count; ++i) {
    auto* t = static_cast<TensorImpl*>(const_cast<void*>(frame.tensors.items[i].impl));
    if (UNLIKELY(op.refresh || c10::raw::intrusive_ptr::use_count(t) <= 1)) {
      keep_alive(frame, t);
    }
  }
  settle(recorder, 2);
}

// Tensors that the kernel wrote without returning them: where their values are may have changed.
COLD void refresh(Frame& frame, const Operator& op) {
  for (uint32_t i = 0; i < frame.call.input_count; ++i) {
    optape_tensor& t = frame.tensors.items[i];
    if ((t.data == nullptr && t.device_data == 0) ||
        std::find(op.hidden_writes.begin(), op.hidden_writes.end(), t.argument) == op.hidden_writes.end()) {
      continue;
    }
    const auto* impl = static_cast<const TensorImpl*>(t.impl);
    const c10::StorageImpl* storage = impl->unsafe_storage().unsafeGetStorageImpl();
    if (storage == t.storage && const_cast<c10::StorageImpl*>(storage)->_mutable_data_ptr_no_checks().get() == t.storage_base) {
      continue;
    }
    t.device_data = 0;
    t.data = nullptr;  // The words describe the tensor as it was; its values now are another tensor's.
  }
}

// All outputs are written: the call is complete.
void finish(Recorder& recorder) {
  Frame& frame = recorder.frame;
  if (UNLIKELY(recorder.op.refresh)) {
    refresh(frame, recorder.op);
  }
  if (UNLIKELY(above_autograd)) {
    frame.call.peek = at::sequence_number::peek();
  }
  recorder.publish();
  capture->end(&frame.call);
  if (UNLIKELY(!frame.keep.empty())) {
    frame.keep.clear();
  }
}

void after(Frame& frame, Thread& thread, const Operator& op, const IValue* returns) {
  Recorder recorder{frame, thread, op};
  recorder.outputs = true;
  recorder.identities = op.wants(OPTAPE_PLAN_IDENTITIES);
  for (uint32_t i = 0; i < op.return_count; ++i) {
    recorder.argument = i;
    recorder.value(returns[i], op.kinds[op.argument_count + i], false);
  }
  finish(recorder);
}

COLD void drop(Frame& frame) noexcept {
  frame.keep.clear();
  capture->abort(&frame.call);
}

// While a kernel runs: takes our key out of the thread's key set, so that what the kernel calls inside itself is not seen,
// and takes the time.
class Running {
 public:
  Running(Thread& t, Frame& f) : thread(t), frame(f), was(t.keys->included_ & hook_bit) {
    thread.keys->included_ &= ~hook_bit;
    ++thread.depth;
    frame.call.start_ns = now_ns();
  }
  void done() {
    frame.call.end_ns = now_ns();
    finished = true;
    restore();
  }
  ~Running() {
    if (UNLIKELY(!finished)) {  // The kernel threw.
      restore();
      drop(frame);
    }
  }
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;

 private:
  void restore() {
    --thread.depth;
    thread.keys->included_ |= was;
  }

  Thread& thread;
  Frame& frame;
  const uint64_t was;
  bool finished = false;
};

// torch.optim.Optimizer runs every step inside a profiler range of this name. Its own global step hooks would say the same, but
// having any changes what torch.compile does.
constexpr char optimizer_range[] = "Optimizer.step#";
std::atomic<void (*)()> optimizer_enter{nullptr};
std::atomic<void (*)()> optimizer_exit{nullptr};
std::atomic<void*> optimizer_stepped{nullptr};  // a Python function

COLD void range_opened(Thread& thread, const std::string& name, const IValue& range) {
  const auto enter = optimizer_enter.load(std::memory_order_acquire);
  if (enter == nullptr || name.compare(0, sizeof optimizer_range - 1, optimizer_range) != 0 || !range.isObject()) {
    return;
  }
  thread.optimizer_ranges.push_back(range.internalToPointer());
  enter();
}

COLD std::string range_name(const Operator& op, const Stack& stack) {
  const IValue& name = stack[stack.size() - op.argument_count];
  return name.isString() ? name.toStringRef() : std::string();
}

COLD void range_closes(Thread& thread, const IValue& range) {
  auto& open = thread.optimizer_ranges;
  const auto leave = optimizer_exit.load(std::memory_order_acquire);
  if (leave == nullptr || !range.isObject()) {
    return;
  }
  const auto found = std::find(open.begin(), open.end(), range.internalToPointer());
  if (found != open.end()) {
    open.erase(found);
    leave();
    // While the range of the step is still open to Python: the optimizer is found on its stack.
    if (void* stepped = optimizer_stepped.load(std::memory_order_acquire)) {
      const int gil = python.take_gil();
      if (void* done = python.call(stepped, nullptr)) {
        python.decrement(done);
      } else {
        python.clear_error();
      }
      python.give_gil(gil);
    }
  }
}

// While nothing is recorded, what kernels call inside themselves need not come by here either.
struct Hidden {
  c10::impl::PODLocalDispatchKeySet& keys = c10::impl::raw_local_dispatch_key_set;
  const uint64_t was = keys.included_ & hook_bit;

  Hidden() {
    keys.included_ &= ~hook_bit;
  }
  ~Hidden() {
    keys.included_ |= was;
  }
  Hidden(const Hidden&) = delete;
  Hidden& operator=(const Hidden&) = delete;
};

// The ops that open and close profiler ranges: they tell the optimizer's steps, also while nothing else is recorded.
std::array<const void*, 3> range_keys{};

bool paused() {
  return (__atomic_load_n(capture->recording, __ATOMIC_RELAXED) & paused_bit) != 0 && !failed.load(std::memory_order_relaxed);
}

COLD bool passes(const c10::OperatorHandle& handle) noexcept {
  if (!paused()) {
    return true;
  }
  const void* key = key_of(handle);
  if (std::find(range_keys.begin(), range_keys.end(), key) != range_keys.end()) {
    return false;
  }
  try {
    capture->idle(thread().id);
  } catch (...) {
    give_up_with_current_exception();
  }
  return true;
}

void fallback(const c10::OperatorHandle& handle, DispatchKeySet keys, Stack* stack) {
  const DispatchKeySet below = keys & below_hook;
  if (UNLIKELY(!recording()) && passes(handle)) {
    const Hidden hidden;
    handle.redispatchBoxed(below, stack);
    return;
  }
  Thread* thread = nullptr;
  Operator* op = nullptr;
  Frame* frame = nullptr;
  try {
    thread = &::thread();
    op = find(key_of(handle));
    if (UNLIKELY(op == nullptr)) {
      op = define(handle);
    }
    if (UNLIKELY(op->range && op->return_count == 0)) {
      range_closes(*thread, stack->back());
    }
    if (LIKELY(!op->pass)) {
      frame = &thread->frame(thread->depth);
      before(*frame, *thread, *op, stack->data() + (stack->size() - op->argument_count));
    }
  } catch (...) {
    give_up_with_current_exception();
    frame = nullptr;
  }
  if (UNLIKELY(frame == nullptr)) {
    handle.redispatchBoxed(below, stack);
    return;
  }
  std::string range;
  if (UNLIKELY(op->range && op->return_count == 1)) {
    range = range_name(*op, *stack);
  }
  Running running(*thread, *frame);
  handle.redispatchBoxed(below, stack);
  running.done();
  try {
    after(*frame, *thread, *op, stack->data() + (stack->size() - op->return_count));
    if (UNLIKELY(!range.empty())) {
      range_opened(*thread, range, stack->back());
    }
  } catch (...) {
    give_up_with_current_exception();
    drop(*frame);
  }
}

// ---- the hottest operators, without boxing -------------------------------------------------------------------------

// Boxing allocates a stack and an IValue for every list: with cold caches half a microsecond for each call. These overloads
// have a kernel of their own on our key that takes the arguments as they are; what it records is what `fallback` records. One
// class serves all overloads of a C++ signature. Where another torch has an overload with another signature, or not at all,
// the dispatcher refuses it at install and the fallback takes its calls.

template <typename Signature>
class Unboxed;

template <typename Result, typename... Arguments>
class Unboxed<Result(Arguments...)> {
 public:
  explicit Unboxed(const c10::OperatorHandle& found) : handle(found.typed<Result(Arguments...)>()) {}

  Result call(DispatchKeySet keys, Arguments... arguments) {
    const DispatchKeySet below = keys & below_hook;
    if (UNLIKELY(!recording()) && passes(handle)) {
      const Hidden hidden;
      return handle.redispatch(below, std::forward<Arguments>(arguments)...);
    }
    Thread* thread = nullptr;
    Frame* frame = open(thread, arguments...);
    if (UNLIKELY(frame == nullptr)) {
      return handle.redispatch(below, std::forward<Arguments>(arguments)...);
    }
    Running running(*thread, *frame);
    Result result = handle.redispatch(below, std::forward<Arguments>(arguments)...);
    running.done();
    close(*thread, *frame, result);
    return result;
  }

 private:
  Operator& described() {
    Operator* known = op.load(std::memory_order_acquire);
    if (UNLIKELY(known == nullptr)) {
      known = define(handle);
      op.store(known, std::memory_order_release);
    }
    return *known;
  }

  Frame* open(Thread*& thread, const Arguments&... arguments) noexcept {
    try {
      thread = &::thread();
      Operator& operation = described();
      Frame& frame = thread->frame(thread->depth);
      start(frame, *thread, operation);
      Recorder recorder{frame, *thread, operation};
      recorder.identities = operation.wants(OPTAPE_PLAN_IDENTITIES);
      ((recorder.typed(arguments), ++recorder.argument), ...);
      settle(recorder, 1);
      return &frame;
    } catch (...) {
      give_up_with_current_exception();
      return nullptr;
    }
  }

  template <typename T>
  void close(Thread& thread, Frame& frame, const T& result) noexcept {
    try {
      Operator& operation = described();
      Recorder recorder{frame, thread, operation};
      recorder.outputs = true;
      recorder.identities = operation.wants(OPTAPE_PLAN_IDENTITIES);
      recorder.result(result);
      finish(recorder);
    } catch (...) {
      give_up_with_current_exception();
      drop(frame);
    }
  }

  const c10::TypedOperatorHandle<Result(Arguments...)> handle;
  std::atomic<Operator*> op{nullptr};
};

void take_each(
    torch::Library& library,
    std::initializer_list<const char*> overloads,
    torch::CppFunction (*kernel)(const c10::OperatorHandle& found)) {
  for (const char* overload : overloads) {
    const std::string name = overload;
    const size_t dot = name.find('.');
    const auto found = c10::Dispatcher::singleton().findSchema(
        c10::OperatorName("aten::" + name.substr(0, dot), dot == std::string::npos ? std::string() : name.substr(dot + 1)));
    if (!found) {
      continue;
    }
    try {
      library.impl(overload, kernel(*found));
    } catch (const c10::Error&) {
      continue;  // Another signature.
    }
  }
}

// Takes all overloads of one signature, as far as this torch has them.
template <typename Signature>
class Takes;

template <typename Result, typename... Arguments>
class Takes<Result(Arguments...)> {
 public:
  explicit Takes(torch::Library& aten) : library(aten) {}

  void take(std::initializer_list<const char*> overloads) const {
    take_each(library, overloads, &kernel);
  }

 private:
  static torch::CppFunction kernel(const c10::OperatorHandle& found) {
    auto* unboxed = new Unboxed<Result(Arguments...)>(found);  // Lives as long as the process, like the kernel.
    return torch::CppFunction([unboxed](DispatchKeySet keys, Arguments... arguments) -> Result {
      return unboxed->call(keys, std::forward<Arguments>(arguments)...);
    });
  }

  torch::Library& library;
};

void take_hot_operators(DispatchKey key) {
  if (std::getenv("OPTAPE_HOOK_BOXED") != nullptr) {
    return;  // For tests: everything through the fallback.
  }
  using T = at::Tensor;
  using S = at::Scalar;
  using Ints = c10::SymIntArrayRef;
  using Int = c10::SymInt;
  using OptionalTensor = std::optional<at::Tensor>;
  using Dtype = std::optional<at::ScalarType>;
  using Layout = std::optional<at::Layout>;
  using Device = std::optional<at::Device>;
  using Flag = std::optional<bool>;
  using Format = std::optional<at::MemoryFormat>;
  using Three = std::tuple<T, T, T>;

  auto kept = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", key, __FILE__, static_cast<uint32_t>(__LINE__));
  torch::Library& aten = *kept.release();

  Takes<T(const T&)>(aten).take(
      {"t", "detach", "alias", "neg", "abs", "exp", "sqrt", "relu", "sigmoid", "tanh", "sign", "logical_not"});
  Takes<T&(T&)>(aten).take({"zero_", "relu_", "sigmoid_", "sqrt_", "neg_"});
  Takes<T(const T&, const T&)>(aten).take(
      {"mul.Tensor", "div.Tensor", "mm", "bmm", "eq.Tensor", "gt.Tensor", "ge.Tensor", "lt.Tensor", "le.Tensor", "minimum", "maximum",
       "sigmoid_backward", "tanh_backward", "heaviside", "mv", "dot"});
  Takes<T&(T&, const T&)>(aten).take({"mul_.Tensor", "div_.Tensor"});
  Takes<T(const T&, const S&)>(aten).take(
      {"mul.Scalar", "div.Scalar", "pow.Tensor_Scalar", "eq.Scalar", "ne.Scalar", "gt.Scalar", "ge.Scalar", "lt.Scalar", "le.Scalar"});
  Takes<T&(T&, const S&)>(aten).take({"mul_.Scalar", "div_.Scalar", "fill_.Scalar"});
  Takes<T(const T&, const T&, const S&)>(aten).take({"add.Tensor", "sub.Tensor", "rsub.Tensor", "threshold_backward"});
  Takes<T&(T&, const T&, const S&)>(aten).take({"add_.Tensor", "sub_.Tensor", "lerp_.Scalar"});
  Takes<T(const T&, const S&, const S&)>(aten).take({"add.Scalar", "sub.Scalar", "rsub.Scalar"});
  Takes<T(const T&, const T&, const T&)>(aten).take({"where.self"});
  Takes<T(const T&, const T&, const T&, const S&, const S&)>(aten).take({"addmm", "baddbmm"});
  Takes<T&(T&, const T&, const T&, const S&)>(aten).take({"addcmul_", "addcdiv_"});
  Takes<T(const T&, int64_t)>(aten).take({"unsqueeze", "squeeze.dim"});
  Takes<T(const T&, int64_t, int64_t)>(aten).take({"transpose.int"});
  Takes<T(const T&, int64_t, Int)>(aten).take({"select.int"});
  Takes<T(const T&, Ints)>(aten).take({"view", "_unsafe_view"});
  Takes<T(const T&, c10::IntArrayRef)>(aten).take({"permute"});
  Takes<T(const T&, Ints, Ints)>(aten).take({"_reshape_alias"});
  Takes<T(const T&, Ints, bool)>(aten).take({"expand"});
  Takes<T(const T&, int64_t, std::optional<Int>, std::optional<Int>, Int)>(aten).take({"slice.Tensor"});
  Takes<T(const T&, Ints, int64_t, Int)>(aten).take({"select_backward"});
  Takes<T(const T&, Format)>(aten).take({"clone"});
  Takes<T&(T&, const T&, bool)>(aten).take({"copy_"});
  Takes<T(const T&, Dtype, Layout, Device, Flag, bool, Format)>(aten).take({"_to_copy"});
  Takes<T(const T&, Dtype, Layout, Device, Flag, Format)>(aten).take({"empty_like", "zeros_like", "ones_like"});
  Takes<T(const T&, const S&, Dtype, Layout, Device, Flag, Format)>(aten).take({"full_like"});
  Takes<T(Ints, Dtype, Layout, Device, Flag, Format)>(aten).take({"empty.memory_format"});
  Takes<T(const T&, Dtype)>(aten).take({"sum", "mean"});
  Takes<T(const T&, at::OptionalIntArrayRef, bool, Dtype)>(aten).take({"sum.dim_IntList", "mean.dim"});
  Takes<T(at::TensorList, int64_t)>(aten).take({"stack"});
  Takes<T(const at::ITensorListRef&, int64_t)>(aten).take({"cat"});
  Takes<std::vector<T>(const T&, int64_t)>(aten).take({"unbind.int"});
  Takes<S(const T&)>(aten).take({"_local_scalar_dense"});
  Takes<T(const T&, const T&, const OptionalTensor&, Ints, Ints, Ints, bool, Ints, Int)>(aten).take({"convolution"});
  Takes<Three(
      const T&, const T&, const T&, at::OptionalSymIntArrayRef, Ints, Ints, Ints, bool, Ints, Int, std::array<bool, 3>)>(aten)
      .take({"convolution_backward"});
}

// ---- optape::watch ------------------------------------------------------------------------------------------------

std::atomic<Operator*> watch_operator{nullptr};

void watch(TensorImpl* value, int64_t id) noexcept {
  if (capture == nullptr || !recording()) {
    return;
  }
  try {
    Operator* op = watch_operator.load(std::memory_order_acquire);
    if (op == nullptr) {
      return;
    }
    Thread& t = thread();
    Frame& frame = t.frame(t.depth);
    start(frame, t, *op);
    Recorder recorder{frame, t, *op};
    recorder.identities = op->wants(OPTAPE_PLAN_IDENTITIES);
    recorder.tensor(value);
    recorder.argument = 1;
    recorder.integer(id, recorder.varies());
    optape_call& call = frame.call;
    call.peek = at::sequence_number::peek();
    if (torch::autograd::get_current_graph_task_id() != -1) {
      call.graph_task = 1;
    }
    call.argument_words = frame.words.count;
    call.input_count = frame.tensors.count;
    call.start_ns = call.end_ns = now_ns();
    recorder.publish();
    capture->watch(&call);
  } catch (...) {
    give_up_with_current_exception();
  }
}

void watch_kernel(const at::Tensor& value, int64_t id) {
  watch(value.unsafeGetTensorImpl(), id);
}

void watch_nothing(const at::Tensor& /*value*/, int64_t /*id*/) {}

// ---- functions ----------------------------------------------------------------------------------------------------

// A function of Python, as an operator whose arguments can be anything.
Operator* define_function(const char* lines) {
  std::istringstream text(lines);
  std::string name, overload, line;
  std::getline(text, name);
  std::getline(text, overload);
  std::vector<std::string> names;
  std::vector<optape_argument> arguments;
  while (std::getline(text, line)) {
    const size_t tab = line.find('\t');
    if (tab == std::string::npos || line.size() != tab + 4) {
      throw std::runtime_error("an argument of " + name + " cannot be read: " + line);
    }
    names.push_back(line.substr(0, tab));
    optape_argument argument{};
    argument.type_name = "Any";
    argument.alias = "";
    argument.keyword_only = line[tab + 1] == '1' ? 1 : 0;
    argument.written = line[tab + 3] == '1' ? 1 : 0;
    arguments.push_back(argument);
  }
  for (size_t i = 0; i < names.size(); ++i) {
    arguments[i].name = names[i].c_str();
  }
  optape_argument result{};
  result.name = result.alias = "";
  result.type_name = "Any";
  optape_operator told{};
  told.name = name.c_str();
  told.overload = overload.c_str();
  told.arguments = arguments.data();
  told.argument_count = static_cast<uint32_t>(arguments.size());
  told.returns = &result;
  told.return_count = 1;

  const std::lock_guard<std::mutex> guard(define_lock);
  optape_plan plan{};
  if (capture->define_op(&told, &plan) != 0) {
    throw std::runtime_error("capture refused the function " + name);
  }
  auto op = std::make_unique<Operator>();
  op->index = plan.op;
  op->plan_flags.store(plan.flags, std::memory_order_relaxed);
  op->wild = plan.wild;
  op->argument_count = told.argument_count;
  op->return_count = 1;
  op->kinds.assign(arguments.size() + 1, Kind::Other);
  op->type_texts.assign(arguments.size() + 1, capture->text("Tensor", 6));
  functions.push_back(op.get());
  return op.release();  // Lives as long as the process.
}

// Writes the values that the glue hands over, in the form that optape_hook.h states.
class FunctionValues {
 public:
  FunctionValues(Recorder& r, const uint64_t* values, size_t count) : recorder(r), at(values), end(values + count) {}

  void read(uint32_t how_many) {
    for (uint32_t i = 0; i < how_many; ++i) {
      recorder.argument = i;
      value();
    }
  }

 private:
  uint64_t next() {
    if (at == end) {
      throw std::runtime_error("the values of a function call end early");
    }
    return *at++;
  }

  void tensor() {
    const uint64_t address = next();
    if (address == 0) {
      recorder.put(OPTAPE_WORD_NONE);
    } else {
      recorder.tensor(reinterpret_cast<TensorImpl*>(address));
    }
  }

  void value() {
    const uint64_t first = next();
    const uint64_t count = first >> 8;
    switch (first & 255) {
      case OPTAPE_WORD_TENSOR:
        tensor();
        return;
      case OPTAPE_WORD_TENSOR_LIST:
        recorder.put(first);
        for (uint64_t i = 0; i < count; ++i) {
          tensor();
        }
        return;
      case OPTAPE_WORD_INT:
        recorder.integer(static_cast<int64_t>(next()), recorder.varies());
        return;
      case OPTAPE_WORD_FLOAT: {
        const uint64_t bits = next();
        double real;
        std::memcpy(&real, &bits, sizeof real);
        recorder.real(real);
        return;
      }
      case OPTAPE_WORD_COMPLEX_PAYLOAD:
        recorder.put(first);
        recorder.pay(next());
        recorder.pay(next());
        return;
      case OPTAPE_WORD_FLOAT_LIST:
        recorder.put(first);
        for (uint64_t i = 0; i < count; ++i) {
          recorder.pay(next());
        }
        return;
      case OPTAPE_WORD_INT_LIST:
      case OPTAPE_WORD_BOOL_LIST:
        recorder.put(first);
        for (uint64_t i = 0; i < count; ++i) {
          recorder.put(next());
        }
        return;
      case OPTAPE_WORD_NONE:
      case OPTAPE_WORD_BOOL:
      case OPTAPE_WORD_TEXT:
      case OPTAPE_WORD_DTYPE:
      case OPTAPE_WORD_DEVICE:
      case OPTAPE_WORD_OPAQUE:
        recorder.put(first);
        return;
      default:
        throw std::runtime_error("a value of a function call has an unknown tag");
    }
  }

  Recorder& recorder;
  const uint64_t* at;
  const uint64_t* const end;
};

void begin_function(const Operator& op, const uint64_t* values, size_t count) {
  Thread& t = thread();
  if (t.function_calls.size() == t.open_functions) {
    t.function_calls.push_back(std::make_unique<Thread::FunctionCall>());
  }
  Thread::FunctionCall& open = *t.function_calls[t.open_functions];
  open.op = &op;
  start(open.frame, t, op);
  if (t.open_functions != 0) {
    open.frame.call.flags |= OPTAPE_CALL_NESTED;
  }
  Recorder recorder{open.frame, t, op};
  recorder.identities = op.wants(OPTAPE_PLAN_IDENTITIES);
  FunctionValues(recorder, values, count).read(op.argument_count);
  settle(recorder, 0);
  ++t.open_functions;
  open.frame.call.start_ns = now_ns();
}

void end_function(const uint64_t* values, size_t count) {
  const uint64_t now = now_ns();
  Thread& t = thread();
  if (t.open_functions == 0) {
    return;
  }
  Thread::FunctionCall& open = *t.function_calls[--t.open_functions];
  open.frame.call.end_ns = now;
  try {
    Recorder recorder{open.frame, t, *open.op};
    recorder.outputs = true;
    recorder.identities = open.op->wants(OPTAPE_PLAN_IDENTITIES);
    FunctionValues(recorder, values, count).read(1);
    finish(recorder);
  } catch (...) {
    drop(open.frame);
    throw;
  }
}

// ---- install ------------------------------------------------------------------------------------------------------

struct Candidate {
  DispatchKey key;
  const char* name;
};

#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 6
constexpr Candidate candidates[] = {{DispatchKey::Fake, "Fake"}, {DispatchKey::DeferredInit, "DeferredInit"}};
#else
constexpr Candidate candidates[] = {{DispatchKey::DeferredInit, "DeferredInit"}};
#endif

// Registers the fallback. A static registration on a taken key would abort the process; a Library object throws.
bool take(const Candidate& candidate) {
  if (c10::Dispatcher::singleton().hasBackendFallbackForDispatchKey(candidate.key)) {
    return false;
  }
  try {
    static torch::Library* kept = nullptr;  // never destroyed: the fallback stays for the life of the process
    auto library = std::make_unique<torch::Library>(torch::Library::IMPL, "_", candidate.key, __FILE__, static_cast<uint32_t>(__LINE__));
    library->fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
    kept = library.release();
    static_cast<void>(kept);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

void define_watch() {
  auto library = std::make_unique<torch::Library>(torch::Library::DEF, "optape", std::nullopt, __FILE__, static_cast<uint32_t>(__LINE__));
  library->def("watch(Tensor value, int id) -> ()");
  library->impl("watch", DispatchKey::CompositeExplicitAutograd, &watch_kernel);
  library->impl("watch", DispatchKey::Meta, &watch_nothing);
  library->impl("watch", torch::dispatch(DispatchKey::Autograd, torch::CppFunction::makeFallthrough()));
  static_cast<void>(library.release());
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow("optape::watch", "");
  watch_operator.store(define(handle), std::memory_order_release);
}

void say(char* error, size_t size, const std::string& text) {
  if (error != nullptr && size != 0) {
    const size_t length = std::min(size - 1, text.size());
    std::memcpy(error, text.data(), length);
    error[length] = '\0';
  }
}

void stay_loaded() {
  Dl_info here{};
  if (dladdr(reinterpret_cast<const void*>(&stay_loaded), &here) != 0 && here.dli_fname != nullptr) {
    static_cast<void>(dlopen(here.dli_fname, RTLD_LAZY | RTLD_NOLOAD | RTLD_NODELETE));
  }
}

int32_t install(const optape_capture* table, std::string& why) {
  if (table == nullptr || table->abi_version != OPTAPE_ABI_VERSION) {
    why = "the hook speaks ABI version " + std::to_string(OPTAPE_ABI_VERSION) + " and capture " +
        (table == nullptr ? "none" : std::to_string(table->abi_version)) + "; rebuild the hook (optape build-hook)";
    return 1;
  }
  if (capture != nullptr) {
    why = "the hook is installed already";
    return 1;
  }
  stay_loaded();
  pthread_atfork(&before_fork, &after_fork, &after_fork);
  python.load();
  for (size_t i = 0; i < static_cast<size_t>(c10::ScalarType::NumOptions); ++i) {
    const auto meta = c10::scalarTypeToTypeMeta(static_cast<c10::ScalarType>(i));
    item_bytes[i] = static_cast<uint8_t>(std::min<size_t>(meta.itemsize(), 255));
  }
  const c10::Allocator* allocator = c10::GetCPUAllocator();
  torch_deleter = allocator->raw_deleter();
  if (torch_deleter == nullptr) {
    // No deleter at all means that memory is freed with more than its address; then no storage can be adopted.
    torch_deleter = +[](void*) {};
  }
  capture = table;
  const char* wanted = std::getenv("OPTAPE_HOOK_KEY");
  for (const Candidate& candidate : candidates) {
    if (wanted != nullptr && std::strcmp(wanted, candidate.name) != 0) {
      continue;
    }
    hook_key = candidate.key;
    hook_bit = bit(candidate.key);
    below_hook = DispatchKeySet(DispatchKeySet::FULL_AFTER, candidate.key) | DispatchKeySet(DispatchKeySet::RAW, c10::full_backend_mask);
    above_autograd = candidate.key == DispatchKey::DeferredInit;
    if (take(candidate)) {
      take_hot_operators(candidate.key);
      hook_key_name = candidate.name;
      break;
    }
  }
  if (hook_key_name[0] == '\0') {
    capture = nullptr;
    why = "no dispatch key is free for the hook: something else in this process uses Fake and DeferredInit";
    return 1;
  }
  static_cast<void>(new c10::RegistrationHandleRAII(
      c10::Dispatcher::singleton().addRegistrationListener(std::make_unique<Deregistration>())));
  define_watch();
  const c10::OperatorName ranges[] = {
      {"profiler::_record_function_enter_new", ""},
      {"profiler::_record_function_exit", "_RecordFunction"},
      {"profiler::_record_function_exit", ""}};
  for (size_t i = 0; i < range_keys.size(); ++i) {
    if (const auto found = c10::Dispatcher::singleton().findSchema(ranges[i])) {
      range_keys[i] = key_of(*found);
    }
  }
  return 0;
}

bool switch_thread(Thread& t, bool on) {
  const bool was = t.on;
  t.on = on;
  if (t.depth == 0) {
    c10::impl::tls_set_dispatch_key_included(hook_key, on);
  }
  return was;
}

// ---- builtins for Python ------------------------------------------------------------------------------------------

// nn.Module.__call__ is a Python function, and every Python function carries the C function that calls it (PEP 590). Ours
// tells capture, and calls the one that was there. Unlike global module hooks that changes nothing that the program can see: no
// warning and no other path in torch.compile, no frame in tracebacks; and it costs a tenth.
//
// CPython 3.11 leaves that C function out where Python code calls the Python function itself; a module is called through its
// type's slot, which never does.
// What is looked at of a module's calls beyond the calls themselves.
struct Detail {
  struct State {
    void* name = nullptr;       // interned
    void* container = nullptr;  // interned name of the attribute that is a dictionary and holds it, or none: an ordinary attribute
    uint32_t text = 0;          // its name's text id
  };
  enum class Of : uint8_t { Input, Output, GradInput, GradOutput, Before, After };  // the last two: an attribute
  struct Watch {
    Of of = Of::Output;
    uint32_t index = 0;         // among the module's
    void* name = nullptr;       // interned; of an attribute
    void* container = nullptr;
    std::vector<int64_t> ids;   // by place of the tensor; the first is always there
    bool odd = false;           // told that it is no tensor
  };
  std::vector<State> states;
  std::vector<Watch> watches;
  bool returns_state = false;  // the state is what the call returns behind the output
  bool watches_gradients = false;
};

struct Modules {
  struct Known {
    int64_t number = -1;  // -1: not recorded
    int64_t watch = -1;   // of its output
    Detail* detail = nullptr;
    uint8_t changes_left = 64;  // so many changes of attributes are told
    bool changed = false;       // an attribute of simple type got a value since the glue looked
  };
  std::unordered_map<const void*, Known> known;  // by the module's address
  std::atomic_flag lock = ATOMIC_FLAG_INIT;      // the GIL would do, where there is one
  Python::Vectorcall call = nullptr;
  Python::Vectorcall assign = nullptr;  // behind nn.Module.__setattr__ and those of its subclasses
  void* meet = nullptr;     // Python function that makes a module known
  void* more = nullptr;     // Python function: (module number, index of a watch, place of a tensor) -> watch id
  void* odd = nullptr;      // Python function: (module number, index of a watch, the value) that is no tensor
  void* changed = nullptr;  // Python function that tells a module's facts again
  void* tensor_type = nullptr;
  void* parameter_type = nullptr;
  void* training = nullptr;  // the interned names
  void* cdata = nullptr;
  void* fields = nullptr;
  bool in_detail = false;  // calls are recorded with their tensors

  bool find(const void* module, Known& out) {
    const Guard guard(lock);
    const auto found = known.find(module);
    if (found == known.end()) {
      return false;
    }
    out = found->second;
    return true;
  }
  void set(const void* module, int64_t number, int64_t watch) {
    const Guard guard(lock);
    Known& value = known[module];
    Detail* detail = value.detail;
    value = Known{};  // Its changes count anew.
    value.number = number;
    value.watch = watch;
    value.detail = detail;
  }
  // Details that were replaced stay: a call may be looking at them. Changes are few.
  void set(const void* module, Detail* detail) {
    const Guard guard(lock);
    known[module].detail = detail;
  }
  // A module that dies is not running: nobody looks at its details.
  void forget(const void* module) {
    Detail* detail = nullptr;
    {
      const Guard guard(lock);
      const auto found = known.find(module);
      if (found == known.end()) {
        return;
      }
      detail = found->second.detail;
      known.erase(found);
    }
    delete detail;
  }
  // As long as more changes are told.
  void note_change(const void* module) {
    const Guard guard(lock);
    const auto found = known.find(module);
    if (found != known.end() && found->second.changes_left > 0) {
      --found->second.changes_left;
      found->second.changed = true;
    }
  }
  void took_change(const void* module) {
    const Guard guard(lock);
    const auto found = known.find(module);
    if (found != known.end()) {
      found->second.changed = false;
    }
  }

 private:
  struct Guard {
    std::atomic_flag& flag;
    explicit Guard(std::atomic_flag& f) : flag(f) {
      while (flag.test_and_set(std::memory_order_acquire)) {
      }
    }
    ~Guard() {
      flag.clear(std::memory_order_release);
    }
  };
};
Modules& modules = *new Modules();  // Never destroyed: modules are called while the process ends.

bool is_training(void* module) {
  void* value = python.attribute(module, modules.training);
  if (value == nullptr) {
    python.clear_error();
    return false;
  }
  const int training = python.is_true(value);
  python.decrement(value);
  if (training < 0) {
    python.clear_error();
  }
  return training > 0;
}

// The type of an object, borrowed: types of what we look at live longer than we look.
void* type_of(void* object) {
  void* type = python.type(object);
  python.decrement(type);
  return type;
}

bool has_type(void* object, const void* one, const void* other) {
  const void* type = type_of(object);
  return type == one || type == other;
}

// The tensor behind a Python object, or NULL. Subclasses of Tensor answer for their attributes in Python: they are left alone.
TensorImpl* tensor_of(void* object) {
  if (!has_type(object, modules.tensor_type, modules.parameter_type)) {
    return nullptr;
  }
  void* address = python.attribute(object, modules.cdata);
  if (address == nullptr) {
    python.clear_error();
    return nullptr;
  }
  auto* tensor = static_cast<TensorImpl*>(python.as_pointer(address));
  python.decrement(address);
  return tensor;
}

// The output, or the first of several.
COLD void watch_output(void* output, int64_t id) {
  void* first = nullptr;
  if (has_type(output, python.tuple_type, python.list_type)) {
    output = first = python.item(output, 0);
    if (first == nullptr) {
      python.clear_error();
      return;
    }
  }
  if (TensorImpl* tensor = tensor_of(output)) {
    optape_hook_watch(tensor, id);
  }
  if (first != nullptr) {
    python.decrement(first);
  }
}

// Tensors on their way to capture, outside of any op call.
class Shown {
 public:
  explicit Shown(Thread& thread) : frame(thread.frame(thread.depth)), op(*watch_operator.load(std::memory_order_acquire)), recorder{frame, thread, op} {
    start(frame, thread, op);
    recorder.identities = op.wants(OPTAPE_PLAN_IDENTITIES);
  }
  void add(TensorImpl* tensor) {
    if (tensor != nullptr && frame.tensors.count < most) {
      recorder.tensor(tensor);
    }
  }
  // The tensors in an object of Python: itself, or what tuples, lists and dictionaries hold.
  void add_all(void* object, int depth) {
    const void* type = type_of(object);
    if (type == modules.tensor_type || type == modules.parameter_type) {
      add(tensor_of(object));
    } else if (depth < deepest) {
      if (python.is_subtype(const_cast<void*>(type), python.tuple_type) != 0) {
        for (intptr_t i = 0, n = python.tuple_size(object); i < n; ++i) {
          add_all(python.tuple_item(object, i), depth + 1);
        }
      } else if (python.is_subtype(const_cast<void*>(type), python.list_type) != 0) {
        for (intptr_t i = 0, n = python.list_size(object); i < n; ++i) {
          add_all(python.list_item(object, i), depth + 1);
        }
      } else if (python.is_subtype(const_cast<void*>(type), python.dict_type) != 0) {
        intptr_t at = 0;
        void* key = nullptr;
        void* value = nullptr;
        while (python.dict_next(object, &at, &key, &value) != 0) {
          add_all(value, depth + 1);
        }
      }
    }
  }
  const optape_tensor* tensors() {
    recorder.publish();
    return frame.tensors.items;
  }
  uint32_t count() const {
    return frame.tensors.count;
  }

 private:
  static constexpr uint32_t most = 256;
  static constexpr int deepest = 4;
  Frame& frame;
  const Operator& op;
  Recorder recorder;
};

// A state attribute holds `value` (NULL: it is gone).
void tell_state(int64_t module, uint32_t attribute, void* value) noexcept {
  try {
    Thread& t = thread();
    TensorImpl* tensor = value != nullptr ? tensor_of(value) : nullptr;
    if (tensor == nullptr) {
      capture->state(t.id, static_cast<uint32_t>(module), attribute, nullptr);
      return;
    }
    Shown shown(t);
    shown.add(tensor);
    const optape_tensor* tensors = shown.tensors();
    capture->state(t.id, static_cast<uint32_t>(module), attribute, shown.count() != 0 ? tensors : nullptr);
  } catch (...) {
    give_up_with_current_exception();
  }
}

// What a module holds under a name: in a dictionary of its or as an attribute. A new reference, or NULL.
void* held(void* module, void* container, void* name) {
  if (container == nullptr) {
    void* value = python.attribute(module, name);
    if (value == nullptr) {
      python.clear_error();
    }
    return value;
  }
  void* dictionary = python.attribute(module, container);
  if (dictionary == nullptr) {
    python.clear_error();
    return nullptr;
  }
  void* value = type_of(dictionary) == python.dict_type ? python.dict_item(dictionary, name) : nullptr;
  if (value != nullptr) {
    python.increment(value);
  }
  python.decrement(dictionary);
  return value;
}

// Libraries also write the dictionaries that hold states directly, which nobody is told. So the states are looked at where a call
// begins and where it ends.
void look_at_states(void* module, int64_t number, const Detail& detail) {
  for (const Detail::State& state : detail.states) {
    void* value = held(module, state.container, state.name);
    tell_state(number, state.text, value);
    if (value != nullptr) {
      python.decrement(value);
    }
  }
}

// ---- watches of modules -------------------------------------------------------------------------------------------

using at::Tensor;
using torch::autograd::Edge;
using torch::autograd::Node;

// The tensors in an object of Python, in order, each held.
void gather(void* object, int depth, std::vector<Tensor>& out) {
  constexpr size_t most = 64;
  constexpr int deepest = 4;
  void* type = type_of(object);
  if (TensorImpl* tensor = tensor_of(object)) {
    if (tensor != c10::UndefinedTensorImpl::singleton() && out.size() < most) {
      out.emplace_back(c10::intrusive_ptr<TensorImpl, c10::UndefinedTensorImpl>::unsafe_reclaim_from_nonowning(tensor));
    }
  } else if (depth < deepest && python.is_subtype(type, python.tuple_type) != 0) {
    for (intptr_t i = 0, n = python.tuple_size(object); i < n; ++i) {
      gather(python.tuple_item(object, i), depth + 1, out);
    }
  } else if (depth < deepest && python.is_subtype(type, python.list_type) != 0) {
    for (intptr_t i = 0, n = python.list_size(object); i < n; ++i) {
      gather(python.list_item(object, i), depth + 1, out);
    }
  } else if (depth < deepest && python.is_subtype(type, python.dict_type) != 0) {
    intptr_t at = 0;
    void* key = nullptr;
    void* value = nullptr;
    while (python.dict_next(object, &at, &key, &value) != 0) {
      gather(value, depth + 1, out);
    }
  }
}

// The id of a watch for the tensor at `place`: asked of the glue, once.
int64_t watch_id(int64_t module, Detail::Watch& watch, size_t place) {
  while (watch.ids.size() <= place) {
    int64_t id = -1;
    void* const arguments[] = {
        python.integer(module), python.integer(watch.index), python.integer(static_cast<int64_t>(watch.ids.size()))};
    if (void* told = python.call(modules.more, arguments[0], arguments[1], arguments[2], nullptr)) {
      id = python.as_long(told);
      python.decrement(told);
    } else {
      python.clear_error();
    }
    for (void* argument : arguments) {
      python.decrement(argument);
    }
    watch.ids.push_back(id);
  }
  return watch.ids[place];
}

void watch_all(int64_t module, Detail::Watch& watch, const std::vector<Tensor>& tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    optape_hook_watch(tensors[i].unsafeGetTensorImpl(), watch_id(module, watch, i));
  }
}

void watch_attribute(void* module, int64_t number, Detail::Watch& watch) {
  void* value = held(module, watch.container, watch.name);
  std::vector<Tensor> tensors;
  if (value != nullptr) {
    gather(value, 0, tensors);
  }
  watch_all(number, watch, tensors);
  // Before the first call a state may be a number.
  const bool number_before = value != nullptr && watch.of == Detail::Of::Before &&
      (type_of(value) == python.float_type || type_of(value) == python.int_type || value == python.none);
  if (tensors.empty() && !watch.odd && !number_before) {
    watch.odd = true;
    void* const arguments[] = {python.integer(number), python.integer(watch.index)};
    void* told = python.call(modules.odd, arguments[0], arguments[1], value != nullptr ? value : modules.odd, nullptr);
    if (told != nullptr) {
      python.decrement(told);
    } else {
      python.clear_error();
    }
    python.decrement(arguments[0]);
    python.decrement(arguments[1]);
  }
  if (value != nullptr) {
    python.decrement(value);
  }
}

// The gradient of a loss by a tensor through some nodes alone: the sum of what these hand on for it.
struct GradientThrough {
  GradientThrough(int64_t watch, size_t count) : id(watch), parts(count) {}

  void part(const Tensor& gradient) noexcept {
    try {
      const std::lock_guard<std::mutex> guard(lock);
      const int task = torch::autograd::get_current_graph_task_id();
      if (task != graph_task) {  // Another backward pass over the same graph, or the last one did not come by all nodes.
        graph_task = task;
        seen = 0;
        sum = Tensor();
      }
      ++seen;
      if (gradient.defined()) {
        if (parts == 1) {
          ::watch(gradient.unsafeGetTensorImpl(), id);
          return;
        }
        // A copy: autograd may add to its own in place where nobody else holds it.
        const Hidden hidden;
        const at::NoGradGuard no_grad;
        sum = sum.defined() ? sum.add(gradient) : gradient.clone();
      }
      if (seen == parts && sum.defined()) {
        const Tensor whole = std::move(sum);
        sum = Tensor();
        ::watch(whole.unsafeGetTensorImpl(), id);
      }
    } catch (...) {
      give_up_with_current_exception();
    }
  }

  const int64_t id;
  const size_t parts;
  std::mutex lock;
  size_t seen = 0;
  int graph_task = -1;
  Tensor sum;
};

struct GradientPart final : torch::autograd::FunctionPostHook {
  GradientPart(std::shared_ptr<GradientThrough> of, size_t place) : whole(std::move(of)), index(place) {}
  torch::autograd::variable_list operator()(
      const torch::autograd::variable_list& outputs, const torch::autograd::variable_list& /*inputs*/) override {
    if (index < outputs.size()) {
      whole->part(outputs[index]);
    }
    return outputs;
  }
  const std::shared_ptr<GradientThrough> whole;
  const size_t index;
};

// Where the gradients of a module call's inputs go, taken before the call.
struct InputEdges {
  std::vector<Edge> edges;     // by place of the tensor; without a function: needs no gradient
  uint64_t first_node = 0;     // sequence number of the first node that the call may make
  uint64_t thread = 0;
};

InputEdges edges_of(const std::vector<Tensor>& inputs) {
  InputEdges found;
  found.first_node = at::sequence_number::peek();
  found.thread = at::RecordFunction::currentThreadId();
  for (const Tensor& input : inputs) {
    found.edges.push_back(input.requires_grad() ? torch::autograd::impl::gradient_edge(input) : Edge());
  }
  return found;
}

// Finds the nodes that the call has made and that hand on a gradient for an input, and has them tell it.
void follow_input_gradients(const InputEdges& inputs, const std::vector<Tensor>& outputs, const std::vector<int64_t>& ids) {
  constexpr size_t most_nodes = 100000;
  std::vector<std::vector<std::pair<Node*, size_t>>> parts(inputs.edges.size());
  std::unordered_map<Node*, bool> seen;
  std::vector<Node*> pending;
  const auto visit = [&](Node* node) {
    if (node != nullptr && node->sequence_nr() >= inputs.first_node && node->thread_id() == inputs.thread &&
        seen.emplace(node, true).second) {
      pending.push_back(node);
    }
  };
  for (const Tensor& output : outputs) {
    visit(output.grad_fn().get());
  }
  while (!pending.empty() && seen.size() < most_nodes) {
    Node* node = pending.back();
    pending.pop_back();
    for (size_t i = 0; i < node->num_outputs(); ++i) {
      const Edge& next = node->next_edge(i);
      bool is_input = false;
      for (size_t place = 0; place < inputs.edges.size(); ++place) {
        const Edge& edge = inputs.edges[place];
        if (edge.function != nullptr && next.function == edge.function && next.input_nr == edge.input_nr) {
          parts[place].emplace_back(node, i);
          is_input = true;
        }
      }
      if (!is_input) {
        visit(next.function.get());
      }
    }
  }
  for (size_t place = 0; place < parts.size(); ++place) {
    if (parts[place].empty() || ids[place] < 0) {
      continue;
    }
    const auto whole = std::make_shared<GradientThrough>(ids[place], parts[place].size());
    for (const auto& [node, index] : parts[place]) {
      node->add_post_hook(std::make_unique<GradientPart>(whole, index));
    }
  }
}

// What is watched of a call before it.
void watch_before(void* module, int64_t number, Detail& detail, const std::vector<Tensor>& inputs) {
  for (Detail::Watch& watch : detail.watches) {
    if (watch.of == Detail::Of::Input) {
      watch_all(number, watch, inputs);
    } else if (watch.of == Detail::Of::Before) {
      watch_attribute(module, number, watch);
    }
  }
}

// And after it.
void watch_after(void* module, int64_t number, Detail& detail, void* result, const InputEdges& inputs) {
  std::vector<Tensor> outputs;
  if (result != nullptr) {
    gather(result, 0, outputs);
  }
  for (Detail::Watch& watch : detail.watches) {
    switch (watch.of) {
      case Detail::Of::Output:
        watch_all(number, watch, outputs);
        break;
      case Detail::Of::After:
        if (result != nullptr) {
          watch_attribute(module, number, watch);
        }
        break;
      case Detail::Of::GradOutput:
        for (size_t i = 0; i < outputs.size(); ++i) {
          if (outputs[i].requires_grad() && at::GradMode::is_enabled()) {
            const int64_t id = watch_id(number, watch, i);
            outputs[i].register_hook([id](const Tensor& gradient) {
              if (gradient.defined()) {
                ::watch(gradient.unsafeGetTensorImpl(), id);
              }
            });
          }
        }
        break;
      case Detail::Of::GradInput: {
        std::vector<int64_t> ids;
        bool any = false;
        for (size_t i = 0; i < inputs.edges.size(); ++i) {
          const bool wanted = inputs.edges[i].function != nullptr;
          ids.push_back(wanted ? watch_id(number, watch, i) : -1);
          any |= wanted;
        }
        if (any) {
          follow_input_gradients(inputs, outputs, ids);
        }
        break;
      }
      default:
        break;
    }
  }
}

uint32_t text_of(void* name) {
  const char* text = python.as_text(name);
  if (text == nullptr) {
    python.clear_error();
    return 0;
  }
  return capture->text(text, std::strlen(text));
}

// A call returned (output, state): the state's fields by their names, or the state itself as `state`.
void look_at_returned_state(int64_t number, void* result) {
  if (python.is_subtype(type_of(result), python.tuple_type) == 0 || python.tuple_size(result) != 2) {
    return;
  }
  void* state = python.tuple_item(result, 1);
  if (python.is_subtype(type_of(state), python.tuple_type) == 0) {
    tell_state(number, capture->text("state", 5), state);
    return;
  }
  void* names = python.attribute(state, modules.fields);
  if (names == nullptr) {
    python.clear_error();
    return;
  }
  if (type_of(names) == python.tuple_type) {
    const intptr_t count = std::min(python.tuple_size(names), python.tuple_size(state));
    for (intptr_t i = 0; i < count; ++i) {
      tell_state(number, text_of(python.tuple_item(names, i)), python.tuple_item(state, i));
    }
  }
  python.decrement(names);
}

// An attribute of a module got a value.
void assigned(void* module, void* name, void* value) {
  Modules::Known known;
  if (!modules.find(module, known) || known.number < 0) {
    return;
  }
  if (known.detail != nullptr) {
    for (const Detail::State& state : known.detail->states) {
      if (state.name == name) {  // Names in code are interned.
        if (recording() || paused()) {  // A pause forgets what the state was.
          tell_state(known.number, state.text, value);
        }
        return;
      }
    }
  }
  if (known.changes_left == 0 || name == modules.training) {
    return;
  }
  const void* type = type_of(value);
  if (value == python.none || type == python.bool_type || type == python.int_type || type == python.float_type ||
      type == python.text_type || type == python.tuple_type || type == python.list_type) {
    modules.note_change(module);
  }
}

void* call_assign(void* function, void* const* arguments, size_t count, void* keywords) {
  constexpr size_t offset_flag = size_t{1} << (8 * sizeof(size_t) - 1);
  if (UNLIKELY((count & ~offset_flag) != 3 || keywords != nullptr)) {
    return modules.assign(function, arguments, count, keywords);
  }
  void* const module = arguments[0];
  void* const name = arguments[1];
  void* const value = arguments[2];
  void* result = modules.assign(function, arguments, count, keywords);
  if (LIKELY(result != nullptr)) {
    assigned(module, name, value);
  }
  return result;
}

COLD bool meet(void* module, Modules::Known& known) {
  void* done = python.call(modules.meet, module, nullptr);
  if (done == nullptr) {
    python.clear_error();
    return false;
  }
  python.decrement(done);
  return modules.find(module, known);
}

COLD void tell_change(void* module, Modules::Known& known) {
  modules.took_change(module);
  void* last = python.boolean(known.changes_left == 0 ? 1 : 0);
  void* done = python.call(modules.changed, module, last, nullptr);
  python.decrement(last);
  if (done == nullptr) {
    python.clear_error();
  } else {
    python.decrement(done);
  }
  modules.find(module, known);
}

void enter_module(uint32_t module, bool training, void* const* arguments, size_t count, void* keywords) noexcept {
  try {
    Thread& t = thread();
    if (UNLIKELY(!t.on)) {
      switch_thread(t, true);
    }
    const uint32_t graph_task = torch::autograd::get_current_graph_task_id() != -1 ? 1 : 0;
    const uint32_t grad_mode = t.autograd->get_grad_mode() ? 1 : 0;
    if (LIKELY(count == 0 && keywords == nullptr)) {
      capture->module_enter(t.id, module, graph_task, training ? 1 : 0, grad_mode, nullptr, 0);
      return;
    }
    const auto named = keywords != nullptr ? static_cast<size_t>(python.tuple_size(keywords)) : 0;
    Shown shown(t);
    for (size_t i = 0; i < count + named; ++i) {
      shown.add_all(arguments[i], 0);
    }
    const optape_tensor* tensors = shown.tensors();
    capture->module_enter(t.id, module, graph_task, training ? 1 : 0, grad_mode, tensors, shown.count());
  } catch (...) {
    give_up_with_current_exception();
  }
}

void exit_module(uint32_t module, void* result) noexcept {
  try {
    Thread& t = thread();
    if (LIKELY(result == nullptr)) {
      capture->module_exit(t.id, module, nullptr, 0);
      return;
    }
    Shown shown(t);
    shown.add_all(result, 0);
    const optape_tensor* tensors = shown.tensors();
    capture->module_exit(t.id, module, tensors, shown.count());
  } catch (...) {
    give_up_with_current_exception();
  }
}

// A call of a module of which something is watched.
COLD void* call_watched(
    void* function, void* const* arguments, size_t count, void* keywords, size_t positional, int64_t number, Detail& detail) {
  InputEdges edges;
  try {
    std::vector<Tensor> inputs;
    const auto named = keywords != nullptr ? static_cast<size_t>(python.tuple_size(keywords)) : 0;
    for (size_t i = 1; i < positional + named; ++i) {
      gather(arguments[i], 0, inputs);
    }
    watch_before(arguments[0], number, detail, inputs);
    if (detail.watches_gradients && at::GradMode::is_enabled()) {
      edges = edges_of(inputs);
    }
  } catch (...) {
    give_up_with_current_exception();
  }
  void* result = modules.call(function, arguments, count, keywords);
  try {
    watch_after(arguments[0], number, detail, result, edges);
  } catch (...) {
    give_up_with_current_exception();
  }
  return result;
}

void* call_module(void* function, void* const* arguments, size_t count, void* keywords) {
  constexpr size_t offset_flag = size_t{1} << (8 * sizeof(size_t) - 1);
  const size_t positional = count & ~offset_flag;
  if (UNLIKELY(positional == 0)) {
    return modules.call(function, arguments, count, keywords);
  }
  void* module = arguments[0];
  Modules::Known known;
  if ((UNLIKELY(!modules.find(module, known)) && !meet(module, known)) || known.number < 0) {
    return modules.call(function, arguments, count, keywords);
  }
  if (UNLIKELY(known.changed)) {
    tell_change(module, known);
  }
  const auto number = static_cast<uint32_t>(known.number);
  Detail* const detail = known.detail;
  const bool in_detail = modules.in_detail && recording();
  enter_module(number, is_training(module), arguments + 1, in_detail ? positional - 1 : 0, in_detail ? keywords : nullptr);
  if (UNLIKELY(detail != nullptr) && recording()) {
    look_at_states(module, known.number, *detail);
  }
  void* result = UNLIKELY(detail != nullptr && !detail->watches.empty() && recording())
      ? call_watched(function, arguments, count, keywords, positional, known.number, *detail)
      : modules.call(function, arguments, count, keywords);
  if (UNLIKELY(detail != nullptr) && recording()) {
    look_at_states(module, known.number, *detail);
    if (detail->returns_state && result != nullptr) {
      look_at_returned_state(known.number, result);
    }
  }
  if (known.watch >= 0 && result != nullptr) {
    watch_output(result, known.watch);
  }
  exit_module(number, in_detail ? result : nullptr);
  return result;
}

// Puts `ours` in the place of the C function behind a Python function, and gives the one that was there. NULL where that cannot be
// done. `size`: of the function object. CPython 3.12 and newer have a call for it; before, the pointer is found in the object.
Python::Vectorcall replace_call(void* function, size_t size, Python::Vectorcall ours) {
  const Python::Vectorcall before = python.call_of(function);
  if (before == nullptr) {
    return nullptr;
  }
  if (python.set_function_call != nullptr) {
    python.set_function_call(function, ours);
    return before;
  }
  auto* const words = static_cast<void**>(function);
  auto* const end = words + size / sizeof(void*);
  auto* const wanted = reinterpret_cast<void*>(before);
  auto* const found = std::find(words + 2, end, wanted);  // after reference count and type
  if (found == end || std::find(found + 1, end, wanted) != end) {
    return nullptr;
  }
  *found = reinterpret_cast<void*>(ours);
  return before;
}

void* python_hook_modules(void*, void* const* arguments, intptr_t count) {
  if (UNLIKELY(count != 5)) {
    return python.refuse("hook_modules(nn.Module.__call__, its size, meet, Tensor, Parameter)");
  }
  if (modules.call != nullptr) {
    return python.boolean(0);
  }
  modules.meet = arguments[2];
  modules.tensor_type = arguments[3];
  modules.parameter_type = arguments[4];
  for (int i = 0; i < 5; ++i) {
    python.increment(arguments[i]);  // kept for good
  }
  modules.training = python.intern("training");
  modules.cdata = python.intern("_cdata");
  modules.fields = python.intern("_fields");
  // Set before it is needed: on a Python without GIL another thread may call a module at once.
  modules.call = python.call_of(arguments[0]);
  modules.call = replace_call(arguments[0], static_cast<size_t>(python.as_long(arguments[1])), &call_module);
  return python.boolean(modules.call != nullptr ? 1 : 0);
}

void* python_know(void*, void* const* arguments, intptr_t count) {
  if (UNLIKELY(count != 3)) {
    return python.refuse("know(id(module), number, watch or -1)");
  }
  try {
    modules.set(python.as_pointer(arguments[0]), python.as_long(arguments[1]), python.as_long(arguments[2]));
  } catch (...) {
    give_up_with_current_exception();
  }
  return python.nothing();
}

void* python_forget(void*, void* const* arguments, intptr_t count) {
  if (UNLIKELY(count != 1)) {
    return python.refuse("forget(id(module))");
  }
  modules.forget(python.as_pointer(arguments[0]));
  return python.nothing();
}

// Has assignments to attributes of modules noticed: for nn.Module.__setattr__ and those of its subclasses, once each.
void* python_hook_assignments(void*, void* const* arguments, intptr_t count) {
  if (UNLIKELY(count != 3)) {
    return python.refuse("hook_assignments(__setattr__, its size, changed)");
  }
  const Python::Vectorcall usual = python.call_of(arguments[0]);
  if (usual == &call_assign || usual == nullptr || (modules.assign != nullptr && usual != modules.assign)) {
    return python.boolean(usual == &call_assign ? 1 : 0);
  }
  if (modules.changed == nullptr) {
    python.increment(arguments[2]);
    modules.changed = arguments[2];
  }
  python.increment(arguments[0]);
  modules.assign = usual;
  return python.boolean(replace_call(arguments[0], static_cast<size_t>(python.as_long(arguments[1])), &call_assign) != nullptr ? 1 : 0);
}

// The glue heard otherwise that a module changed: it is asked for its facts before the next call.
void* python_changes(void*, void* const* arguments, intptr_t count) {
  if (UNLIKELY(count != 1)) {
    return python.refuse("changes(id(module))");
  }
  modules.note_change(python.as_pointer(arguments[0]));
  return python.nothing();
}

void* python_hook_steps(void*, void* const* arguments, intptr_t count) {
  if (UNLIKELY(count != 1)) {
    return python.refuse("hook_steps(stepped)");
  }
  python.increment(arguments[0]);
  optimizer_stepped.store(arguments[0], std::memory_order_release);
  return python.nothing();
}

void* python_detail(void*, void* const* arguments, intptr_t count) {
  if (UNLIKELY(count != 1)) {
    return python.refuse("detail(on)");
  }
  modules.in_detail = python.is_true(arguments[0]) > 0;
  return python.nothing();
}

void* python_hook_watches(void*, void* const* arguments, intptr_t count) {
  if (UNLIKELY(count != 2)) {
    return python.refuse("hook_watches(more, odd)");
  }
  python.increment(arguments[0]);
  python.increment(arguments[1]);
  modules.more = arguments[0];
  modules.odd = arguments[1];
  return python.nothing();
}

// states(id(module), (name, container or None, ...), whether calls return the state, (of, name, container or None, watch id, ...))
void* python_states(void*, void* const* arguments, intptr_t count) {
  if (UNLIKELY(count != 4 || type_of(arguments[1]) != python.tuple_type || type_of(arguments[3]) != python.tuple_type)) {
    return python.refuse("states(id(module), (name, container or None, ...), returned, (of, name, container or None, watch id, ...))");
  }
  try {
    auto detail = std::make_unique<Detail>();
    for (intptr_t i = 0, n = python.tuple_size(arguments[1]); i + 1 < n; i += 2) {
      const char* name = python.as_text(python.tuple_item(arguments[1], i));
      void* container = python.tuple_item(arguments[1], i + 1);
      const char* holder = container != python.none ? python.as_text(container) : "";
      if (name == nullptr || holder == nullptr) {
        return nullptr;
      }
      // Interned names are kept for good.
      detail->states.push_back(
          {python.intern(name), *holder != '\0' ? python.intern(holder) : nullptr, capture->text(name, std::strlen(name))});
    }
    detail->returns_state = python.is_true(arguments[2]) > 0;
    for (intptr_t i = 0, n = python.tuple_size(arguments[3]); i + 3 < n; i += 4) {
      const char* name = python.as_text(python.tuple_item(arguments[3], i + 1));
      void* container = python.tuple_item(arguments[3], i + 2);
      const char* holder = container != python.none ? python.as_text(container) : "";
      if (name == nullptr || holder == nullptr) {
        return nullptr;
      }
      Detail::Watch watch;
      watch.of = static_cast<Detail::Of>(python.as_long(python.tuple_item(arguments[3], i)));
      watch.index = static_cast<uint32_t>(i / 4);
      watch.name = python.intern(name);
      watch.container = *holder != '\0' ? python.intern(holder) : nullptr;
      watch.ids.push_back(python.as_long(python.tuple_item(arguments[3], i + 3)));
      detail->watches_gradients |= watch.of == Detail::Of::GradInput;
      detail->watches.push_back(std::move(watch));
    }
    const bool nothing = detail->states.empty() && detail->watches.empty() && !detail->returns_state;
    modules.set(python.as_pointer(arguments[0]), nothing ? nullptr : detail.release());
  } catch (...) {
    give_up_with_current_exception();
  }
  return python.nothing();
}

void* python_enter(void*, void* const* arguments, intptr_t count) {
  if (UNLIKELY(count != 2)) {
    return python.refuse("enter(module, training)");
  }
  optape_hook_module_enter(static_cast<uint32_t>(python.as_long(arguments[0])), static_cast<int32_t>(python.as_long(arguments[1])));
  return python.nothing();
}

void* python_exit(void*, void* const* arguments, intptr_t count) {
  if (UNLIKELY(count != 1)) {
    return python.refuse("exit(module)");
  }
  optape_hook_module_exit(static_cast<uint32_t>(python.as_long(arguments[0])));
  return python.nothing();
}

void* python_watch(void*, void* const* arguments, intptr_t count) {
  if (UNLIKELY(count != 2)) {
    return python.refuse("watch(tensor._cdata, id)");
  }
  optape_hook_watch(python.as_pointer(arguments[0]), python.as_long(arguments[1]));
  return python.nothing();
}

void* python_thread(void*, void* const* arguments, intptr_t count) {
  if (UNLIKELY(count != 1)) {
    return python.refuse("thread(on)");
  }
  optape_hook_thread(static_cast<int32_t>(python.as_long(arguments[0])));
  return python.nothing();
}

constexpr int method_fastcall = 0x0080;
Python::Method methods[] = {
    {"enter", reinterpret_cast<void*>(&python_enter), method_fastcall, "A module is entered."},
    {"exit", reinterpret_cast<void*>(&python_exit), method_fastcall, "A module is left."},
    {"watch", reinterpret_cast<void*>(&python_watch), method_fastcall, "A tensor is watched."},
    {"hook_modules", reinterpret_cast<void*>(&python_hook_modules), method_fastcall, "Has module calls reported."},
    {"know", reinterpret_cast<void*>(&python_know), method_fastcall, "A module has a number."},
    {"forget", reinterpret_cast<void*>(&python_forget), method_fastcall, "A module has none any more."},
    {"hook_assignments", reinterpret_cast<void*>(&python_hook_assignments), method_fastcall, "Has assignments to attributes noticed."},
    {"changes", reinterpret_cast<void*>(&python_changes), method_fastcall, "A module's facts have changed."},
    {"hook_steps", reinterpret_cast<void*>(&python_hook_steps), method_fastcall, "Has the ends of optimizer steps told."},
    {"detail", reinterpret_cast<void*>(&python_detail), method_fastcall, "Module calls are recorded with their tensors."},
    {"hook_watches", reinterpret_cast<void*>(&python_hook_watches), method_fastcall, "What tells more about watches."},
    {"states", reinterpret_cast<void*>(&python_states), method_fastcall, "The state attributes of a module."},
    {"thread", reinterpret_cast<void*>(&python_thread), method_fastcall, "The hook is switched on or off for this thread."},
};

}  // namespace

EXPORT int32_t optape_hook_install(const optape_capture* table, char* error, size_t error_size) {
  std::string why;
  int32_t result = 1;
  try {
    result = install(table, why);
  } catch (const std::exception& e) {
    why = e.what();
  } catch (...) {
    why = "unknown error";
  }
  say(error, error_size, why);
  return result;
}

EXPORT const char* optape_hook_key(void) {
  return hook_key_name;
}

EXPORT const char* optape_hook_torch_version(void) {
  return TORCH_VERSION;
}

EXPORT uint32_t optape_hook_abi_version(void) {
  return OPTAPE_ABI_VERSION;
}

EXPORT int32_t optape_hook_thread(int32_t on) {
  if (hook_key_name[0] == '\0') {
    return 0;
  }
  try {
    return switch_thread(thread(), on != 0) ? 1 : 0;
  } catch (...) {
    give_up_with_current_exception();
    return 0;
  }
}

EXPORT void optape_hook_module_enter(uint32_t module, int32_t training) {
  if (capture != nullptr) {
    enter_module(module, training != 0, nullptr, 0, nullptr);
  }
}

EXPORT void optape_hook_module_exit(uint32_t module) {
  if (capture != nullptr) {
    exit_module(module, nullptr);
  }
}

EXPORT void optape_hook_identify(const void* tensor_impl, uint64_t* ids) {
  ids[0] = ids[1] = 0;
  if (capture == nullptr || tensor_impl == nullptr || watch_operator.load(std::memory_order_acquire) == nullptr) {
    return;
  }
  try {
    Shown shown(thread());
    shown.add(static_cast<TensorImpl*>(const_cast<void*>(tensor_impl)));
    const optape_tensor* tensors = shown.tensors();
    if (shown.count() != 0) {
      capture->identify(tensors, ids);
    }
  } catch (...) {
    give_up_with_current_exception();
  }
}

EXPORT void optape_hook_watch(const void* tensor_impl, int64_t id) {
  if (tensor_impl != nullptr) {
    watch(static_cast<TensorImpl*>(const_cast<void*>(tensor_impl)), id);
  }
}

// What to call when an optimizer step begins and ends (capture's optape_optimizer_enter and optape_optimizer_exit).
EXPORT void optape_hook_optimizer(void (*enter)(void), void (*leave)(void)) {
  optimizer_enter.store(enter, std::memory_order_release);
  optimizer_exit.store(leave, std::memory_order_release);
}

EXPORT void optape_hook_replan(uint32_t (*flags_of)(uint32_t op)) {
  const std::lock_guard<std::mutex> guard(define_lock);
  const auto ask = [&](Operator* op) { op->plan_flags.store(flags_of(op->index), std::memory_order_relaxed); };
  for (auto& bucket : buckets) {
    for (Operator* op = bucket.load(std::memory_order_acquire); op != nullptr; op = op->next.load(std::memory_order_acquire)) {
      ask(op);
    }
  }
  std::for_each(functions.begin(), functions.end(), ask);
}

EXPORT void* optape_hook_function(const char* lines) {
  if (capture == nullptr || lines == nullptr) {
    return nullptr;
  }
  try {
    return define_function(lines);
  } catch (...) {
    give_up_with_current_exception();
    return nullptr;
  }
}

EXPORT int32_t optape_hook_function_begin(void* function, const uint64_t* values, size_t count) {
  if (function == nullptr || capture == nullptr || !recording()) {
    return 0;
  }
  try {
    begin_function(*static_cast<const Operator*>(function), values, count);
    return 1;
  } catch (...) {
    give_up_with_current_exception();
    return 0;
  }
}

EXPORT void optape_hook_function_end(const uint64_t* values, size_t count) {
  try {
    end_function(values, count);
  } catch (...) {
    give_up_with_current_exception();
  }
}

EXPORT void optape_hook_function_abort(void) {
  Thread& t = thread();
  if (t.open_functions != 0) {
    drop(t.function_calls[--t.open_functions]->frame);
  }
}

// A builtin function for Python, by name (a new reference), or NULL where the process exports no
// CPython. To be called with the GIL held.
EXPORT void* optape_hook_python(const char* name) {
  if (!python.present || name == nullptr) {
    return nullptr;
  }
  for (Python::Method& method : methods) {
    if (std::strcmp(method.name, name) == 0) {
      return python.new_function(&method, nullptr, nullptr);
    }
  }
  return nullptr;
}
