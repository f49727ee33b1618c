// Statistics of tensors on a GPU: what recorder/src/statistics says of tensors in host memory, by the same definitions.
//
// One launch looks at all operands of an op call that are asked about. Blocks of threads share the elements of one operand (an item), fold
// what they found, and leave it in an area that belongs to the stream. The block that comes last folds the items, and writes
// them to host memory with a word behind that says that they are there. Sums are folded in an order that follows from sizes alone.
//
// Compiled by NVRTC at run time, and by a C++ compiler in tests, with OPTAPE_HOST: there the phases below run as loops
// over threads. Structures are mirrored in kernels.rs.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef short i16;
typedef int i32;
typedef long long i64;

#ifdef OPTAPE_HOST
#define DEVICE static inline
#define APART static
#else
#define DEVICE static __device__ __forceinline__
// Once in the code, however often it is used: inlined everywhere, compiling would take ten times as long.
#define APART static __device__ __noinline__
#endif

enum { THREADS = 256, MOST_ITEMS = 8, MOST_DIMS = 8, MOST_BLOCKS = 512, MOST_JOINT = 1 << 16 };
enum { BINARY = 0, NONZEROS = 1, FULL = 2 };
enum { NO_FACTOR = 0, FACTOR_A = 1, FACTOR_B = 2 };

// One spatial dimension of a convolution.
struct Axis {
  i32 input, kernel, stride, padding, dilation, output, transposed;
  i32 place;  // of one element of the kernel among the joint indices
};

// One operand.
struct Item {
  u64 data;       // address of the first element
  u64 elements;
  i32 dtype;      // c10::ScalarType
  i32 question;
  i32 dims;
  i32 spatial;    // so many of the last dimensions have axes
  i32 first_block;
  i32 blocks;
  i32 factor;
  i32 reserved;
  i64 sizes[MOST_DIMS];    // outermost first
  i64 strides[MOST_DIMS];  // in elements
  i64 places[MOST_DIMS];   // what one step adds to the joint index
  Axis axes[3];
};

// What was found.
struct Tally {
  u64 nonzeros;
  u64 weighted;  // nonzeros, each as often as it feeds an output position
  u64 sum_low;   // integers: 128 bits
  i64 sum_high;
  u64 weighted_low;
  i64 weighted_high;
  double sum;    // floats
  double weighted_sum;
  u64 least;     // keys: see ordered()
  u64 greatest;
  u32 other;     // some element is neither 0 nor 1
  u32 nan;
};

struct Answer {
  Tally items[MOST_ITEMS];
  u64 product;
  u32 done;      // the ticket, once everything else stands here
  u32 reserved;
};

// What a stream's launches share, one after the other.
struct Area {
  Tally partial[MOST_BLOCKS];
  u32 counts[2][MOST_JOINT];  // of nonzeros by joint index, per factor; zero between launches
  u32 arrived;                // blocks; zero between launches
  u32 reserved;
};

struct Job {
  Item items[MOST_ITEMS];
  u64 area;
  u64 answer;
  u32 count;
  u32 blocks;
  u32 ticket;
  u32 joint;  // joint indices of the product; 0: none
  u32 a, b;   // its factors
};

struct Shared {
  Tally tallies[THREADS];
  u32 last;
};

// ---- elements ------------------------------------------------------------------------------------------------------

DEVICE float float_of(u32 bits) {
#ifdef OPTAPE_HOST
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
#else
  return __uint_as_float(bits);
#endif
}

DEVICE double double_of(u64 bits) {
#ifdef OPTAPE_HOST
  double value;
  __builtin_memcpy(&value, &bits, 8);
  return value;
#else
  return __longlong_as_double(static_cast<long long>(bits));
#endif
}

DEVICE u64 bits_of(double value) {
#ifdef OPTAPE_HOST
  u64 bits;
  __builtin_memcpy(&bits, &value, 8);
  return bits;
#else
  return static_cast<u64>(__double_as_longlong(value));
#endif
}

