// SPDX-License-Identifier: Apache-2.0
// The page layouts that get compiled: the presets of vllm_oscar/core/config.py. Any other
// combination that PageLayout accepts needs one more line here.
#pragma once

#include "oscar/launch.h"
#include "oscar/layout.cuh"

namespace oscar {

template <int HeadDim>
struct Presets {
  using Default = PageLayout<HeadDim, 3, 2, 64, 256, true, true, true, true>;
  using Small = PageLayout<HeadDim, 2, 2, 32, 256, true, true, true, true>;
  using Large = PageLayout<HeadDim, 3, 3, 64, 256, true, true, true, true>;
  using FourBit = PageLayout<HeadDim, 4, 4, 64, 256, true, true, true, true>;
  using Paper = PageLayout<HeadDim, 2, 2, 32, 32, false, true, false, false>;
};

// Whether `f` is this layout, in kind and in every offset.
template <class Layout>
bool matches(const OscarFormat& f) {
  const int value_group = f.value_group < f.head_dim ? f.value_group : f.head_dim;
  return f.version == OSCAR_FORMAT_VERSION && f.head_dim == Layout::kHeadDim && f.key_bits == Layout::kKeyBits &&
         f.value_bits == Layout::kValueBits && f.key_group == Layout::kKeyGroup && value_group == Layout::kValueGroup &&
         f.key_param_bytes == Layout::kParamBytes && (f.norm != OSCAR_NORM_NONE) == Layout::kHasNorm &&
         (f.first_token != 0) == Layout::kFirstToken && (f.int8_ring != 0) == Layout::kInt8Ring &&
         f.k_codes == Layout::kKeyCodes && f.k_high == Layout::kKeyHigh && f.v_codes == Layout::kValueCodes &&
         f.v_high == Layout::kValueHigh && f.k_params == Layout::kKeyParams && f.v_scale == Layout::kValueScale &&
         f.v_zero == Layout::kValueZero && f.norms == Layout::kNorms && f.first_key == Layout::kFirstKey &&
         f.first_value == Layout::kFirstValue && f.page_bytes == Layout::kPageBytes &&
         f.ring_tokens == Layout::kRingTokens;
}

// visit(Layout{}) for the layout of this head size that `format` names.
template <int HeadDim, class Visitor>
int visit_layout(const OscarFormat& format, Visitor&& visit) {
  using P = Presets<HeadDim>;
  if (matches<typename P::Default>(format)) return visit(typename P::Default{});
#ifndef OSCAR_DEFAULT_PRESET_ONLY  // quick builds while developing
  if (matches<typename P::Small>(format)) return visit(typename P::Small{});
  if (matches<typename P::Large>(format)) return visit(typename P::Large{});
  if (matches<typename P::FourBit>(format)) return visit(typename P::FourBit{});
  if (matches<typename P::Paper>(format)) return visit(typename P::Paper{});
#endif
  return OSCAR_UNSUPPORTED_FORMAT;
}

// The same for every head size.
template <class Visitor>
int visit_layout(const OscarFormat& format, Visitor&& visit) {
  switch (format.head_dim) {
    case 64: return visit_layout<64>(format, visit);
    case 128: return visit_layout<128>(format, visit);
    case 256: return visit_layout<256>(format, visit);
    default: return OSCAR_UNSUPPORTED_FORMAT;
  }
}

}  // namespace oscar
