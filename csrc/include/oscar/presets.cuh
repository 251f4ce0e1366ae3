// SPDX-License-Identifier: Apache-2.0
// The page layouts that get compiled: the presets of vllm_oscar/core/config.py. Any other
// combination that PageLayout accepts needs one more line here.
#pragma once

#include "oscar/abi.h"
#include "oscar/layout.cuh"

namespace oscar {

template <int HeadDim>
struct Presets {
  using Default = PageLayout<HeadDim, 3, 64, 256, true, true, true>;
  using Small = PageLayout<HeadDim, 2, 32, 256, true, true, true>;
  using Large = PageLayout<HeadDim, 4, 64, 256, true, true, true>;
  using Paper = PageLayout<HeadDim, 2, 32, 32, false, true, false>;
};

template <class Layout>
bool matches(const OscarFormat& f) {
  const int value_group = f.value_group < f.head_dim ? f.value_group : f.head_dim;
  return f.head_dim == Layout::kHeadDim && f.key_bits == Layout::kKeyBits && f.key_group == Layout::kKeyGroup &&
         value_group == Layout::kValueGroup && (f.fp8_params != 0) == Layout::kFp8Params &&
         (f.norm != 0) == Layout::kHasNorm && (f.exact_first_key != 0) == Layout::kExactFirstKey;
}

// visit(Layout{}) for the layout that `format` names.
template <int HeadDim, class Visitor>
int visit_layout(const OscarFormat& format, Visitor&& visit) {
  using P = Presets<HeadDim>;
  if (matches<typename P::Default>(format)) return visit(typename P::Default{});
#ifndef OSCAR_DEFAULT_PRESET_ONLY  // quick builds while developing
  if (matches<typename P::Small>(format)) return visit(typename P::Small{});
  if (matches<typename P::Large>(format)) return visit(typename P::Large{});
  if (matches<typename P::Paper>(format)) return visit(typename P::Paper{});
#endif
  return OSCAR_UNSUPPORTED_FORMAT;
}

}  // namespace oscar
