/* The ABI between the hook (C++, built against the libtorch that is loaded) and capture (Rust).
 *
 * The hook sees op calls and knows libtorch; capture knows signatures, statistics, scopes, rings. The hook hands over
 * what it sees by pointer, without copying tensors and without touching reference counts; every pointer is valid only
 * during the call that passes it. No exception and no panic crosses this boundary, in either direction.
 *
 * recorder/src/abi.rs mirrors this file; both carry OPTAPE_ABI_VERSION and refuse each other where it differs.
 */
#ifndef OPTAPE_HOOK_H
#define OPTAPE_HOOK_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define OPTAPE_ABI_VERSION 3u

/* ---- what the hook hands to capture ------------------------------------------------------------------------- */

/* Bits of optape_tensor.flags. The low 16 are `tensor_flags` of the trace and part of the structure; the others are not. */
enum {
  OPTAPE_TENSOR_REQUIRES_GRAD = 1 << 0,
  OPTAPE_TENSOR_WRAPPED_NUMBER = 1 << 1,
  OPTAPE_TENSOR_SPARSE = 1 << 2,
  OPTAPE_TENSOR_NESTED = 1 << 3,
  OPTAPE_TENSOR_QUANTIZED = 1 << 4,
  OPTAPE_TENSOR_MKLDNN = 1 << 5,
  OPTAPE_TENSOR_CONJUGATE = 1 << 6,
  OPTAPE_TENSOR_NEGATIVE = 1 << 7,
  OPTAPE_TENSOR_ZERO = 1 << 8,
  OPTAPE_TENSOR_SUBCLASS = 1 << 9,
  OPTAPE_TENSOR_NO_VALUES = 1 << 10,
  OPTAPE_TENSOR_LEAF_PARAMETER = 1 << 11,
  /* Not structure: */
  OPTAPE_TENSOR_OWNED = 1 << 16,     /* the storage's memory is torch's own and its death will be reported (storage_freed) */
  OPTAPE_TENSOR_ADOPTED = 1 << 17,   /* OWNED since this very call: a storage not seen before */
  OPTAPE_TENSOR_CACHEABLE = 1 << 18  /* OWNED, and nobody outside torch holds its memory (NumPy marks exports not resizable) */
};

/* One tensor, seen from outside. Tensors of the arguments stay alive until end; their storages need not: a kernel may free or replace
 * them (resize_, set_), and storage_freed comes in between. sizes and strides point into the words of the call. */
typedef struct optape_tensor {
  const void* impl;         /* TensorImpl*: which object */
  const void* storage;      /* StorageImpl*, or NULL */
  const void* storage_base; /* first byte of the storage, or NULL */
  const void* data;         /* first element, or NULL where values cannot be read here (other device, no values, no plain layout) */
  const int64_t* sizes;     /* dim of them */
  const int64_t* strides;   /* dim of them, in elements; NULL where the tensor has none */
  uint64_t storage_bytes;
  uint64_t device_data;     /* address of the first element in a CUDA device's memory; 0 where there is none */
  uint32_t version;         /* version counter; UINT32_MAX where there is none (inference tensors) */
  uint32_t flags;
  int8_t dtype;             /* c10::ScalarType */
  uint8_t device_kind;      /* c10::DeviceType */
  int8_t device_index;
  uint8_t dim;
  uint32_t argument;        /* index of the schema argument, or of the return value for outputs */
} optape_tensor;

/* The structure of the arguments and outputs as words; equal structure gives equal words. Each value begins with a word
 * whose low 8 bits are its tag; the rest of that word is `aux`. Values that vary stand in the payload instead. */
enum {
  OPTAPE_WORD_NONE = 1,         /* None, undefined tensor */
  OPTAPE_WORD_TENSOR,           /* aux: dtype u8 | device_kind u8 << 8 | device_index u8 << 16 | dim u8 << 24 | low 16 flags << 32
                                   (56 bits); then dim sizes, then, unless bit 48 of aux (no strides) is set, dim strides. A wrapped number adds
                                   1 payload word (2 for complex): f64 bits, i64, or 0/1 */
  OPTAPE_WORD_TENSOR_LIST,      /* aux: count; then count values, each NONE or TENSOR */
  OPTAPE_WORD_INT,              /* then the value */
  OPTAPE_WORD_INT_PAYLOAD,      /* 1 payload word */
  OPTAPE_WORD_INT_LIST,         /* aux: count; then the values */
  OPTAPE_WORD_FLOAT,            /* aux: 0 for +0.0, 1 for 1.0 */
  OPTAPE_WORD_FLOAT_PAYLOAD,    /* 1 payload word: bits */
  OPTAPE_WORD_FLOAT_LIST,       /* aux: count; count payload words */
  OPTAPE_WORD_COMPLEX_PAYLOAD,  /* 2 payload words */
  OPTAPE_WORD_BOOL,             /* aux: 0 or 1 */
  OPTAPE_WORD_BOOL_LIST,        /* aux: count; then a word each */
  OPTAPE_WORD_TEXT,             /* aux: text id (capture.text) */
  OPTAPE_WORD_TEXT_PAYLOAD,     /* 1 payload word: text id */
  OPTAPE_WORD_DTYPE,            /* aux: c10::ScalarType */
  OPTAPE_WORD_DEVICE,           /* aux: kind u8 | index u8 << 8 */
  OPTAPE_WORD_ENUMERATOR,       /* aux: layout or memory format */
  OPTAPE_WORD_OPAQUE            /* aux: text id of the type's name */
};

