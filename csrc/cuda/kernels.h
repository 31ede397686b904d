// The CUDA kernels as the bindings see them: pointers to device memory, sizes, strides in elements, and the stream to
// run on; the device must be current. Nothing waits for the device, no memory is allocated, and the same call gives the
// same bits each run. Failures of a launch are std::runtime_error. Letters: T rows, A slots, G groups, D width.
#pragma once
#include <cstdint>
#include <string>

#include "common/types.h"

namespace dyncore::cuda {

using Stream = void*;  // a cudaStream_t

// Why kernels cannot run on this device; empty where they can. Loads them, so it is to be asked once a device.
std::string unusable(int device);

// Makes a device current while it lives.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = -1;
};

// Plans. Padding slots are written as 0. Each takes a workspace of as many int32 as its _workspace function says.

// More groups than this, or more columns of `mask` or `expert`, no kernel takes.
constexpr int64_t kMostGroups = 1024;

// mask[T][G], bytes, any but 0 true. Slots past the capacity are dropped. sources[a] = t*G + g of slot a, for masks
// that an int32 can index, or null.
int64_t plan_mask_workspace(int64_t num_rows, int64_t groups);
void plan_mask(const uint8_t* mask, int32_t* sources, const PlanBuffers& plan, int32_t* workspace, Stream stream);

// expert[T][k], int32 or (wide) int64; an index outside 0..G-1 means nowhere. sources[a] = t*k + j of slot a.
int64_t plan_route_workspace(int64_t num_rows, int64_t k, int64_t groups);
void plan_route(const void* expert, bool wide, int64_t k, int32_t* sources, const PlanBuffers& plan, int32_t* workspace,
                Stream stream);

// The router: each of num_rows rows of logits [T][G], float, goes to the k groups of its highest logits; NaN ranks
// highest, ties go to the lower group. Weights are the softmax over all groups, or (normalize) over those chosen.
// expert[T][k] in falling order of the logits; scale[a] is the weight of slot a; capacity is T*k.
constexpr int64_t kMostChosen = 32;  // k
int64_t plan_route_topk_workspace(int64_t num_rows, int64_t k, int64_t groups);
void plan_route_topk(const float* logits, int64_t k, bool normalize, int32_t* expert, int32_t* sources, float* scale,
                     const PlanBuffers& plan, int32_t* workspace, Stream stream);

// The k highest of each of `batch` sequences: NaN ranks highest, ties go to the lower index.
void plan_topk(const void* scores, Dtype dtype, int64_t batch, int64_t sequence, int64_t k, const PlanBuffers& plan,
               Stream stream);

// Fills row_offsets and row_slots from rows and offsets; a row outside 0..T-1 is taken for the nearest inside.
int64_t plan_inverse_workspace(int64_t capacity);
void plan_inverse(const PlanBuffers& plan, int32_t* workspace, Stream stream);

// Moving rows. The last dimension's stride is 1.

struct GatherRows {
  Plan plan;
  Matrix x, out;
  int64_t width;
  int element_bytes;
};
void gather_rows(const GatherRows& op, Stream stream);

struct ScatterRows {
  Plan plan;
  Dtype dtype;
  Matrix y, base, out;  // base: [T, D] or absent
  int64_t width;
};
void scatter_rows(const ScatterRows& op, Stream stream);

struct ScatterRowsBackward {
  Plan plan;
  Dtype dtype;
  Matrix grad, y;
  void* dy;       // [A, D] or null
  float* dscale;  // [A] or null
  int64_t width;
};
void scatter_rows_backward(const ScatterRowsBackward& op, Stream stream);

}  // namespace dyncore::cuda
