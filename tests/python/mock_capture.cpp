// A capture that writes down what the hook and the attach glue tell it, one line each. Tests of the hook load it in the place
// of the real one (harness.py).

#include "../../recorder/hook/optape_hook.h"

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Never destroyed: storages die while the process ends, too.
std::mutex& lock = *new std::mutex;
std::string& lines = *new std::string;
std::vector<std::string>& operators = *new std::vector<std::string>;
std::vector<std::string>& texts = *new std::vector<std::string>;
std::unordered_map<std::string, uint32_t>& text_ids = *new std::unordered_map<std::string, uint32_t>;
std::unordered_set<const void*>& owned = *new std::unordered_set<const void*>;
uint64_t freed = 0;
uint32_t is_recording = 1;
uint32_t plan_flags = OPTAPE_PLAN_BEGIN | OPTAPE_PLAN_IDENTITIES;
uint32_t modules = 0;
uint32_t watches = 0;
bool with_structure = false;
const uint8_t tame[256] = {};
constexpr uint64_t begun = 0x6f7074617065;

void line(const std::string& text) {
  const std::lock_guard<std::mutex> guard(lock);
  lines += text;
  lines += '\n';
}

int32_t define_op(const optape_operator* op, optape_plan* plan) {
  const std::lock_guard<std::mutex> guard(lock);
  plan->op = static_cast<uint32_t>(operators.size());
  plan->flags = plan_flags;
  plan->wild = tame;
  operators.push_back(std::string(op->name) + "." + (*op->overload != '\0' ? op->overload : "default"));
  return 0;
}

uint32_t text(const char* data, size_t length) {
  const std::lock_guard<std::mutex> guard(lock);
  const auto added = text_ids.emplace(std::string(data, length), static_cast<uint32_t>(texts.size()));
  if (added.second) {
    texts.emplace_back(data, length);
  }
  return added.first->second;
}

std::string value_at(const optape_call& call, uint32_t& word, uint32_t& pay) {
  const uint64_t first = call.words[word++];
  const uint64_t aux = first >> 8;
  const auto number = [&] { return std::to_string(static_cast<int64_t>(call.words[word++])); };
  const auto real = [&] {
    double value;
    std::memcpy(&value, &call.payload[pay++], sizeof value);
    return std::to_string(value);
  };
  std::string out;
  switch (first & 255) {
    case OPTAPE_WORD_NONE:
      return "None";
    case OPTAPE_WORD_TENSOR: {
      const uint32_t dim = aux >> 24 & 255;
      out = "T" + std::to_string(aux & 255) + "[";
      for (uint32_t d = 0; d < dim; ++d) {
        out += number() + " ";
      }
      if ((aux >> 48 & 1) == 0) {
        out += "|";
        for (uint32_t d = 0; d < dim; ++d) {
          out += " " + number();
        }
      }
      const uint64_t flags = aux >> 32 & 0xffff;
      if ((flags & OPTAPE_TENSOR_WRAPPED_NUMBER) != 0) {
        ++pay;
      }
      return out + "]" + (flags != 0 ? "f" + std::to_string(flags) : "");
    }
    case OPTAPE_WORD_TENSOR_LIST:
      out = "(";
      for (uint64_t i = 0; i < aux; ++i) {
        out += value_at(call, word, pay) + " ";
      }
      return out + ")";
    case OPTAPE_WORD_INT:
      return number();
    case OPTAPE_WORD_INT_PAYLOAD:
      return "payload " + std::to_string(static_cast<int64_t>(call.payload[pay++]));
    case OPTAPE_WORD_INT_LIST:
      out = "[";
      for (uint64_t i = 0; i < aux; ++i) {
        out += number() + " ";
      }
      return out + "]";
    case OPTAPE_WORD_FLOAT:
      return aux != 0 ? "1.0" : "0.0";
    case OPTAPE_WORD_FLOAT_PAYLOAD:
      return real();
    case OPTAPE_WORD_FLOAT_LIST:
      out = "[";
      for (uint64_t i = 0; i < aux; ++i) {
        out += real() + " ";
      }
      return out + "]";
    case OPTAPE_WORD_COMPLEX_PAYLOAD:
      out = real() + "+";
      return out + real() + "j";
    case OPTAPE_WORD_BOOL:
      return aux != 0 ? "True" : "False";
    case OPTAPE_WORD_BOOL_LIST:
      out = "b[";
      for (uint64_t i = 0; i < aux; ++i) {
        out += number();
      }
      return out + "]";
    case OPTAPE_WORD_TEXT:
      return "'" + texts[aux] + "'";
    case OPTAPE_WORD_TEXT_PAYLOAD:
      return "'" + texts[call.payload[pay++]] + "'";
    case OPTAPE_WORD_DTYPE:
      return "dtype" + std::to_string(aux);
    case OPTAPE_WORD_DEVICE:
      return "device" + std::to_string(aux & 255);
    case OPTAPE_WORD_ENUMERATOR:
      return "enum" + std::to_string(aux);
    case OPTAPE_WORD_OPAQUE:
      return "<" + texts[aux] + ">";
    default:
      return "?" + std::to_string(first);
  }
}