// Half precision by its parts, so that it does not matter what a compiler does to subnormal numbers.
DEVICE double half_of(u16 bits) {
  const u32 exponent = bits >> 10 & 31u;
  const u32 mantissa = bits & 1023u;
  double magnitude;
  if (exponent == 31u) {
    magnitude = double_of(0x7ff0000000000000ull | static_cast<u64>(mantissa) << 42);
  } else if (exponent == 0u) {
    magnitude = static_cast<double>(mantissa) * (1.0 / 16777216.0);
  } else {
    magnitude = double_of(static_cast<u64>(exponent + 1023u - 15u) << 52 | static_cast<u64>(mantissa) << 42);
  }
  return (bits & 0x8000u) != 0 ? -magnitude : magnitude;
}

// Single precision likewise: a conversion instruction may flush subnormal numbers.
DEVICE double single_of(u32 bits) {
  const u32 exponent = bits >> 23 & 255u;
  const u32 mantissa = bits & 0x7fffffu;
  if (exponent != 0u) {
    return static_cast<double>(float_of(bits));
  }
  const double magnitude = static_cast<double>(mantissa) * double_of(static_cast<u64>(1023 - 149) << 52);
  return (bits & 0x80000000u) != 0 ? -magnitude : magnitude;
}

// Keys compare as the values do.
DEVICE u64 ordered(double value) {
  const u64 bits = bits_of(value);
  return (bits >> 63) != 0 ? ~bits : bits | 1ull << 63;
}
DEVICE u64 ordered(i64 value) {
  return static_cast<u64>(value) ^ 1ull << 63;
}
DEVICE u64 ordered(u64 value) {
  return value;
}

DEVICE void range(Tally& t, u64 key) {
  t.least = key < t.least ? key : t.least;
  t.greatest = key > t.greatest ? key : t.greatest;
}

DEVICE void plus(u64& low, i64& high, u64 more_low, i64 more_high) {
  low += more_low;
  high += more_high + (low < more_low ? 1 : 0);
}

// Adds magnitude times weight, or takes it away.
DEVICE void plus_product(u64& low, i64& high, u64 magnitude, bool negative, u32 weight) {
  const u64 lower = (magnitude & 0xffffffffull) * weight;
  const u64 upper = (magnitude >> 32) * weight;
  u64 product_low = lower + (upper << 32);
  i64 product_high = static_cast<i64>(upper >> 32) + (product_low < lower ? 1 : 0);
  if (negative) {
    product_low = ~product_low + 1;
    product_high = ~product_high + (product_low == 0 ? 1 : 0);
  }
  plus(low, high, product_low, product_high);
}

// The value of one element.
struct Value {
  double real;    // floats; of complex numbers the real part
  u64 magnitude;  // integers
  bool negative;
  bool integer;
  bool in_order;  // has a least and a greatest
  u64 key;
};

DEVICE Value float_value(double real, bool in_order) {
  Value v = {};
  v.real = real;
  v.in_order = in_order;
  v.key = ordered(real);
  return v;
}

DEVICE Value integer_value(u64 magnitude, bool negative, u64 key) {
  Value v = {};
  v.magnitude = magnitude;
  v.negative = negative;
  v.integer = true;
  v.in_order = true;
  v.key = key;
  return v;
}

DEVICE void add(Tally& t, const Value& v) {
  if (v.integer) {
    const u64 value = v.negative ? ~v.magnitude + 1 : v.magnitude;
    plus(t.sum_low, t.sum_high, value, v.negative ? -1 : 0);
  } else {
    t.sum += v.real;
  }
  if (!v.in_order) {
    return;
  }
  if (!v.integer && v.real != v.real) {
    t.nan = 1;
  } else {
    range(t, v.key);
  }
}

DEVICE void add_weighted(Tally& t, const Value& v, u32 weight) {
  if (weight == 0) {
    return;
  }
  if (v.integer) {
    plus_product(t.weighted_low, t.weighted_high, v.magnitude, v.negative, weight);
  } else {
    t.weighted_sum += v.real * static_cast<double>(weight);
  }
}

