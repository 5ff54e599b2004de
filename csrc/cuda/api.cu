// The C functions of mergekit_plus_kernels.h: what a call must be for the kernels to believe it, and which kernel it gets.

#include "calls.cuh"

namespace {

using namespace mkp;

thread_local cudaError_t last_error = cudaSuccess;

int32_t status_of(cudaError_t error) {
  if (error == cudaSuccess) return MKP_OK;
  last_error = error;
  return MKP_FAILED;
}

// Sizes are int inside of kernels, where they are cheap; 1 << 30 leaves room for what is added to them.
bool fits(int64_t size) { return size >= 0 && size < 1 << 30; }
bool known(int32_t dtype) { return dtype == MKP_FLOAT32 || dtype == MKP_FLOAT16 || dtype == MKP_BFLOAT16; }
bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Whether a weight is one that kernels can read, and it as they want it.
bool stored(const mkp_weight& weight, Stored& found) {
  if (!fits(weight.n) || !fits(weight.k) || weight.k == 0 || weight.group_size < 1) return false;
  if (weight.bits < 1 || weight.bits > 8 || !known(weight.scale_dtype)) return false;
  if (!fits(weight.k * weight.bits) || !fits(weight.packed_stride << 7) || !fits(weight.scale_stride)) return false;  // a block has 2^7 rows
  const int64_t group_size = weight.group_size < weight.k ? weight.group_size : weight.k;
  found = {
      reinterpret_cast<const uint32_t*>(weight.packed), weight.scale, reinterpret_cast<const uint32_t*>(weight.zero_point),
      weight.packed_stride, weight.scale_stride,
      static_cast<int>(weight.n), static_cast<int>(weight.k), static_cast<int>((weight.k * weight.bits + 31) / 32),
      static_cast<int>(group_size), static_cast<int>((weight.k + group_size - 1) / group_size), weight.bits, weight.scale_dtype,
  };
  return true;
}

// One group of all inputs may be as long as it likes: as whole units it takes the fast path.
int whole_units(const Stored& weight) { return weight.groups == 1 ? ceil_div(weight.width, kUnit) * kUnit : weight.group_size; }

// The kernel's rows of blocks and slices for a weight; false where it has no kernel.
bool planned(Stored& weight, int64_t m, Split& found) {
  const bool width_known = weight.bits == 2 || weight.bits == 3 || weight.bits == 4 || weight.bits == 8;
  weight.group_size = whole_units(weight);
  if (!width_known || weight.group_size % 8 || m < 1 || m > kMaxTokens || weight.rows == 0) return false;
  if (ceil_div(weight.rows, block_rows(token_tiles(m, weight.group_size))) > kCounters) return false;
  int device = 0, multiprocessors = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return false;
  found = split(m, weight.rows, weight.width, weight.bits, weight.group_size, multiprocessors);
  return true;
}

int64_t workspace_of(const Stored& weight, int64_t m, Split split) {
  return split.splits == 1 ? 0 : 4 * (kCounters + split.splits * m * weight.rows);
}

bool signs_fit(const mkp_signs& signs, const mkp_rows& x, const mkp_rows& y) {
  return fits(signs.rows) && fits(signs.width) && fits(x.m) && x.m == y.m && known(x.dtype) && y.dtype == MKP_FLOAT32;
}

int32_t run_signs(const mkp_signs* s, const int32_t* owner, int64_t adapters, int64_t apart, const mkp_rows* x, const mkp_rows* y, bool transposed,
                  void* stream) {
  if (!signs_fit(*s, *x, *y) || !fits(adapters)) return MKP_UNSUPPORTED;
  if (x->m == 0 || (transposed ? s->width : s->rows) == 0) return MKP_OK;
  const Signs call = {s->bits, s->stride, apart, owner, static_cast<int>(adapters), x->data, static_cast<float*>(y->data), x->stride, y->stride,
                      static_cast<int>(x->m), static_cast<int>(s->rows), static_cast<int>(s->width)};
  return status_of(signs(call, x->dtype, transposed, stream));
}

}  // namespace

extern "C" {

int32_t mkp_cuda_abi(void) { return MKP_ABI; }

const char* mkp_cuda_error(void) { return cudaGetErrorString(last_error); }

int64_t mkp_cuda_capture(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  if (cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id) != cudaSuccess) return -1;
  return status == cudaStreamCaptureStatusActive ? static_cast<int64_t>(id) : -1;
}

int64_t mkp_cuda_workspace(const mkp_weight* weight, int64_t m) {
  Stored found;
  Split split;
  return stored(*weight, found) && planned(found, m, split) ? workspace_of(found, m, split) : -1;
}

int32_t mkp_cuda_linear(const mkp_weight* weight, const mkp_rows* x, const mkp_rows* y, void* workspace, int64_t workspace_bytes, void* stream) {
  Linear call;
  if (!stored(*weight, call.weight) || !planned(call.weight, x->m, call.split) || y->m != x->m) return MKP_UNSUPPORTED;
  if (x->dtype != y->dtype || (x->dtype != MKP_FLOAT16 && x->dtype != MKP_BFLOAT16)) return MKP_UNSUPPORTED;
  if (!aligned(x->data, 16) || x->stride % 8 || x->stride < ceil_div(call.weight.width, 8) * 8) return MKP_UNSUPPORTED;
  if (workspace_bytes < workspace_of(call.weight, x->m, call.split)) return MKP_UNSUPPORTED;
  call.x = static_cast<const uint16_t*>(x->data);
  call.y = static_cast<uint16_t*>(y->data);
  call.x_pitch = x->stride;
  call.y_pitch = y->stride;
  call.tokens = static_cast<int>(x->m);
  call.wide = aligned(call.weight.packed, 16) && call.weight.packed_pitch % 4 == 0;
  call.counters = static_cast<uint32_t*>(workspace);
  call.partial = reinterpret_cast<float*>(call.counters + kCounters);
  const Float kind = x->dtype == MKP_FLOAT16 ? Float::half : Float::bfloat;
  switch (weight->bits) {
    case 2: return status_of(linear_small_m<2>(call, kind, stream));
    case 3: return status_of(linear_small_m<3>(call, kind, stream));
    case 4: return status_of(linear_small_m<4>(call, kind, stream));
    default: return status_of(linear_small_m<8>(call, kind, stream));
  }
}

int32_t mkp_cuda_dequantize(const mkp_weight* weight, const mkp_rows* out, void* stream) {
  Dequantize call;
  if (!stored(*weight, call.weight) || !known(out->dtype) || out->m != weight->n) return MKP_UNSUPPORTED;
  if (weight->n == 0) return MKP_OK;
  const int64_t octet = 8 * (out->dtype == MKP_FLOAT32 ? 4 : 2);
  call.out = out->data;
  call.out_pitch = out->stride;
  call.whole = weight->k % 8 == 0 && out->stride % 8 == 0 && aligned(out->data, octet);
  return status_of(dequantize(call, out->dtype, stream));
}

int32_t mkp_cuda_signs(const mkp_signs* signs, const int32_t* owner, int64_t adapters, int64_t apart, const mkp_rows* x, const mkp_rows* y, void* stream) {
  return run_signs(signs, owner, adapters, apart, x, y, false, stream);
}

int32_t mkp_cuda_signs_transposed(const mkp_signs* signs, const int32_t* owner, int64_t adapters, int64_t apart, const mkp_rows* x, const mkp_rows* y,
                                  void* stream) {
  return run_signs(signs, owner, adapters, apart, x, y, true, stream);
}

}  // extern "C"
