// kernels/device_code.h: which code a card runs, and what is said where there is none.
#include <gtest/gtest.h>

#include "kernels/device_code.h"

namespace spot::kernels {
namespace {

void expect_code(const char* built, int capability, int architecture, bool specific) {
  SCOPED_TRACE(std::string(built) + " on " + std::to_string(capability));
  const DeviceCode code = device_code(built, capability);
  EXPECT_EQ(code.architecture, architecture);
  EXPECT_EQ(code.specific, specific);
}

TEST(DeviceCode, IsTheNewestThatTheCardTakes) {
  for (const int card : {80, 86, 89}) expect_code("80 90a-real", card, 80, false);
  expect_code("80 90a-real", 90, 90, true);
  for (const int card : {100, 103, 120}) expect_code("80 90a-real", card, 80, false);
  expect_code("90a-real", 90, 90, true);
  expect_code("80-virtual", 90, 80, false);
  expect_code("80 89", 86, 80, false);
  expect_code("80 89", 89, 89, false);
  expect_code("80 90", 120, 90, false);
  expect_code("80;90;100f", 103, 100, false);
  expect_code("80;90;100f", 120, 90, false);
}

TEST(DeviceCode, IsNoneWhereNothingFits) {
  for (const int card : {75, 80, 89, 100, 120}) expect_code("90a-real", card, 0, false);
  for (const int card : {70, 75}) expect_code("80 90a-real", card, 0, false);
  expect_code("80-real", 90, 0, false);
  expect_code("86-real", 80, 0, false);
  expect_code("", 90, 0, false);
}

TEST(DeviceRefusal, NamesTheCardTheBuildAndTheRemedy) {
  EXPECT_EQ(device_refusal("80 90a-real", "NVIDIA A100", 80), "");
  EXPECT_EQ(device_refusal("90a-real", "NVIDIA H200", 90), "");
  EXPECT_EQ(
      device_refusal("90a-real", "NVIDIA A100-SXM4-80GB", 80),
      "NVIDIA A100-SXM4-80GB (compute capability 8.0) cannot run this build's CUDA code, which was built with "
      "SPOT_CUDA_ARCHITECTURES=\"90a-real\"; build with -DSPOT_CUDA_ARCHITECTURES=\"80;90a\", which runs on "
      "every card from 8.0 on, or use the CPU");
  EXPECT_EQ(
      device_refusal("80 90a-real", "Tesla T4", 75),
      "Tesla T4 (compute capability 7.5) cannot run this build's CUDA code, which was built with "
      "SPOT_CUDA_ARCHITECTURES=\"80;90a-real\"; cards from compute capability 8.0 on can: use one, or the CPU");
}

}  // namespace
}  // namespace spot::kernels