/* Bits of optape_call.flags: `call_flags` of the trace; the hook sets these, capture the others. */
enum {
  OPTAPE_CALL_GRAD_MODE = 1 << 0,
  OPTAPE_CALL_INFERENCE_MODE = 1 << 1,
  OPTAPE_CALL_NOT_EXECUTED = 1 << 2, /* no kernel computes values: an argument or output is fake, meta, functional or functorch-wrapped */
  OPTAPE_CALL_ACCUMULATION = 1 << 3, /* an add_ by C++ where a Python mode would have made it add: autograd's input buffer summed two
                                        gradients, or at::linear added its bias to an input of more than two dimensions */
  OPTAPE_CALL_NESTED = 1 << 7        /* a function call inside another recorded one */
};

#define OPTAPE_NO_NODE UINT64_MAX

/* One op call. The hook fills it up to the arguments, calls begin (where the plan wants it), runs the kernel, adds the outputs and
 * the times, and calls end; or abort, if the kernel threw. The memory belongs to the hook and lives until then. */
typedef struct optape_call {
  uint32_t op;                 /* index from define_op */
  uint32_t flags;
  const uint64_t* words;       /* arguments, then outputs */
  uint32_t word_count;
  uint32_t argument_words;     /* how many of them belong to the arguments */
  const uint64_t* payload;
  uint32_t payload_count;
  uint32_t tensor_count;
  const optape_tensor* tensors; /* of the arguments in order, then of the outputs; undefined ones are left out */
  uint32_t input_count;        /* how many of them belong to arguments */
  uint32_t graph_task;         /* 1 inside an autograd graph task */
  uint64_t peek;               /* at::sequence_number::peek() on this thread when the call began */
  uint64_t node;               /* sequence number of the running autograd node, or OPTAPE_NO_NODE */
  uint64_t node_thread;        /* at::RecordFunction thread id on which that node was made */
  const void* accumulate;      /* TensorImpl* of the variable, where the running node is AccumulateGrad */
  uint64_t thread;             /* at::RecordFunction::currentThreadId() */
  uint64_t start_ns;           /* CLOCK_MONOTONIC around the kernel */
  uint64_t end_ns;
  uint64_t capture[48];        /* capture's own, from begin to end; the hook sets capture[0] = 0 before begin or end */
} optape_call;

/* An operator, told once. */
typedef struct optape_argument {
  const char* name;
  const char* type_name;      /* as the schema prints it */
  const char* default_value;  /* as the schema prints it, or NULL */
  const char* alias;          /* alias set letters, "" where there is none */
  uint8_t keyword_only;
  uint8_t written;
  uint8_t reserved[6];
} optape_argument;

typedef struct optape_operator {
  const char* name;           /* aten::add */
  const char* overload;       /* Tensor, or "" */
  const optape_argument* arguments;
  uint32_t argument_count;
  uint32_t return_count;
  const optape_argument* returns; /* name may be "" */
} optape_operator;

/* What capture wants of an operator's calls. */
enum {
  OPTAPE_PLAN_BEGIN = 1 << 0,      /* call begin */
  OPTAPE_PLAN_IDENTITIES = 1 << 1, /* adopt storages of all its tensors (T6) */
  OPTAPE_PLAN_TEXT_PAYLOAD = 1 << 2 /* its texts vary: profiler ranges */
};

typedef struct optape_plan {
  uint32_t op;
  uint32_t flags;
  const uint8_t* wild; /* one per argument, owned by capture, lives forever: 1 where an int of that argument is payload. May change at any time. */
} optape_plan;

