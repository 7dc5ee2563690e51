// Runs a plan from a file on threads that sanitizers can follow, and compares what comes out. Written for test_sanitizers.py.

#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <thread>

#include "native.cpp"

namespace {

thread_local int index_here = 0, count_here = 1;

void start(void (*work)(void *), void *data, unsigned count, unsigned) {
  std::vector<std::thread> others;
  const auto run = [=](int index) {
    index_here = index;
    count_here = static_cast<int>(count);
    work(data);
  };
  for (unsigned i = 1; i < count; ++i) others.emplace_back(run, static_cast<int>(i));
  run(0);
  for (auto &thread : others) thread.join();
}

template <typename T>
std::vector<T> take(const char *&from, int64_t count) {
  std::vector<T> result(count);
  std::memcpy(result.data(), from, count * sizeof(T));
  from += count * sizeof(T);
  return result;
}

}  // namespace

int main(int, char **arguments) {
  std::ifstream file(arguments[1], std::ios::binary);
  const std::vector<char> content((std::istreambuf_iterator<char>(file)), {});
  const char *at = content.data();
  const auto head = take<int64_t>(at, 9);  // steps, floats, split, images, threads, bytes of tables, pointers a step, inputs, outputs
  auto steps = take<Step>(at, head[0]);
  const auto places = take<int64_t>(at, head[6]);  // of the pointers in a step
  const auto tables = take<char>(at, head[5]);
  for (auto &step : steps)
    for (const int64_t place : places) {  // from 1 + distance to address
      int64_t distance;
      char *field = reinterpret_cast<char *>(&step) + place;
      std::memcpy(&distance, field, 8);
      const char *address = distance ? tables.data() + distance - 1 : nullptr;
      std::memcpy(field, &address, 8);
    }
  const auto inputs = take<float>(at, head[7]), expected = take<float>(at, head[8]);
  parallel = start;
  thread_index = [] { return index_here; };
  thread_count = [] { return count_here; };
  void *plan = sparsify_plan(steps.data(), head[0], head[1], head[2]);
  const float *source = inputs.data();
  int wrong = 0;
  const auto call = [&] {
    std::vector<float> output(expected.size());
    float *target = output.data();
    sparsify_run(plan, &source, &target, head[3], static_cast<int32_t>(head[4]), nullptr);
    for (size_t i = 0; i < output.size(); ++i) wrong += std::abs(output[i] - expected[i]) > 1e-4f;
  };
  call();
  std::thread other([&] {
    std::vector<float> output(expected.size());
    float *target = output.data();
    sparsify_run(plan, &source, &target, head[3], 1, nullptr);
  });
  call();  // at the same time
  other.join();
  sparsify_forget(plan);
  std::vector<float> values(100000, 1.f);
  const std::vector<uint8_t> mask(values.size(), 0);
  sparsify_zero_dropped(values.data(), mask.data(), static_cast<int64_t>(values.size()), 4, 3);
  wrong += values.back() != 0.f;
  if (wrong) std::printf("%d numbers are wrong\n", wrong);
  return wrong != 0;
}
