// Runs plans and sums from a file on threads that sanitizers can follow, and compares what comes out. For test_sanitizers.py.

#include <cmath>
#include <cstdio>
#include <cstdlib>
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

// A file: how many vectors follow, and for each its bytes, then these.
class Reader {
 public:
  explicit Reader(const char *path) {
    std::ifstream file(path, std::ios::binary);
    content_.assign(std::istreambuf_iterator<char>(file), {});
    at_ = content_.data();
  }

  template <typename T>
  std::vector<T> take() {
    int64_t bytes;
    std::memcpy(&bytes, at_, 8);
    std::vector<T> result(bytes / sizeof(T));
    std::memcpy(result.data(), at_ + 8, bytes);
    at_ += 8 + bytes;
    return result;
  }

  // Records whose pointers, at some places, are distances into tables, or 0 for none.
  template <typename T>
  std::vector<T> records(std::vector<char> &tables) {
    auto found = take<T>();
    const auto places = take<int64_t>();
    tables = take<char>();
    for (auto &record : found)
      for (const int64_t place : places) {
        int64_t distance;
        char *field = reinterpret_cast<char *>(&record) + place;
        std::memcpy(&distance, field, 8);
        const char *address = distance ? tables.data() + distance - 1 : nullptr;
        std::memcpy(field, &address, 8);
      }
    return found;
  }

 private:
  std::vector<char> content_;
  const char *at_;
};

int different(const std::vector<float> &a, const std::vector<float> &b) {
  int wrong = a.size() != b.size();
  for (size_t i = 0; i < a.size() && !wrong; ++i) wrong += !(std::abs(a[i] - b[i]) <= 1e-4f * (1.f + std::abs(b[i])));
  return wrong;
}

int run_plan(Reader &file, int32_t threads) {
  std::vector<char> tables;
  auto steps = file.records<Step>(tables);
  const auto sizes = file.take<int64_t>();  // of an arena, of the first part, of a batch
  const auto inputs = file.take<float>(), expected = file.take<float>();
  void *plan = sparsify_plan(steps.data(), static_cast<int64_t>(steps.size()), sizes[0], sizes[1]);
  const float *source = inputs.data();
  int wrong = 0;
  const auto call = [&](int32_t team) {
    std::vector<float> output(expected.size());
    float *target = output.data();
    sparsify_run(plan, &source, &target, sizes[2], team, nullptr);
    return different(output, expected);
  };
  wrong += call(threads);
  std::thread other([&] { call(1); });
  wrong += call(threads);  // at the same time
  other.join();
  sparsify_forget(plan);
  return wrong;
}

int run_sum(Reader &file, int32_t threads, bool gradient) {
  std::vector<char> tables;
  const auto sums = file.records<Sum>(tables);
  const auto source = file.take<float>(), given = file.take<float>(), expected = file.take<float>();
  std::vector<float> found(expected.size());
  if (gradient)
    sparsify_sum_gradient(sums.data(), source.data(), given.data(), found.data(), threads);
  else
    sparsify_sum(sums.data(), static_cast<int64_t>(sums.size()), source.data(), found.data(), given.data(), nullptr, threads);
  return different(found, expected);
}

// A norm of constant gradients, which are the gradient of its bias by their number: how many results are not what they must be.
int run_norm(int32_t threads) {
  constexpr int64_t images = 4, channels = 6, pixels = 37, count = images * channels * pixels;
  const std::vector<float> weight(channels, 2.f), bias(channels, 3.f), gradient(count, 1.f), other(count, 0.f);
  std::vector<float> x(count), y(count), of_x(count), of_other(count), sums[4];
  for (auto &own : sums) own.resize(channels);
  for (int64_t i = 0; i < count; ++i) x[i] = static_cast<float>(i * 7919 % 101);
  const Norm norm{images, channels, pixels, 1, 1e-5, weight.data(), bias.data()};
  sparsify_norm_forward(&norm, x.data(), nullptr, y.data(), sums[0].data(), sums[1].data(), threads);
  sparsify_norm_backward(&norm, gradient.data(), x.data(), nullptr, sums[0].data(), sums[1].data(), of_x.data(), nullptr,
                         sums[2].data(), sums[3].data(), threads);
  int wrong = 0;
  for (int64_t c = 0; c < channels; ++c) {
    int64_t through = 0;
    for (int64_t i = 0; i < count; ++i) through += i / pixels % channels == c && y[i] > 0;
    wrong += sums[3][c] != static_cast<float>(through);
  }
  sparsify_norm_forward(&norm, x.data(), other.data(), y.data(), sums[0].data(), sums[1].data(), threads);
  sparsify_norm_backward(&norm, gradient.data(), x.data(), y.data(), sums[0].data(), sums[1].data(), of_x.data(), of_other.data(),
                         sums[2].data(), sums[3].data(), threads);
  for (int64_t i = 0; i < count; ++i) wrong += (of_other[i] != 0) != (y[i] > 0);
  return wrong;
}