// What must hold of every call. A violation is a line that no test expects.
void check(const optape_call& call) {
  const auto broken = [&](const char* what) { line("BROKEN " + operators[call.op] + ": " + what); };
  uint32_t word = 0;
  uint32_t pay = 0;
  while (word < call.word_count) {
    if (value_at(call, word, pay)[0] == '?') {
      return broken("unknown word");
    }
  }
  if (word != call.word_count || pay != call.payload_count) {
    broken("words and payload do not fit");
  }
  if (call.argument_words > call.word_count || call.input_count > call.tensor_count || call.end_ns < call.start_ns) {
    broken("counts or times");
  }
  for (uint32_t i = 0; i < call.tensor_count; ++i) {
    const optape_tensor& t = call.tensors[i];
    const auto* words = reinterpret_cast<const uint64_t*>(t.sizes);
    if (words < call.words || words + t.dim > call.words + call.word_count) {
      broken("sizes point elsewhere");
    }
  }
}

// Inputs are looked at before the kernel: it may free their storages.
void check_storages(const optape_call& call, uint32_t from, uint32_t to) {
  for (uint32_t i = from; i < to; ++i) {
    const optape_tensor& t = call.tensors[i];
    const std::lock_guard<std::mutex> guard(lock);
    if ((t.flags & OPTAPE_TENSOR_ADOPTED) != 0) {
      if (!owned.insert(t.storage_base).second) {
        lines += "BROKEN adopted twice\n";
      }
    } else if ((t.flags & OPTAPE_TENSOR_OWNED) != 0 && owned.count(t.storage_base) == 0) {
      lines += "BROKEN owned and never adopted\n";
    }
  }
}

std::string shown(const optape_call& call) {
  std::string out = operators[call.op];
  if ((call.flags & OPTAPE_CALL_ACCUMULATION) != 0) {
    out += " ACC";
  }
  if ((call.flags & OPTAPE_CALL_NOT_EXECUTED) != 0) {
    out += " NOTEXEC";
  }
  if (with_structure) {
    uint32_t word = 0;
    uint32_t pay = 0;
    while (word < call.word_count) {
      out += (word == call.argument_words ? " -> " : " ");
      out += value_at(call, word, pay);
    }
  }
  return out;
}

void begin(optape_call* call) {
  call->capture[1] = begun;
  check_storages(*call, 0, call->input_count);
}

void end(optape_call* call) {
  if ((plan_flags & OPTAPE_PLAN_BEGIN) != 0 && call->capture[1] != begun) {
    line("BROKEN end without begin");
  }
  call->capture[1] = 0;
  check(*call);
  check_storages(*call, call->input_count, call->tensor_count);
  line(shown(*call));
}

void aborted(optape_call* call) {
  line("abort " + operators[call->op]);
}

void storage_freed(const void* base) {
  const std::lock_guard<std::mutex> guard(lock);
  ++freed;
  if (owned.erase(base) == 0) {
    lines += "BROKEN freed and never adopted\n";
  }
}

std::string count_of(uint32_t tensors) {
  return tensors != 0 ? " " + std::to_string(tensors) : std::string();
}

void module_enter(
    uint64_t, uint32_t module, uint32_t graph_task, uint32_t training, uint32_t, const optape_tensor*, uint32_t tensors) {
  line(
      "> " + std::to_string(module) + (training != 0 ? " train" : " eval") + (graph_task != 0 ? " again" : "") + count_of(tensors));
}

