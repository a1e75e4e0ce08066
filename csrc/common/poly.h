// Polynomials shared by the CPU and CUDA kernels, lowest order first; fitted and checked by tools/fit_polynomials.py.
// kernels/triton/noise.py holds the same numbers, and tests/triton/test_interpreter.py compares them.
#pragma once

namespace genfast {
namespace poly {

// e^r = 1 + r + r^2 P(r) for |r| <= ln(2) / 2; relative error 6.6e-8 in float32.
constexpr float kExp[] = {0.5f, 0.166665182f, 0.041666206f, 0.00836888235f, 0.00139504764f};
// log(1 + s) = s - s^2 / 2 + s^3 Q(s) for sqrt(1/2) <= 1 + s <= sqrt(2); 7.5e-8.
constexpr float kLog1p[] = {0.333333105f,  -0.249999866f, 0.200022265f,  -0.16669251f, 0.142186582f,
                            -0.123843484f, 0.118729763f,  -0.117898077f, 0.0691536814f};
// sin(2 pi t) = t S(t^2) for |t| <= 1/8 turn; 1.3e-7.
constexpr float kSin[] = {6.28318548f, -41.3416634f, 81.5925522f, -75.4020691f};
// cos(2 pi t) = 1 + t^2 C(t^2) for |t| <= 1/8 turn; 9.9e-8.
constexpr float kCos[] = {-19.7392082f, 64.9393234f, -85.4437408f, 59.2459602f};
// e^x - 1 - x = x^2 G(x) for |x| <= 1; 1.7e-7.
constexpr float kExpm1MinusX[] = {0.5f,           0.166666672f,    0.0416666679f,   0.00833334494f,
                                  0.0013888859f,  0.000198370486f, 2.48043689e-05f, 2.81230018e-06f,
                                  2.77125224e-07f};
// Mills ratio of the standard normal, P(X > a) / density(a) = (z + 1/2) M(z) with z + 1/2 = 4 / (a + 4), for a >= 0;
// 2.3e-7.
constexpr float kMills[] = {0.473304749f, 0.761885107f,  0.970410824f,  0.935109138f,  0.605533481f,
                            0.150582299f, -0.139263108f, -0.125019744f, 0.0204089116f, 0.0495938286f};

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
// ln(2) in two parts; the first has trailing zero bits, so that n * kLn2High is exact for |n| < 2^11.
constexpr float kLn2High = 0.693359375f;
constexpr float kLn2Low = -2.12194440e-4f;

}  // namespace poly
}  // namespace genfast