struct F64 {
  typedef u64 raw;
  DEVICE bool nonzero(raw b) { return b << 1 != 0; }
  DEVICE bool other(raw b) { return b << 1 != 0 && b != 0x3ff0000000000000ull; }
  DEVICE double real(raw b) { return double_of(b); }
  DEVICE Value value(raw b) { return float_value(real(b), true); }
};

struct F32 {
  typedef u32 raw;
  DEVICE bool nonzero(raw b) { return b << 1 != 0; }
  DEVICE bool other(raw b) { return b << 1 != 0 && b != 0x3f800000u; }
  DEVICE double real(raw b) { return single_of(b); }
  DEVICE Value value(raw b) { return float_value(real(b), true); }
};

struct F16 {
  typedef u16 raw;
  DEVICE bool nonzero(raw b) { return (b & 0x7fffu) != 0; }
  DEVICE bool other(raw b) { return (b & 0x7fffu) != 0 && b != 0x3c00u; }
  DEVICE double real(raw b) { return half_of(b); }
  DEVICE Value value(raw b) { return float_value(real(b), true); }
};

struct BF16 {
  typedef u16 raw;
  DEVICE bool nonzero(raw b) { return (b & 0x7fffu) != 0; }
  DEVICE bool other(raw b) { return (b & 0x7fffu) != 0 && b != 0x3f80u; }
  DEVICE double real(raw b) { return single_of(static_cast<u32>(b) << 16); }
  DEVICE Value value(raw b) { return float_value(real(b), true); }
};

template <class T>
struct Signed {
  typedef T raw;
  DEVICE bool nonzero(raw v) { return v != 0; }
  DEVICE bool other(raw v) { return v != 0 && v != 1; }
  DEVICE Value value(raw v) {
    const i64 wide = v;
    return integer_value(wide < 0 ? ~static_cast<u64>(wide) + 1 : static_cast<u64>(wide), wide < 0, ordered(wide));
  }
};

template <class T>
struct Unsigned {
  typedef T raw;
  DEVICE bool nonzero(raw v) { return v != 0; }
  DEVICE bool other(raw v) { return v > 1; }
  DEVICE Value value(raw v) { return integer_value(v, false, ordered(static_cast<u64>(v))); }
};

// Any byte but 0 is true.
struct Bool {
  typedef u8 raw;
  DEVICE bool nonzero(raw v) { return v != 0; }
  DEVICE bool other(raw) { return false; }
  DEVICE Value value(raw v) { return Unsigned<u8>::value(v != 0 ? 1 : 0); }
};

template <class P>
struct Pair {
  typename P::raw real, imaginary;
};

template <class P>
struct Complex {
  typedef Pair<P> raw;
  DEVICE bool nonzero(const raw& v) { return P::nonzero(v.real) || P::nonzero(v.imaginary); }
  DEVICE bool other(const raw& v) { return P::other(v.real) || P::nonzero(v.imaginary); }
  DEVICE Value value(const raw& v) { return float_value(P::real(v.real), false); }
};

// ---- one thread's elements -----------------------------------------------------------------------------------------

DEVICE Tally nothing() {
  Tally t = {};
  t.least = ~0ull;
  return t;
}

APART void merge(Tally& into, const Tally& from) {
  into.nonzeros += from.nonzeros;
  into.weighted += from.weighted;
  plus(into.sum_low, into.sum_high, from.sum_low, from.sum_high);
  plus(into.weighted_low, into.weighted_high, from.weighted_low, from.weighted_high);
  into.sum += from.sum;
  into.weighted_sum += from.weighted_sum;
  into.least = from.least < into.least ? from.least : into.least;
  into.greatest = from.greatest > into.greatest ? from.greatest : into.greatest;
  into.other |= from.other;
  into.nan |= from.nan;
}

