// SPDX-License-Identifier: Apache-2.0
// Byte layout of a page as compile-time constants. vllm_oscar/core/format.py is the
// source of truth and documents the element order; tests compare the two.
#pragma once

#include "oscar/step.h"

namespace oscar {

template <int HeadDim_, int KeyBits_, int ValueBits_, int KeyGroup_, int ValueGroup_, bool Fp8Params_, bool HasNorm_,
          bool FirstToken_, bool Int8Ring_>
struct PageLayout {
  static constexpr int kHeadDim = HeadDim_;
  static constexpr int kKeyBits = KeyBits_;
  static constexpr int kValueBits = ValueBits_;
  static constexpr int kKeyGroup = KeyGroup_;
  static constexpr int kValueGroup = ValueGroup_ < HeadDim_ ? ValueGroup_ : HeadDim_;
  static constexpr bool kFp8Params = Fp8Params_;
  static constexpr bool kHasNorm = HasNorm_;
  static constexpr bool kFirstToken = FirstToken_;
  static constexpr bool kInt8Ring = Int8Ring_;

  static constexpr int kTiles = kHeadDim / 16;  // 16-channel tiles of a token
  static constexpr int kChunks = kTiles / 4;    // 16-byte loads of a lane per 32 tokens
  static constexpr int kKeyGroups = kPageTokens / kKeyGroup;
  static constexpr int kValueGroups = kHeadDim / kValueGroup;
  static constexpr int kParamBytes = kFp8Params ? 1 : 2;

  // Bytes of a 2-bit plane for one 32-token block. High planes of 4-bit codes are alike; those of
  // 3-bit codes have one such block for two.
  static constexpr int kBlockCodeBytes = 32 * kHeadDim / 4;
  static constexpr int kKeyGroupBytes = 2 * kHeadDim * kParamBytes;

  static constexpr int kKeyCodes = 0;
  static constexpr int kKeyHigh = kKeyCodes + 4 * kBlockCodeBytes;
  static constexpr int kValueCodes = kKeyHigh + kPageTokens * kHeadDim * (kKeyBits - 2) / 8;
  static constexpr int kValueHigh = kValueCodes + 4 * kBlockCodeBytes;
  static constexpr int kKeyParams = kValueHigh + kPageTokens * kHeadDim * (kValueBits - 2) / 8;
  static constexpr int kFirstKey = kKeyParams + kKeyGroupBytes;  // where kFirstToken
  static constexpr int kFirstValue = kFirstKey + kHeadDim;
  static constexpr int kValueScale = kKeyParams + kKeyGroups * kKeyGroupBytes;
  static constexpr int kValueZero = kValueScale + kPageTokens * kValueGroups * 2;
  static constexpr int kNorms = kValueZero + kPageTokens * kValueGroups * 2;
  static constexpr int kEnd = kNorms + (kHasNorm ? kPageTokens * 2 : 0);
  static constexpr int kPageBytes = (kEnd + kPageTokens - 1) / kPageTokens * kPageTokens;

  // The ring has pages of the same size: [token][key, value][channel] in 16 bit, or in int8
  // with [token][key, value] fp16 scales behind (core/ring.py).
  static constexpr int kRingRowBytes = kHeadDim * (kInt8Ring ? 1 : 2);  // of a token's key or value
  static constexpr int kRingScaleBytes = kInt8Ring ? 4 : 0;             // of both
  static constexpr int kRingTokens = kPageBytes / (2 * kRingRowBytes + kRingScaleBytes);
  static constexpr int kRingScales = kRingTokens * 2 * kRingRowBytes;

  static_assert(kHeadDim % 64 == 0, "a lane loads whole chunks of four 16-channel tiles");
  static_assert(!kFirstToken || kKeyGroups > 1, "the first token lives in key group 1");
};

}  // namespace oscar