/* Capture, as the hook sees it. */
typedef struct optape_capture {
  uint32_t abi_version;
  uint32_t reserved;
  /* Read (relaxed) at every call. Bits 0 and 1: ops are recorded. Bit 2: paused: ops pass through, `idle` is called for each that is not inside
   * another, and the ops of profiler ranges are reported as if they were recorded. 0: ops pass through untouched. */
  const uint32_t* recording;
  /* 0 on success. Called once per operator and thread-safe. */
  int32_t (*define_op)(const optape_operator* op, optape_plan* plan);
  uint32_t (*text)(const char* text, size_t length);
  void (*begin)(optape_call* call);
  void (*end)(optape_call* call);
  void (*abort)(optape_call* call);
  /* An OWNED storage's memory is about to be freed. From any thread, at any time. */
  void (*storage_freed)(const void* storage_base);
  /* graph_task: 1 inside an autograd graph task: the module runs again (checkpointing). training: the module's flag. tensors: the
   * arguments, and the results, as far as they are tensors or containers of tensors; none unless module calls are recorded in detail. */
  void (*module_enter)(
      uint64_t thread, uint32_t module, uint32_t graph_task, uint32_t training, uint32_t grad_mode, const optape_tensor* tensors,
      uint32_t tensor_count);
  void (*module_exit)(uint64_t thread, uint32_t module, const optape_tensor* tensors, uint32_t tensor_count);
  /* A state attribute (text id) of a module holds this tensor now; NULL: something that is no tensor. May be told again. */
  void (*state)(uint64_t thread, uint32_t module, uint32_t attribute, const optape_tensor* tensor);
  /* ids[0] becomes the id of the tensor's storage, ids[1] that of the tensor object; 0 where there is none. */
  void (*identify)(const optape_tensor* tensor, uint64_t* ids);
  /* A watched value. The call has one tensor, the words of the arguments (Tensor, int id), and no outputs. */
  void (*watch)(optape_call* call);
  /* The hook met something that it cannot go on with: recording is switched off and the text goes into the trace. */
  void (*failed)(const char* why);
  /* While paused: an op passes on this thread (torch's id, as in optape_call). */
  void (*idle)(uint64_t thread);
} optape_capture;

/* ---- what the hook library exports ---------------------------------------------------------------------------- */

/* Registers the fallback on a free dispatch key and the op optape::watch(Tensor value, int id) -> (). 0 on success, else `error` says why.
 * Must be called once, before optape_hook_thread. */
int32_t optape_hook_install(const optape_capture* capture, char* error, size_t error_size);

/* Name of the dispatch key in use ("Fake"), "" before install. */
const char* optape_hook_key(void);

/* "2.13.0", and the ABI version that the library was built with. */
const char* optape_hook_torch_version(void);
uint32_t optape_hook_abi_version(void);

/* Switches the hook on (1) or off (0) for ops of the calling thread. Returns what it was. */
int32_t optape_hook_thread(int32_t on);

/* Module calls on the calling thread. `training`: the module's flag. Switches the hook on for the thread where it is missing. */
void optape_hook_module_enter(uint32_t module, int32_t training);
void optape_hook_module_exit(uint32_t module);

/* A watched tensor by its TensorImpl* (Python: Tensor._cdata). */
void optape_hook_watch(const void* tensor_impl, int64_t id);

/* The ids of a tensor's storage (ids[0]) and of the tensor object (ids[1]) by its TensorImpl*; 0 where there is none. */
void optape_hook_identify(const void* tensor_impl, uint64_t* ids);

/* What to call when an optimizer step of torch.optim begins and ends on a thread (known by its profiler range). */
void optape_hook_optimizer(void (*enter)(void), void (*leave)(void));

/* Asks capture again what it wants of every operator (optape_plan_flags): another recording may want something else. */
void optape_hook_replan(uint32_t (*flags_of)(uint32_t op));

/* Function calls (--functions): what Python's __torch_function__ protocol sees. A function is told once: lines of text, first its name
 * (`function::torch.nn.functional.linear`), then the overload, then each argument as NAME, TAB, 1 for a keyword or 0, TAB, 1 if it is
 * written or 0. Gives what begin wants, NULL where something failed.
 *
 * A call's values are words as in optape_call, one for each argument (begin) or the one result (end), with tensors as
 * their TensorImpl*: NONE; TENSOR, address; TENSOR_LIST with count, addresses (0: None); INT, value; FLOAT, bits; COMPLEX_PAYLOAD, two; FLOAT_LIST
 * with count, bits; the others as they are. begin gives 1 where the call is recorded: then end or abort must follow, calls of a thread
 * nested in each other. Tensors must live until then. */
void* optape_hook_function(const char* lines);
int32_t optape_hook_function_begin(void* function, const uint64_t* values, size_t count);
void optape_hook_function_end(const uint64_t* values, size_t count);
void optape_hook_function_abort(void);

/* A builtin function for the attach glue (PyObject*, new reference): enter, exit, watch, thread, hook_modules, know, forget,
 * hook_assignments, hook_steps, changes, detail, hook_watches, states. NULL for
 * other names and where the process exports no CPython. Needs the GIL. */
void* optape_hook_python(const char* name);

#ifdef __cplusplus
}
#endif

#endif