// Whether position `p` of the input meets an output at element `k` of the kernel.
DEVICE bool meets(const Axis& axis, i32 p, i32 k) {
  if (axis.transposed != 0) {
    const i64 output = static_cast<i64>(p) * axis.stride - axis.padding + static_cast<i64>(k) * axis.dilation;
    return output >= 0 && output < axis.output;
  }
  const i64 through = static_cast<i64>(p) + axis.padding - static_cast<i64>(k) * axis.dilation;
  if (through < 0 || through >= static_cast<i64>(axis.output) * axis.stride) {
    return false;
  }
  return axis.stride == 1 || through % axis.stride == 0;
}

DEVICE u32 fan_out(const Axis& axis, i32 p) {
  u32 count = 0;
  for (i32 k = 0; k < axis.kernel; ++k) {
    count += meets(axis, p, k) ? 1u : 0u;
  }
  return count;
}

DEVICE void count(u32* where) {
#ifdef OPTAPE_HOST
  *where += 1;
#else
  atomicAdd(where, 1u);
#endif
}

// Counts an element of a convolution's input at every element of the kernel that it meets.
DEVICE void count_taps(const Item& item, const i32* position, u32* counts) {
  // Dimensions that are not there are one position and one element of the kernel.
  const i32 n = item.spatial;
  const i32 kernel0 = item.axes[0].kernel;
  const i32 kernel1 = n > 1 ? item.axes[1].kernel : 1;
  const i32 kernel2 = n > 2 ? item.axes[2].kernel : 1;
  for (i32 k0 = 0; k0 < kernel0; ++k0) {
    if (!meets(item.axes[0], position[0], k0)) {
      continue;
    }
    for (i32 k1 = 0; k1 < kernel1; ++k1) {
      if (n > 1 && !meets(item.axes[1], position[1], k1)) {
        continue;
      }
      for (i32 k2 = 0; k2 < kernel2; ++k2) {
        if (n > 2 && !meets(item.axes[2], position[2], k2)) {
          continue;
        }
        count(counts + k0 * item.axes[0].place + k1 * (n > 1 ? item.axes[1].place : 0) + k2 * (n > 2 ? item.axes[2].place : 0));
      }
    }
  }
}

// Where an element is: its distance from the first, its joint index, its place in the spatial dimensions.
template <class Index>
DEVICE void locate(const Item& item, Index rest, i64& offset, u32& joint, i32* position) {
  offset = 0;
  i64 place = 0;
  const i32 spatial = item.dims - item.spatial;
  for (i32 d = item.dims - 1; d >= 0; --d) {
    const Index size = static_cast<Index>(item.sizes[d]);
    const Index index = d == 0 ? rest : rest % size;
    rest = d == 0 ? 0 : rest / size;
    offset += static_cast<i64>(index) * item.strides[d];
    place += static_cast<i64>(index) * item.places[d];
    if (d >= spatial) {
      position[d - spatial] = static_cast<i32>(index);
    }
  }
  joint = static_cast<u32>(place);
}

#define FOR_DTYPE(dtype, call)                    \
  switch (dtype) {                                \
    case 0: call(Unsigned<u8>);                   \
    case 1: call(Signed<i8>);                     \
    case 2: call(Signed<i16>);                    \
    case 3: call(Signed<i32>);                    \
    case 4: call(Signed<i64>);                    \
    case 5: call(F16);                            \
    case 6: call(F32);                            \
    case 7: call(F64);                            \
    case 8: call(Complex<F16>);                   \
    case 9: call(Complex<F32>);                   \
    case 10: call(Complex<F64>);                  \
    case 11: call(Bool);                          \
    case 15: call(BF16);                          \
    case 27: call(Unsigned<u16>);                 \
    case 28: call(Unsigned<u32>);                 \
    case 29: call(Unsigned<u64>);                 \
    default: break;                               \
  }

// What one element says about itself.
struct Found {
  bool nonzero;
  bool other;
};

template <class E>
DEVICE Found decode_as(u64 first, i64 offset, Value* value) {
  const typename E::raw raw = reinterpret_cast<const typename E::raw*>(first)[offset];
  if (value != nullptr) {
    *value = E::value(raw);
  }
  return Found{E::nonzero(raw), E::other(raw)};
}