// Pools of numbers that grow along planes: the last pixel of a window is chosen, where gradients add up.
int run_pool(int32_t threads) {
  const MaxPool pool{5, 9, 11, 5, 6, {3, 3}, {2, 2}, {1, 1}};
  std::vector<float> x(5 * 9 * 11), y(5 * 5 * 6), of_x(x.size());
  std::vector<uint8_t> chosen(y.size());
  std::iota(x.begin(), x.end(), 0.f);
  sparsify_max_pool_forward(&pool, x.data(), y.data(), chosen.data(), threads);
  sparsify_max_pool_backward(&pool, y.data(), chosen.data(), of_x.data(), threads);
  int wrong = 0;
  for (const float value : y) wrong += of_x[static_cast<size_t>(value)] < value;
  return wrong;
}

int run_file(const char *path, int32_t threads) {
  Reader file(path);
  const auto kind = file.take<int64_t>()[0];  // a plan, a sum, a gradient of one
  return kind ? run_sum(file, threads, kind == 2) : run_plan(file, threads);
}

// What needs no file: how many results are not what they must be.
int run_rest(int32_t threads) {
  int wrong = 0;
  std::vector<float> values(100000, 1.f);
  const std::vector<uint8_t> mask(values.size(), 0);
  sparsify_zero_dropped(values.data(), mask.data(), static_cast<int64_t>(values.size()), 4, threads);
  wrong += values.back() != 0.f;
  std::vector<uint8_t> chosen(values.size());
  std::vector<float> scores(values.size());
  std::iota(scores.begin(), scores.end(), -20000.f);
  for (const int32_t lowest : {0, 1}) {
    sparsify_select(scores.data(), mask.data(), 100000, 1000, 0, lowest, chosen.data(), threads);
    wrong += std::count(chosen.begin(), chosen.end(), 1) != 1000 || !chosen[lowest ? 20499 : 99000] || chosen[lowest ? 20501 : 98999];
  }
  std::vector<int32_t> numbers(values.size()), starts(values.size() + 1), tables[4];
  std::iota(numbers.begin(), numbers.end(), 0);
  for (auto &table : tables) table.resize(values.size() + 1);
  const auto count = static_cast<int64_t>(values.size());
  const int32_t shift = 3;
  for (const int64_t transposed : {0, 1}) {  // a dense weight of 500 outputs and 200 inputs, which are 500 and 200 sums
    Order order{count, numbers.data(), numbers.data(), 500, 200, 1, 0, 1, transposed, 1, &shift, 10, 50, 2, 1e4};
    order.blocks = transposed ? 10 : 4;
    order.chunk_groups = tables[0].data(), order.starts = starts.data(), order.offsets = tables[1].data();
    order.own = tables[2].data(), order.place = tables[3].data();
    sparsify_order(&order, threads);
    wrong += order.found != count || starts[2000] != count;
  }
  return wrong + run_norm(threads) + run_pool(threads);
}

}  // namespace

// Run what needs no file, and the files that are given, on as many threads as the first argument says.
int main(int count, char **arguments) {
  parallel = start;
  thread_index = [] { return index_here; };
  thread_count = [] { return count_here; };
  const int32_t threads = std::atoi(arguments[1]);
  int wrong = run_rest(threads);
  for (int i = 2; i < count; ++i) {
    std::fprintf(stderr, "%s\n", arguments[i]);  // a sanitizer speaks of the last one
    const int found = run_file(arguments[i], threads);
    if (found) std::fprintf(stderr, "%d results are wrong\n", found);
    wrong += found;
  }
  return wrong != 0;
}
