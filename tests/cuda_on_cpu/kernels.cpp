// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels as CPU functions with the arguments of csrc/include/oscar/abi.h.
#include "oscar/combine.cuh"
#include "oscar/decode.cuh"
#include "oscar/presets.cuh"
#include "oscar/store.cuh"

namespace {

constexpr int kBlocks = 3, kWarps = 2, kCombine = 2;  // of the emulated device
int taken = 0;  // pages that warps took from others in the last launch

template <class Layout, int NTiles>
void attend(const OscarAttentionArgs& args) {
  using namespace oscar;
  const int rows = args.max_query_len * args.group;
  AttentionParams p{args};
  p.row_blocks = (rows + 8 * NTiles - 1) / (8 * NTiles);
  p.slot_rows = std::min(rows, 8 * NTiles);
  const int segments = args.requests * args.kv_heads * p.row_blocks;
  const size_t slots = 2 * segments + kBlocks * kWarps;
  const float poison = NAN;
  std::vector<int2> ranges(2 * segments, int2{1 << 30, 1 << 30});
  std::vector<float2> max_sum(slots * p.slot_rows, float2{poison, poison});
  std::vector<float> partial(slots * p.slot_rows * Layout::kHeadDim, poison);
  p.warps = kBlocks * kWarps;
  p.few_warps = kBlocks;
  p.claims = args.counters;
  p.ranges = ranges.data();
  p.max_sum = max_sum.data();
  p.partial = partial.data();
  static_assert(kWarps * sizeof(WarpShared<Layout>) <= sizeof(raw));
  std::memset(raw, 0xff, sizeof(raw));
  emulator::launch({kBlocks}, 32 * kWarps, [&] { decode_kernel<Layout, NTiles>(p); });
  taken = 0;
  for (int i = 0; i < p.warps; ++i) taken += p.claims[i] / kStolen;
  std::memset(raw, 0xff, sizeof(raw));
  emulator::launch({static_cast<unsigned>(segments), static_cast<unsigned>(p.slot_rows), 2}, 32 * kCombine,
                   [&] { combine_kernel<Layout::kHeadDim>(p, Tiling{8 * NTiles, Layout::kRingTokens}); });
}

template <class Visitor>
int visit(const OscarFormat& format, Visitor&& visitor) {
  return format.head_dim == 64 ? oscar::visit_layout<64>(format, visitor)
                               : format.head_dim == 128 ? oscar::visit_layout<128>(format, visitor)
                                                        : OSCAR_UNSUPPORTED_FORMAT;
}

}  // namespace

extern "C" int emulate_attention(const OscarAttentionArgs* args) {
  return visit(args->format, [&](auto layout) {
    if (args->max_query_len * args->group > 8) attend<decltype(layout), 2>(*args);
    else attend<decltype(layout), 1>(*args);
    return 0;
  });
}

extern "C" int emulate_store_pages(const OscarStoreArgs* args) {
  return visit(args->format, [&](auto layout) {
    static_assert(sizeof(oscar::StoreShared<decltype(layout)>) <= sizeof(oscar::raw));
    const unsigned blocks = (args->max_query_len + 254) / 128;
    emulator::launch({static_cast<unsigned>(args->kv_heads), blocks, static_cast<unsigned>(args->requests)},
                     oscar::kStoreThreads, [&] { oscar::store_kernel<decltype(layout)>(*args); });
    return 0;
  });
}

extern "C" int emulate_write_ring(const OscarStoreArgs* args) {
  return visit(args->format, [&](auto layout) {
    emulator::launch({2, static_cast<unsigned>(args->requests)}, oscar::kStoreThreads,
                     [&] { oscar::write_ring_kernel(*args, decltype(layout)::kRingTokens); });
    return 0;
  });
}

extern "C" int emulated_thefts() { return taken; }