APART Found decode(i32 dtype, u64 first, i64 offset, Value* value) {
#define CALL(E) return decode_as<E>(first, offset, value)
  FOR_DTYPE(dtype, CALL)
#undef CALL
  return Found{true, true};
}

DEVICE bool begins_with_other(const Item& item) {
  return decode(item.dtype, item.data, 0, nullptr).other;
}

// Elements at one distance, that nothing but themselves is asked of.
template <class E>
APART void scan(const Item& item, u32 block, u32 thread, Tally& t) {
  typedef typename E::raw Raw;
  const Raw* data = reinterpret_cast<const Raw*>(item.data);
  const u64 step = static_cast<u64>(item.blocks) * THREADS;
  const i64 stride = item.dims == 0 ? 0 : item.strides[0];
  const bool full = item.question == FULL;
  const bool stop = item.question == BINARY;
  u64 nonzeros = 0;
  bool other = false;
#ifndef OPTAPE_HOST
#pragma unroll 1
#endif
  for (u64 i = static_cast<u64>(block) * THREADS + thread; i < item.elements; i += step) {
    const Raw raw = data[static_cast<i64>(i) * stride];
    nonzeros += E::nonzero(raw) ? 1 : 0;
    other |= E::other(raw);
    if (stop && other) {
      break;
    }
    if (full) {
      add(t, E::value(raw));
    }
  }
  t.nonzeros = nonzeros;
  t.other = other ? 1 : 0;
}

// Elements anywhere, with their weights and joint indices.
APART void walk(const Item& item, u32 block, u32 thread, u32* counts, Tally& t) {
  const u64 step = static_cast<u64>(item.blocks) * THREADS;
  const bool full = item.question == FULL;
#ifndef OPTAPE_HOST
#pragma unroll 1
#endif
  for (u64 i = static_cast<u64>(block) * THREADS + thread; i < item.elements; i += step) {
    i64 offset;
    u32 joint;
    i32 position[3] = {0, 0, 0};
    if (item.elements <= 0xffffffffull) {
      locate<u32>(item, static_cast<u32>(i), offset, joint, position);
    } else {
      locate<u64>(item, i, offset, joint, position);
    }
    Value value;
    const Found found = decode(item.dtype, item.data, offset, full ? &value : nullptr);
    t.nonzeros += found.nonzero ? 1 : 0;
    t.other |= found.other ? 1u : 0u;
    if (item.question == BINARY && t.other != 0) {
      return;
    }
    u32 weight = 0;
    if (found.nonzero && item.spatial > 0) {
      weight = 1;
      for (i32 d = 0; d < item.spatial; ++d) {
        weight *= fan_out(item.axes[d], position[d]);
      }
      t.weighted += weight;
    }
    if (full) {
      add(t, value);
      add_weighted(t, value, weight);
    }
    if (found.nonzero && counts != nullptr) {
      if (item.spatial > 0) {
        count_taps(item, position, counts + joint);
      } else {
        count(counts + joint);
      }
    }
  }
}

DEVICE Tally look_at(const Item& item, u32 block, u32 thread, u32* counts) {
  Tally t = nothing();
  if (item.question == BINARY && begins_with_other(item)) {
    t.other = 1;
  } else if (item.dims > 1 || item.spatial > 0 || counts != nullptr) {
    walk(item, block, thread, counts, t);
  } else {
#define CALL(E) scan<E>(item, block, thread, t); break
    FOR_DTYPE(item.dtype, CALL)
#undef CALL
  }
  return t;
}

// ---- phases: between two of them all threads of a block meet ---------------------------------------------------------

DEVICE Area* area_of(const Job& job) {
  return reinterpret_cast<Area*>(job.area);
}

DEVICE bool has_product(const Job& job) {
  return job.joint != 0 && !begins_with_other(job.items[job.a]) && !begins_with_other(job.items[job.b]);
}

