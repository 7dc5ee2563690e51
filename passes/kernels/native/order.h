// Order: kept weights in the order in which sums go through them: by chunks of outputs, blocks of inputs, outputs. By counting.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "threads.h"

namespace sparsify {

struct Order {
  int64_t weights;                      // kept
  const int32_t *places;                // [weights] in the dense weight, ascending
  const int32_t *index;                 // [weights] where their values are stored
  int64_t outputs, inputs, taps, last;  // the dense weight's shape, inputs of one convolution group; whether inputs lie last
  int64_t groups, transposed;           // convolution groups; whether a sum goes to each input, not to each output
  int64_t group;                        // outputs that share a pattern, of a sum to each output
  const int32_t *shifts;                // [taps] from a channel to what a weight multiplies there; -1: no part of the sums
  int64_t distance;                     // from a channel to the next
  int64_t channels, least;              // of a block; chunks at least
  double most;                          // weights of a chunk
  int64_t blocks = 0;                   // what channels make
  // Results. The tables, as long as they may become, are those of sums.h; `own` is what is found of `index`.
  int64_t chunks = 0, widest = 0, found = 0;  // chunks; groups of the largest; weights that are part of the sums
  int32_t *chunk_groups = nullptr, *starts = nullptr, *offsets = nullptr, *own = nullptr, *place = nullptr;
};

// A kept weight: its number, its channels, and from a channel to what it multiplies there.
struct Visited {
  int64_t number;
  int32_t sum, summed, shift;
  bool first;  // of the sums that share a pattern
};

// Call visit(weight) for every kept one of outputs from `output` to `end` that is part of the sums. Divisions would take longer
// than all else: places in an output are looked up.
template <typename Visit>
void each(const Order &o, int64_t output, int64_t end, const Visit &visit) {
  struct Place {
    int32_t input, shift;
  };
  const int64_t row = o.inputs * o.taps, outputs_of_group = o.outputs / o.groups;
  std::vector<Place> places(row);
  for (int64_t input = 0; input < o.inputs; ++input)
    for (int64_t tap = 0; tap < o.taps; ++tap)
      places[o.last ? tap * o.inputs + input : input * o.taps + tap] = {static_cast<int32_t>(input), o.shifts[tap]};
  for (int64_t k = std::lower_bound(o.places, o.places + o.weights, output * row) - o.places; output < end; ++output) {
    const int64_t begin = output * row;
    const auto own = static_cast<int32_t>(output / o.group);
    const auto first = static_cast<int32_t>(output / outputs_of_group * o.inputs);
    for (; k < o.weights && o.places[k] < begin + row; ++k) {
      const auto [input, shift] = places[o.places[k] - begin];
      if (shift < 0) continue;
      if (o.transposed)
        visit({k, first + input, own, shift, true});
      else
        visit({k, own, first + input, shift, output % o.group == 0});
    }
  }
}

// Cut sums into chunks with about as many weights each, of which `counts` has those of every group.
inline void cut_chunks(Order &o, const std::vector<int32_t> &counts) {
  const auto groups = static_cast<int64_t>(counts.size());
  const double total = std::accumulate(counts.begin(), counts.end(), static_cast<double>(groups));
  const auto wanted = std::min(groups, std::max(o.least, static_cast<int64_t>(std::ceil(total / o.most))));
  o.chunks = o.widest = o.chunk_groups[0] = 0;
  double work = 0;
  for (int64_t g = 0, turn = 1; g < groups; ++g) {
    work += counts[g] + 1;
    const bool last = g + 1 == groups;
    if (!last && work < total * turn / wanted) continue;
    while (turn < wanted && work >= total * turn / wanted) ++turn;
    o.widest = std::max(o.widest, g + 1 - o.chunk_groups[o.chunks]);
    o.chunk_groups[++o.chunks] = static_cast<int32_t>(g + 1);
  }
}

// Outputs that one thread sorts, and how far it is.
struct Share {
  int64_t begin, end, found = 0;
  std::vector<int32_t> counts = {}, next = {};  // of its weights, by cells, which are a block of a group each
};

inline void order(Order &o, int32_t threads) {
  const int64_t groups = (o.transposed ? o.inputs * o.groups : o.outputs) / o.group, cells = groups * o.blocks;
  const int64_t together = o.outputs / o.group, most = o.weights > kSerial ? threads : 1;
  std::vector<Share> shares;
  for (int64_t i = 0; i < most; ++i) shares.push_back({together * i / most * o.group, together * (i + 1) / most * o.group});
  const auto in_shares = [&](const auto &work) {
    in_team(static_cast<int32_t>(most), [&](int64_t thread, int64_t team) {
      for (; thread < most; thread += team) work(shares[thread]);
    });
  };
  std::vector<int32_t> blocks(o.transposed ? o.outputs : o.inputs * o.groups);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<int32_t>(i / o.channels);
  in_shares([&](Share &share) {
    share.counts.resize(cells);
    each(o, share.begin, share.end, [&](const Visited &w) {
      share.counts[w.sum * o.blocks + blocks[w.summed]] += w.first;
      ++share.found;
    });
  });
  std::vector<int32_t> counts(groups), bases(groups), widths(groups);
  for (const Share &share : shares)
    for (int64_t cell = 0; cell < cells; ++cell) counts[cell / o.blocks] += share.counts[cell];
  cut_chunks(o, counts);
  for (int64_t chunk = 0; chunk < o.chunks; ++chunk) {
    const int32_t begin = o.chunk_groups[chunk], width = o.chunk_groups[chunk + 1] - begin;
    for (int32_t g = begin; g < begin + width; ++g) {
      widths[g] = width;
      bases[g] = static_cast<int32_t>(begin * o.blocks + g - begin);
    }
  }
  const auto cell_of = [&](int64_t g, int64_t block) { return bases[g] + block * widths[g]; };  // in the order of sums
  for (Share &share : shares) {
    share.next.resize(cells);
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t block = 0; block < o.blocks; ++block) share.next[cell_of(g, block)] = share.counts[g * o.blocks + block];
  }
  int32_t position = 0;
  for (int64_t cell = 0; cell < cells; ++cell) {
    o.starts[cell] = position;
    for (Share &share : shares) position += std::exchange(share.next[cell], position);
  }
  o.starts[cells] = position;
  o.found = 0;
  for (Share &share : shares) o.found += std::exchange(share.found, o.found);
  in_shares([&](Share &share) {
    int64_t at = share.found;
    each(o, share.begin, share.end, [&](const Visited &w) {
      o.own[at] = o.index[w.number];
      if (w.first) {
        const int32_t here = share.next[cell_of(w.sum, blocks[w.summed])]++;
        o.place[at] = static_cast<int32_t>(here * o.group);
        o.offsets[here] = static_cast<int32_t>(w.summed * o.distance + w.shift);
      } else {  // one output further, where as many weights come as in the one before
        o.place[at] = o.place[at - counts[w.sum]] + 1;
      }
      ++at;
    });
  });
}

}  // namespace sparsify
