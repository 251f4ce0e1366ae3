// SPDX-License-Identifier: Apache-2.0
// Byte layout of a page as compile-time constants. vllm_oscar/core/format.py is the
// source of truth and documents the element order; tests compare the two.
#pragma once

#include "oscar/step.h"

namespace oscar {

template <int HeadDim_, int KeyBits_, int KeyGroup_, int ValueGroup_, bool Fp8Params_, bool HasNorm_,
          bool ExactFirstKey_>
struct PageLayout {
  static constexpr int kHeadDim = HeadDim_;
  static constexpr int kKeyBits = KeyBits_;
  static constexpr int kKeyGroup = KeyGroup_;
  static constexpr int kValueGroup = ValueGroup_ < HeadDim_ ? ValueGroup_ : HeadDim_;
  static constexpr bool kFp8Params = Fp8Params_;
  static constexpr bool kHasNorm = HasNorm_;
  static constexpr bool kExactFirstKey = ExactFirstKey_;

  static constexpr int kTiles = kHeadDim / 16;  // 16-channel tiles of a token
  static constexpr int kChunks = kTiles / 4;    // 16-byte loads of a lane per 32 tokens
  static constexpr int kKeyGroups = kPageTokens / kKeyGroup;
  static constexpr int kValueGroups = kHeadDim / kValueGroup;
  static constexpr int kParamBytes = kFp8Params ? 1 : 2;

  // Bytes of the 2-bit codes of one 32-token block, and of the high plane per word group:
  // 4-bit keys have one high word per block, 3-bit keys one per two blocks.
  static constexpr int kBlockCodeBytes = 32 * kHeadDim / 4;
  static constexpr int kKeyGroupBytes = 2 * kHeadDim * kParamBytes;

  static constexpr int kKeyCodes = 0;
  static constexpr int kKeyHigh = kKeyCodes + 4 * kBlockCodeBytes;
  static constexpr int kValueCodes = kKeyHigh + kPageTokens * kHeadDim * (kKeyBits - 2) / 8;
  static constexpr int kKeyParams = kValueCodes + 4 * kBlockCodeBytes;
  static constexpr int kFirstKey = kKeyParams + kKeyGroupBytes;
  static constexpr int kValueScale = kKeyParams + kKeyGroups * kKeyGroupBytes;
  static constexpr int kValueZero = kValueScale + kPageTokens * kValueGroups * 2;
  static constexpr int kNorms = kValueZero + kPageTokens * kValueGroups * 2;
  static constexpr int kEnd = kNorms + (kHasNorm ? kPageTokens * 2 : 0);
  static constexpr int kPageBytes = (kEnd + kPageTokens - 1) / kPageTokens * kPageTokens;

  // The ring holds 16-bit tokens as [token][key, value][channel] in pages of the same size.
  static constexpr int kRingTokenBytes = 2 * kHeadDim * 2;
  static constexpr int kRingTokens = kPageBytes / kRingTokenBytes;

  static_assert(kHeadDim % 64 == 0, "a lane loads whole chunks of four 16-channel tiles");
  static_assert(kRingTokens <= 32, "one warp step handles one ring page");
  static_assert(!kExactFirstKey || kKeyGroups > 1, "the exact first key lives in key group 1");
};

}  // namespace oscar
