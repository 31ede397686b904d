// Activations on vectors: value, and value with derivative. Branch-free; NaN and infinity propagate.
#pragma once
#include "cpu/common/vec.h"
#include "cpu/kernels.h"

namespace dyncore::DYNCORE_ISA {

// e^x with relative error below 2e-7 over all of float: subnormal below -87.3, 0 below -104, infinity above 88.72.
DYNCORE_INLINE vf exp(vf x) {
  constexpr float kLog2e = 1.44269504088896341f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low mantissa bits
  const vf high = splat(89.0f), low = splat(-105.0f);
  const vf clamped = x > high ? high : (x < low ? low : x);
  const vf shifted = clamped * kLog2e + kRound;
  const vf n = shifted - kRound;
  const vf r = (clamped - n * kLn2High) - n * kLn2Low;
  // Taylor series: on |r| <= ln(2)/2 the first term left out is below 1e-8.
  vf p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n by two factors, since neither 2^128 nor anything below 2^-126 is one: the second rounds or overflows.
  const vi exponent = (vi)shifted - (vi)splat(kRound), half = exponent >> 1;
  return p * (vf)((half + 127) << 23) * (vf)((exponent - half + 127) << 23);
}

DYNCORE_INLINE vf sigmoid(vf x) {
  return 1.0f / (1.0f + exp(-x));
}

struct ValueAndDerivative {
  vf value, derivative;
};

template <Activation A>
DYNCORE_INLINE ValueAndDerivative evaluate(vf h);

template <>
DYNCORE_INLINE ValueAndDerivative evaluate<Activation::none>(vf h) {
  return {h, splat(1.0f)};
}

template <>
DYNCORE_INLINE ValueAndDerivative evaluate<Activation::relu>(vf h) {
  return {h < 0.0f ? vf{} : h, h <= 0.0f ? vf{} : splat(1.0f)};
}

template <>
DYNCORE_INLINE ValueAndDerivative evaluate<Activation::relu2>(vf h) {
  const vf positive = h < 0.0f ? vf{} : h;
  return {positive * positive, 2.0f * positive};
}

template <>
DYNCORE_INLINE ValueAndDerivative evaluate<Activation::gelu>(vf h) {
  // Phi(-|h|) = t P(t) exp(-h^2/2) with t = 1/(1 + 0.3|h|); P fitted here to relative error 1.5e-7 on [0, 14].
  const vf magnitude = h < 0.0f ? -h : h;
  const vf t = 1.0f / (1.0f + 0.3f * magnitude);
  vf p = t * 3.567523521e-02f - 1.572049669e-01f;
  p = p * t + 2.063566953e-01f;
  p = p * t - 5.368653168e-02f;
  p = p * t + 1.285631317e-01f;
  p = p * t + 9.991304211e-02f;
  p = p * t + 1.207540273e-01f;
  p = p * t + 1.196292942e-01f;
  const vf e = exp(-0.5f * h * h);
  const vf tail = p * t * e;
  const vf cdf = h < 0.0f ? tail : 1.0f - tail;
  return {h * cdf, cdf + h * e * 0.398942280401432678f};
}

template <>
DYNCORE_INLINE ValueAndDerivative evaluate<Activation::gelu_tanh>(vf h) {
  // 0.5 (1 + tanh z) = sigmoid(2z)
  constexpr float kTwoRoot = 1.59576912160573071f;  // 2 sqrt(2/pi)
  const vf square = h * h;
  const vf s = sigmoid(kTwoRoot * h * (1.0f + 0.044715f * square));
  return {h * s, s + h * s * (1.0f - s) * (kTwoRoot * (1.0f + 3.0f * 0.044715f * square))};
}

template <>
DYNCORE_INLINE ValueAndDerivative evaluate<Activation::silu>(vf h) {
  const vf s = sigmoid(h);
  return {h * s, s * (1.0f + h * (1.0f - s))};
}

// Calls f(constant) with the elementwise activation (the gate's, for a gated one) as a template argument.
template <Activation A>
struct ActivationConstant {
  static constexpr Activation value = A;
};

template <class F>
DYNCORE_INLINE void with_activation(Activation a, F f) {
  switch (a) {
    case Activation::none:
      return f(ActivationConstant<Activation::none>{});
    case Activation::relu:
    case Activation::reglu:
      return f(ActivationConstant<Activation::relu>{});
    case Activation::relu2:
      return f(ActivationConstant<Activation::relu2>{});
    case Activation::gelu:
    case Activation::geglu:
      return f(ActivationConstant<Activation::gelu>{});
    case Activation::gelu_tanh:
      return f(ActivationConstant<Activation::gelu_tanh>{});
    case Activation::silu:
    case Activation::swiglu:
      return f(ActivationConstant<Activation::silu>{});
  }
}

}  // namespace dyncore::DYNCORE_ISA