DEVICE void gather(const Job& job, Shared& shared, u32 block, u32 thread) {
  u32 at = 0;
  while (at + 1 < job.count && block >= static_cast<u32>(job.items[at + 1].first_block)) {
    ++at;
  }
  const Item& item = job.items[at];
  u32* counts = nullptr;
  if (item.factor != NO_FACTOR && has_product(job)) {
    counts = area_of(job)->counts[item.factor - 1];
  }
  shared.tallies[thread] = look_at(item, block - item.first_block, thread, counts);
}

DEVICE void fold(Shared& shared, u32 thread, u32 distance) {
  if (thread < distance) {
    merge(shared.tallies[thread], shared.tallies[thread + distance]);
  }
}

// One thread: leaves the block's tally, and says whether all others have left theirs.
DEVICE u32 publish(const Job& job, Shared& shared, u32 block) {
  Area* area = area_of(job);
  area->partial[block] = shared.tallies[0];
#ifdef OPTAPE_HOST
  const u32 before = area->arrived++;
#else
  __threadfence();
  const u32 before = atomicAdd(&area->arrived, 1u);
  __threadfence();
#endif
  return before + 1 == job.blocks ? 1u : 0u;
}

// The last block: threads take the blocks' tallies of one item.
DEVICE void collect(const Job& job, Shared& shared, const Item& item, u32 thread) {
  Tally t = nothing();
  const Area* area = area_of(job);
  for (u32 block = thread; block < static_cast<u32>(item.blocks); block += THREADS) {
    // Other blocks wrote it: past the cache of this multiprocessor.
    Tally found;
    const volatile u64* from = reinterpret_cast<const volatile u64*>(&area->partial[item.first_block + block]);
    u64* to = reinterpret_cast<u64*>(&found);
    for (u32 w = 0; w < sizeof(Tally) / sizeof(u64); ++w) {
      to[w] = from[w];
    }
    merge(t, found);
  }
  shared.tallies[thread] = t;
}

// One thread: an item is complete.
DEVICE void deliver(const Job& job, Shared& shared, u32 at) {
  reinterpret_cast<Answer*>(job.answer)->items[at] = shared.tallies[0];
}

// The product's sum, each thread a part of it. Leaves zeros.
DEVICE void multiply(const Job& job, Shared& shared, u32 thread) {
  Tally t = nothing();
  Area* area = area_of(job);
  for (u32 k = thread; k < job.joint; k += THREADS) {
    volatile u32* a = &area->counts[0][k];
    volatile u32* b = &area->counts[1][k];
    t.nonzeros += static_cast<u64>(*a) * *b;
    *a = 0;
    *b = 0;
  }
  shared.tallies[thread] = t;
}

// One thread: the answer is complete, and the area free for the stream's next launch.
DEVICE void finish(const Job& job, Shared& shared) {
  Answer* answer = reinterpret_cast<Answer*>(job.answer);
  if (job.joint != 0) {
    answer->product = shared.tallies[0].nonzeros;
  }
  area_of(job)->arrived = 0;
#ifndef OPTAPE_HOST
  __threadfence_system();
#endif
  *const_cast<volatile u32*>(&answer->done) = job.ticket;
}

#ifndef OPTAPE_HOST
APART void fold_all(Shared& shared, u32 thread) {
  __syncthreads();
  for (u32 distance = THREADS / 2; distance > 0; distance >>= 1) {
    fold(shared, thread, distance);
    __syncthreads();
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) optape_statistics(const __grid_constant__ Job job) {
  __shared__ Shared shared;
  const u32 thread = threadIdx.x;
  gather(job, shared, blockIdx.x, thread);
  fold_all(shared, thread);
  if (thread == 0) {
    shared.last = publish(job, shared, blockIdx.x);
  }
  __syncthreads();
  if (shared.last == 0) {
    return;
  }
  for (u32 at = 0; at < job.count; ++at) {
    collect(job, shared, job.items[at], thread);
    fold_all(shared, thread);
    if (thread == 0) {
      deliver(job, shared, at);
    }
    __syncthreads();
  }
  if (job.joint != 0) {
    multiply(job, shared, thread);
    fold_all(shared, thread);
  }
  if (thread == 0) {
    finish(job, shared);
  }
}
#endif