void module_exit(uint64_t, uint32_t module, const optape_tensor*, uint32_t tensors) {
  line("< " + std::to_string(module) + count_of(tensors));
}

void state(uint64_t, uint32_t module, uint32_t attribute, const optape_tensor* tensor) {
  line("state " + std::to_string(module) + " " + std::to_string(attribute) + (tensor != nullptr ? " tensor" : " none"));
}

void identify(const optape_tensor*, uint64_t* ids) {
  ids[0] = ids[1] = 7;
}

void watch(optape_call* call) {
  check(*call);
  check_storages(*call, 0, call->tensor_count);
  line("watch " + std::to_string(static_cast<int64_t>(call->words[call->word_count - 1])));
}

void failed(const char* why) {
  line(std::string("FAILED ") + why);
}

void idle(uint64_t) {}

const optape_capture table = {
    OPTAPE_ABI_VERSION, 0, &is_recording, define_op, text, begin, end, aborted, storage_freed, module_enter, module_exit, state, identify, watch, failed, idle};

}  // namespace

EXPORT const optape_capture* optape_capture_table() {
  return &table;
}

// What the glue calls.

EXPORT int32_t optape_capture_start(const char* json, char*, size_t) {
  line(std::string("start ") + json);
  return 0;
}

EXPORT uint32_t optape_define_module(const char* name, const char* classes, int32_t spiking, const void* const*, size_t count) {
  const std::string all = classes;
  line("module " + std::to_string(modules) + " " + name + " " + all.substr(0, all.find('\n')) + (spiking != 0 ? " spiking" : "") +
       " parameters " + std::to_string(count));
  return modules++;
}

EXPORT void optape_module_parameters(uint32_t module, const void* const*, size_t count) {
  line("parameters of " + std::to_string(module) + ": " + std::to_string(count));
}

EXPORT uint32_t optape_define_watch(int64_t module, const char* what) {
  line("watches " + std::to_string(watches) + " " + what + " of " + std::to_string(module));
  return watches++;
}

EXPORT void optape_watch_keep(uint32_t, uint32_t) {}
EXPORT void optape_watch_switch(int64_t, int32_t) {}

EXPORT void optape_optimizer_enter() {
  line("optimizer begins");
}

EXPORT void optape_optimizer_exit() {
  line("optimizer ends");
}

EXPORT void optape_stage(const char*) {}
EXPORT void optape_step(uint64_t) {}
EXPORT void optape_range_enter(const char*) {}
EXPORT void optape_range_exit() {}
EXPORT void optape_opaque_enter() {}
EXPORT void optape_opaque_exit(const char*, uint64_t, uint64_t) {}
EXPORT void optape_opaque(const char*, uint64_t, uint64_t) {}
EXPORT void optape_pause() {}
EXPORT void optape_resume() {}
EXPORT void optape_fact(int64_t, const char*, const char*) {}

EXPORT uint32_t optape_text(const char* data) {
  return text(data, std::strlen(data));
}

EXPORT uint32_t optape_plan_flags(uint32_t) {
  return plan_flags;
}

EXPORT int32_t optape_recording() {
  return __atomic_load_n(&is_recording, __ATOMIC_RELAXED) != 0 ? 1 : 0;
}

EXPORT void optape_stop() {
  line("stop");
  is_recording = 0;
  if (const char* path = std::getenv("MOCK_LINES")) {
    if (std::FILE* file = std::fopen((std::string(path) + "." + std::to_string(static_cast<long>(getpid()))).c_str(), "w")) {
      std::fwrite(lines.data(), 1, lines.size(), file);
      std::fclose(file);
    }
  }
}

// What tests call.

EXPORT const char* mock_lines() {
  return lines.c_str();
}

EXPORT void mock_clear() {
  const std::lock_guard<std::mutex> guard(lock);
  lines.clear();
}

EXPORT void mock_record(uint32_t on) {
  __atomic_store_n(&is_recording, on, __ATOMIC_RELAXED);
}

EXPORT void mock_show_structure(int32_t on) {
  with_structure = on != 0;
}

EXPORT uint64_t mock_freed() {
  return freed;
}
