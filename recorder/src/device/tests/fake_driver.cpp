// A stand-in for the driver and for torch's CUDA library, as far as times of calls need them. It keeps to the driver's rules: what is
// called without a context fails, and an event that is asked for while somebody captures a graph breaks that graph unless the
// thread has exchanged its capture mode.

#ifdef OPTAPE_TORCH

extern "C" int aoti_torch_get_current_cuda_stream(int index, void** stream) {
  *stream = index == 0 ? reinterpret_cast<void*>(0x57) : nullptr;
  return index == 0 ? 0 : 1;
}

#else

typedef void* Handle;
typedef unsigned long long u64;

namespace {

const Handle context = reinterpret_cast<Handle>(0xc0);
enum { NO_CONTEXT = 201, NOT_READY = 600, CAPTURE_BROKEN = 901 };

struct Event {
  u64 recorded_ns;
  u64 due;
  bool recorded;
};

Event events[256];
int created = 0;
thread_local Handle current = nullptr;
thread_local int mode = 0;

struct Script {
  u64 now;
  u64 delay;
  u64 device_ns;
  int somebody_captures;
  int refuses;
};
Script script;

}  // namespace

extern "C" {

Script* fake_script() {
  return &script;
}
int fake_events() {
  return created;
}
int fake_mode() {
  return mode;
}
void fake_context(int on) {
  current = on != 0 ? context : nullptr;
}

int cuInit(unsigned) {
  return 0;
}
int cuGetErrorName(int code, const char** name) {
  *name = code == CAPTURE_BROKEN ? "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED" : "CUDA_ERROR_INVALID_CONTEXT";
  return 0;
}
int cuDeviceGet(int* device, int index) {
  *device = index;
  return 0;
}
int cuDeviceGetName(char* name, int size, int) {
  const char text[] = "Stand-in";
  for (int i = 0; i < static_cast<int>(sizeof text) && i < size; ++i) {
    name[i] = text[i];
  }
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? 9 : 0;
  return 0;
}
int cuDevicePrimaryCtxRetain(Handle* made, int) {
  *made = context;
  return 0;
}
int cuCtxGetCurrent(Handle* found) {
  *found = current;
  return 0;
}
int cuCtxGetDevice(int* device) {
  *device = 0;
  return current == context ? 0 : NO_CONTEXT;
}
int cuCtxPushCurrent_v2(Handle pushed) {
  current = pushed;
  return 0;
}
int cuCtxPopCurrent_v2(Handle* popped) {
  *popped = current;
  current = nullptr;
  return 0;
}
int cuThreadExchangeStreamCaptureMode(int* exchanged) {
  const int was = mode;
  mode = *exchanged;
  *exchanged = was;
  return 0;
}
int cuStreamIsCapturing(Handle, int* status) {
  *status = 0;
  return current == context ? 0 : NO_CONTEXT;
}
int cuStreamGetId(Handle stream, u64* id) {
  *id = reinterpret_cast<u64>(stream) + 1;
  return 0;
}

int cuEventCreate(Handle* event, unsigned flags) {
  if (current != context || flags != 0 || created == 256 || (script.somebody_captures != 0 && mode != 2)) {
    return NO_CONTEXT;
  }
  *event = &events[created++];
  return 0;
}
int cuEventRecord(Handle event, Handle) {
  if (current != context || script.refuses != 0) {
    return NO_CONTEXT;
  }
  *static_cast<Event*>(event) = Event{script.device_ns, script.now + script.delay, true};
  return 0;
}
int cuEventQuery(Handle event) {
  if (script.somebody_captures != 0 && mode != 2) {
    return CAPTURE_BROKEN;
  }
  return static_cast<Event*>(event)->due <= script.now ? 0 : NOT_READY;
}
int cuEventElapsedTime(float* milliseconds, Handle begun, Handle ended) {
  const auto* a = static_cast<Event*>(begun);
  const auto* b = static_cast<Event*>(ended);
  if (!a->recorded || !b->recorded || b->due > script.now) {
    return NOT_READY;
  }
  *milliseconds = static_cast<float>(static_cast<double>(b->recorded_ns - a->recorded_ns) / 1e6);
  return 0;
}

// What only statistics need.
int cuModuleLoadData(Handle*, const void*) {
  return NO_CONTEXT;
}
int cuModuleGetFunction(Handle*, Handle, const char*) {
  return NO_CONTEXT;
}
int cuMemAlloc_v2(u64*, u64) {
  return NO_CONTEXT;
}
int cuMemHostAlloc(Handle*, u64, unsigned) {
  return NO_CONTEXT;
}
int cuMemHostGetDevicePointer_v2(u64*, Handle, unsigned) {
  return NO_CONTEXT;
}
int cuMemsetD8Async(u64, unsigned char, u64, Handle) {
  return NO_CONTEXT;
}
int cuLaunchKernel(
    Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, Handle*, Handle*) {
  return NO_CONTEXT;
}

}  // extern "C"

#endif
